"""Any TensorFlow Datasets set that is stored as array_record, read without TensorFlow (extra: `jaxmed[tfds]`).

It feeds training (`input.source="tfds"`, `input.source_options={"image": "volume", "text": "report", ...}`) and prep
(`python -m jaxmed.prep --source=tfds --source.dir=... --source.image=volume ...`).

A set knows nothing of patients' geometry, so the affine is the voxel spacing alone: index order d, h, w is taken as the
patient's inferior-superior, anterior-posterior and left-right axes.
"""

import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.data.record import DTYPES, Crop, Study

# How arrays of these ranks are read when `axes` does not say; images of tfds have their channels last.
_AXES = {2: "hw", 3: "dhw", 4: "dhwc"}
# Stored as the next dtype that records know and that holds every value.
_WIDER = {"bool": "uint8", "int8": "int16", "float16": "float32", "float64": "float32"}


class ArrayStudy:
    """A study that is in memory; reads like `record.Record`."""

    def __init__(self, study: Study):
        self._study = study
        self.key: str = study["key"]
        self.patient: str = study["patient"]
        self.split: str = study["split"]
        self.sentences: list[str] = study["sentences"]
        self.labels: dict[str, float] = study["labels"]
        self.shapes = [scan["voxels"].shape for scan in study["scans"]]
        self.dtypes = [scan["voxels"].dtype for scan in study["scans"]]

    def copy_into(self, scan: int, out: np.ndarray, first: int = 0) -> None:
        out[...] = self._study["scans"][scan]["voxels"][first : first + len(out)]

    def study(self, scans: Iterable[int] | None = None, crop: Crop | None = None) -> Study:
        chosen = range(len(self.shapes)) if scans is None else scans
        return {**self._study, "scans": [_crop(self._study["scans"][i], crop or ()) for i in chosen]}


def _crop(scan: dict[str, Any], crop: Crop) -> dict[str, Any]:
    affine = scan["affine"].copy()
    corner = [s.indices(n)[0] for s, n in zip(crop, scan["voxels"].shape)]
    affine[:, 3] += affine[:, : len(corner)] @ np.array(corner, float)
    return {**scan, "voxels": scan["voxels"][tuple(crop)], "affine": affine}


class TfdsDataset:
    """A `shards.Dataset` over a builder folder; see `open_dataset`."""

    def __init__(self, dir: Path, fields: dict[str, Any]):
        self.dir = dir
        self._fields = fields
        self._open()
        self.name = self._builder.info.full_name
        classes = [name for field in fields["label"] for name in self._class_names(field) or [field]]
        if len(set(classes)) < len(classes):
            raise UserError(
                f"{dir}: fields {', '.join(fields['label'])} share class names ({', '.join(classes)}); use one"
            )
        counts = {split: len(source) for split, source in self._splits.items()}
        self._places = [(split, row) for split, n in counts.items() for row in range(n)]
        self.manifest = {"name": self.name, "classes": classes, "recipe": {}, "splits": counts}

    @functools.cached_property
    def index(self) -> dict[str, np.ndarray]:
        """Columns as in `shards.Shards.index`; reads every example once."""
        rows: list[dict[str, Any]] = []
        for split, row in self._places:
            study = self._study(split, row)
            shapes = [scan["voxels"].shape for scan in study["scans"]]
            rows.append(
                {
                    "key": study["key"],
                    "patient": study["patient"],
                    "split": split,
                    "dtype": study["scans"][0]["voxels"].dtype.name,
                    "row": row,
                    "scans": len(shapes),
                    "slices": sum(s[0] for s in shapes),
                    "depth": max(s[0] for s in shapes),
                    "height": max(s[1] for s in shapes),
                    "width": max(s[2] for s in shapes),
                    "text_chars": len(" ".join(study["sentences"])),
                    **{f"label/{name}": study["labels"].get(name, np.nan) for name in self.manifest["classes"]},
                }
            )
        keys, counts = np.unique([row["key"] for row in rows], return_counts=True)
        if (counts > 1).any():
            raise UserError(
                f"{self.dir}: field {self._fields['key']!r} is {str(keys[counts > 1][0])!r} twice; name a field that "
                "is unique"
            )
        columns = {c: np.array([row[c] for row in rows]) for c in rows[0]}
        return {c: v.astype(np.float32) if c.startswith("label/") else v for c, v in columns.items()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what identifies the content: features, sizes of the files, and the index."""
        digest = hashlib.sha256((self.dir / "features.json").read_bytes())
        infos = {split: self._builder.info.splits[split] for split in self._splits}
        sizes = {split: [info.num_bytes, list(info.shard_lengths)] for split, info in infos.items()}
        digest.update(json.dumps([self.name, self._fields, sizes], sort_keys=True).encode())
        for column in sorted(self.index):
            digest.update(column.encode() + self.index[column].tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_splits", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def record(self, id: int) -> ArrayStudy:
        return ArrayStudy(self._study(*self._places[id]))

    def read(self, ids: Iterable[int], scans: Iterable[int] | None = None) -> list[Study]:
        chosen = None if scans is None else list(scans)
        return [self.record(int(i)).study(chosen) for i in ids]

    def close(self) -> None:
        """Nothing stays open."""

    def _open(self) -> None:
        self._builder = _builder(self.dir)
        self._lock = threading.Lock()
        self._splits = {name: self._builder.as_data_source(name) for name in sorted(self._builder.info.splits)}
        have = self._builder.info.features
        fields = self._fields
        for role in ("image", "label", "text", "key", "patient"):
            for name in fields[role] if role in ("image", "label") else filter(None, [fields[role]]):
                if name not in have:
                    raise UserError(
                        f"{self.dir}: {role}={name!r} is no field of {self._builder.info.full_name}; it has "
                        f"{', '.join(sorted(have))}"
                    )

    def _class_names(self, field: str) -> list[str]:
        """Names of a class label; empty for a number."""
        return list(getattr(self._builder.info.features[field], "names", None) or [])

    def _study(self, split: str, row: int) -> Study:
        with self._lock:  # the reader underneath has one position
            example = self._splits[split][row]
        fields = self._fields
        default = f"{self._builder.info.name}-{split}-{row:06d}"
        key = default if fields["key"] is None else _text(example[fields["key"]])
        labels: dict[str, float] = {}
        for field in fields["label"]:
            value = example[field]
            names = self._class_names(field)
            if names:  # one of several classes; -1 is tfds' "unknown"
                labels |= {name: float(i == int(value)) for i, name in enumerate(names)} if int(value) >= 0 else {}
            else:
                labels[field] = float(np.asarray(value).reshape(()))
        return {
            "key": key,
            "patient": key if fields["patient"] is None else _text(example[fields["patient"]]),
            "split": split,
            "sentences": [] if fields["text"] is None else _sentences(example[fields["text"]]),
            "labels": labels,
            "scans": [self._scan(example[name], name, key) for name in fields["image"]],
        }

    def _scan(self, value: Any, name: str, key: str) -> dict[str, Any]:
        array = np.asarray(value)
        axes = self._fields["axes"] or ("hwc" if self._is_image(name) else _AXES.get(array.ndim, ""))
        if len(axes) != array.ndim or not {"h", "w"} <= set(axes) <= set("dhwc") or len(set(axes)) != len(axes):
            raise UserError(
                f"{self.dir}: field {name!r} of {key} has shape {array.shape}; set axes to the order of its axes, "
                f"letters of 'dhwc', such as 'dhw' (got {axes!r})"
            )
        voxels = array.transpose([axes.index(a) for a in "dhwc" if a in axes])
        if "d" not in axes:
            voxels = voxels[None]
        if "c" in axes and voxels.shape[-1] == 1:
            voxels = voxels[..., 0]
        dtype = _WIDER.get(voxels.dtype.name, voxels.dtype.name)
        if dtype not in DTYPES:
            raise UserError(f"{self.dir}: field {name!r} is {dtype}; records hold {', '.join(DTYPES)}")
        voxels = np.ascontiguousarray(voxels, dtype)
        d, h, w = self._fields["spacing"]
        affine = np.array([[0, 0, w, 0], [0, h, 0, 0], [d, 0, 0, 0], [0, 0, 0, 1]], np.float64)
        return {
            "voxels": voxels,
            "affine": affine,
            "source_affine": affine,
            "source_shape": voxels.shape[:3],
            "name": name,
            "meta": {},
        }

    def _is_image(self, name: str) -> bool:
        return type(self._builder.info.features[name]).__name__ in ("Image", "LabeledImage")


def open_dataset(
    dir: str,
    *,
    image: str | Sequence[str],
    text: str | None = None,
    label: str | Sequence[str] = (),
    key: str | None = None,
    patient: str | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    axes: str = "",
) -> TfdsDataset:
    """Opens a builder folder (`.../name/1.0.0`, or `.../name/config/1.0.0`) as a dataset of studies.

    Training reads every example once at its start, to index shapes and texts; for a large set make shards instead.

    Args:
      dir: folder with `dataset_info.json` and `features.json`.
      image: field of the volume or image; several fields are several scans of one study.
      text: field of the report: a string, split into sentences, or a sequence of strings, taken as sentences.
      label: fields of labels: a class label becomes one 0/1 label per class, a number becomes the label of that name.
      key, patient: fields that name a study and its patient; default: set, split and row.
      spacing: millimetres along d, h, w.
      axes: order of the axes of `image`, letters of "dhwc"; default: "dhw", for images "hwc".

    Raises:
      UserError: tfds is not installed, the folder is no array_record set, a field does not exist or does not fit.
    """
    fields = {
        "image": (image,) if isinstance(image, str) else tuple(image),
        "text": text,
        "label": (label,) if isinstance(label, str) else tuple(label),
        "key": key,
        "patient": patient,
        "spacing": tuple(float(n) for n in spacing),
        "axes": axes,
    }
    return TfdsDataset(Path(dir), fields)


def _builder(dir: Path):
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise UserError(
            "input.source='tfds' needs TensorFlow Datasets (without TensorFlow): pip install 'jaxmed[tfds]'"
        ) from e
    if not (dir / "dataset_info.json").exists() or not (dir / "features.json").exists():
        raise UserError(
            f"{dir} is not a prepared TensorFlow Datasets folder (no dataset_info.json and features.json); give the "
            "folder of one version, such as .../my_set/1.0.0"
        )
    builder = tfds.builder_from_directory(dir)
    kind = builder.info.file_format
    if kind is None or kind.value != "array_record":
        raise UserError(
            f"{dir} is stored as {kind.value if kind else 'an unknown format'}; prepare the set again with "
            "file_format='array_record' (tfrecord needs TensorFlow)"
        )
    return builder


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _sentences(value: Any) -> list[str]:
    if isinstance(value, str | bytes):
        parts = re.split(r"(?<=[.!?])\s+", _text(value))
    else:
        parts = [_text(part) for part in value]
    return [part.strip() for part in parts if part.strip()]
