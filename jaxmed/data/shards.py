"""A dataset on disk: ArrayRecord shards, one index, one manifest, checksums over everything.

    DIR/shard-00000.array_record   records (see `record.py`), group_size 1, so any record is one read
    DIR/shard-00000.json           sidecar, written last: the shard's size, sha256 and index rows
    DIR/index.npz                  one row per record, all shards; the row number is the record id
    DIR/dataset.json               manifest, written last of all: without it there is no dataset

Everything appears under a temporary name and is renamed when it is whole and on disk, so a killed or full-disk run
leaves nothing that looks whole: a shard without a sidecar does not count, and is written again.
"""

import contextlib
import hashlib
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int64

from jaxmed.core.errors import UserError
from jaxmed.core.files import cannot_write, commit, temporary, write_file
from jaxmed.data.record import CODECS, DEFAULT_CODEC, Record, Study, StudyReader, encode

SCHEMA = 1
MANIFEST = "dataset.json"
INDEX = "index.npz"

# Random access: no read-ahead, no threads of its own (the pipeline brings threads).
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class Dataset(Protocol):
    """What the pipeline reads from: shards (`open_dataset`), or another source with the same four attributes.

    Attributes:
      name: for messages.
      manifest: at least `classes` (list of label names) and `recipe` (dict).
      index: {column: array with one row per record}; columns as in `Shards.index`.
      fingerprint: sha256 of the content that `index` describes.
    """

    name: str
    manifest: dict[str, Any]
    index: dict[str, np.ndarray]
    fingerprint: str

    def record(self, id: int) -> StudyReader: ...

    def close(self) -> None: ...


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.array_record"


class ShardWriter:
    """Writes one shard; use as a context manager: on an exception nothing is left.

    >>> with ShardWriter("brain", number=0) as writer:
    ...     writer.add(study)
    """

    def __init__(self, dir: str | os.PathLike, number: int, codec: str = DEFAULT_CODEC):
        """`number` names the shard; writing a number that exists replaces it. `codec`: see `record.CODECS`."""
        if codec not in CODECS:
            raise UserError(f"record codec {codec!r} is not known; use one of {', '.join(CODECS)}")
        self.path = Path(dir) / shard_name(number)
        self.codec = codec
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0  # of encoded records, before the shard's own compression: close the shard when it is large
        self._temporary = temporary(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.with_suffix(".json").unlink(missing_ok=True)  # from here on an old shard does not count
            for killed in self.path.parent.glob(f".{self.path.stem}.*.tmp"):  # of a run that was killed
                killed.unlink(missing_ok=True)
            self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), CODECS[codec].shard_options)
        except (OSError, RuntimeError) as e:
            raise cannot_write(self.path, e) from e

    def add(self, study: Mapping[str, Any] | bytes) -> int:
        """Appends a study, or the bytes that `record.encode` made of it; returns its encoded size in bytes."""
        data = study if isinstance(study, bytes) else encode(study, self.codec)
        about = Record(data)
        if about.codec != self.codec:
            raise ValueError(f"study {about.key} is encoded with {about.codec!r}, the shard's codec is {self.codec!r}")
        heights, widths = {s[1] for s in about.shapes}, {s[2] for s in about.shapes}
        self.rows.append(
            {
                "key": about.key,
                "patient": about.patient,
                "split": about.split,
                "scans": len(about.shapes),
                "slices": sum(s[0] for s in about.shapes),
                "depth": max(s[0] for s in about.shapes),
                "height": max(heights),
                "width": max(widths),
                "dtype": about.dtypes[0].name,
                "text_chars": len(" ".join(about.sentences)),
                "labels": about.labels,
            }
        )
        self.bytes += len(data)
        try:
            self._writer.write(data)
        except RuntimeError as e:
            self.abort()
            raise cannot_write(self.path, e) from e
        return len(data)

    def close(self) -> Path | None:
        """Makes the shard real: flush, checksum, rename, sidecar. Returns its path; None (no file) if it is empty.

        Raises:
          UserError: the disk is full; nothing is left.
        """
        if not self.rows:
            self.abort()
            return None
        try:
            self._writer.close()  # a full disk shows here, not in write(): the library buffers
            if _records(self._temporary) != len(self.rows):
                raise OSError("fewer records reached the disk than were written")
            sidecar = {
                "schema": SCHEMA,
                "file": self.path.name,
                "codec": self.codec,
                "records": len(self.rows),
                "bytes": self._temporary.stat().st_size,
                "sha256": _sha256(self._temporary),
                "rows": self.rows,
            }
            commit(self._temporary, self.path)
        except (RuntimeError, OSError) as e:
            self.abort()
            raise cannot_write(self.path, e) from e
        try:
            write_file(self.path.with_suffix(".json"), json.dumps(sidecar).encode())
        except UserError:
            self.path.unlink(missing_ok=True)
            raise
        return self.path

    def abort(self) -> None:
        """Gives the shard up and removes what was written."""
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):  # it may fail again on the full disk; the file goes anyway
                self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def sidecars(dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The sidecars of the whole shards in `dir`, in order of shard: what a restarted `prep` finds done.

    A shard whose file is missing or has another size than its sidecar says is not whole and is left out.
    """
    found = []
    for path in sorted(Path(dir).glob("shard-*.json")):
        try:
            sidecar = json.loads(path.read_text())
            whole = (path.parent / sidecar["file"]).stat().st_size == sidecar["bytes"]
        except (OSError, ValueError, KeyError):
            continue
        if sidecar.get("schema") != SCHEMA:
            raise UserError(
                f"{path}: schema {sidecar.get('schema')}, this jaxmed writes schema {SCHEMA}; use another output folder"
            )
        if whole:
            found.append(sidecar)
    return found


def finish(
    dir: str | os.PathLike,
    name: str,
    recipe: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes `index.npz` and then `dataset.json` from the sidecars in `dir`; may be called again after more shards.

    Args:
      name: of the dataset.
      recipe: how the voxels were made, plain values, at least `value_range: [lo, hi]` of what is stored.
      classes: label names and their order; default: all names that occur, sorted.

    Returns:
      The manifest.

    Raises:
      UserError: no whole shard, a study key twice, shards of different codecs, a label outside `classes`.
    """
    dir = Path(dir)
    shards = sidecars(dir)
    if not shards:
        raise UserError(
            f"{dir} has no whole shard; `python -m jaxmed.prep` found no usable study, or was stopped early"
        )
    rows = [{**row, "shard": int(s["file"][6:-13]), "row": i} for s in shards for i, row in enumerate(s["rows"])]
    seen: dict[str, int] = {}
    for row in rows:
        if row["key"] in seen:
            raise UserError(
                f"study {row['key']} is in {shard_name(seen[row['key']])} and in {shard_name(row['shard'])} of {dir}; "
                "delete one of the two shards with its .json and run prep again"
            )
        seen[row["key"]] = row["shard"]
    codecs = sorted({s["codec"] for s in shards})
    if len(codecs) > 1:
        raise UserError(f"{dir} has shards of codecs {' and '.join(codecs)}; use one output folder per codec")
    occurring = sorted({label for row in rows for label in row["labels"]})
    classes = occurring if classes is None else list(classes)
    if missing := [label for label in occurring if label not in classes]:
        raise UserError(f"labels {', '.join(missing)} occur in the shards of {dir} but not in classes {classes}")

    index = {k: np.array([r[k] for r in rows], str) for k in ("key", "patient", "split", "dtype")}
    for column in ("shard", "row", "scans", "slices", "depth", "height", "width", "text_chars"):
        index[column] = np.array([r[column] for r in rows], np.int64)
    for label in classes:
        index[f"label/{label}"] = np.array([r["labels"].get(label, np.nan) for r in rows], np.float32)
    index_bytes = _npz(index)
    write_file(dir / INDEX, index_bytes)
    splits, counts = np.unique(index["split"], return_counts=True)
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "recipe": dict(recipe or {}),
        "codec": codecs[0],
        "classes": classes,
        "splits": {str(s): int(c) for s, c in zip(splits, counts)},
        "shards": [{k: s[k] for k in ("file", "records", "bytes", "sha256")} for s in shards],
        "index": {"file": INDEX, "sha256": hashlib.sha256(index_bytes).hexdigest()},
    }
    write_file(dir / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _npz(columns: Mapping[str, np.ndarray]) -> bytes:
    """Like `np.savez_compressed`, but equal columns give equal bytes (no time stamps)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for column, values in columns.items():
            with z.open(zipfile.ZipInfo(f"{column}.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, values, allow_pickle=False)
    return buffer.getvalue()


# --- reading ----------------------------------------------------------------------------------------------------------


def _records(path: str | os.PathLike) -> int:
    """Records in a shard; 0 for a file that is cut, empty or no ArrayRecord (the library opens those silently)."""
    reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
    try:
        return reader.num_records() if reader.ok() else 0
    finally:
        reader.close()


class Shards:
    """An open dataset folder (see `open_dataset`); readers open when first needed; safe to use from many threads.

    Attributes:
      name, manifest: as in `dataset.json`.
      index: {column: (n,) array}: `key`, `patient`, `split`, `dtype` (str); `shard`, `row`, `scans`, `slices` (sum of
        depths over scans), `depth`, `height`, `width` (maxima over scans), `text_chars` (int64); `label/<name>`
        (float32, NaN = missing). Row number = record id.
      fingerprint: sha256 of the index file.
    """

    def __init__(self, dir: Path, manifest: dict[str, Any], index: dict[str, np.ndarray]):
        self.dir = dir
        self.name = manifest["name"]
        self.manifest = manifest
        self.index = index
        self.fingerprint = manifest["index"]["sha256"]
        self._about = {int(s["file"][6:-13]): s for s in manifest["shards"]}
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index["key"])

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def record(self, id: int) -> Record:
        """The record with that id, its voxels still encoded.

        Raises:
          UserError: the shard is missing, cut or damaged.
        """
        number, row = int(self.index["shard"][id]), int(self.index["row"][id])
        about = self._about[number]
        path = self.dir / about["file"]
        try:
            [data] = self._reader(number).read([row])
            if not data:  # what the library returns for a file that was cut after it was opened
                raise IndexError("no bytes")
        except (RuntimeError, IndexError, ValueError) as e:
            raise UserError(f"{path}, row {row} cannot be read ({e}); {_FIX}") from e
        return Record(data, f"{path}, row {row}")

    def read(self, ids: Iterable[int], scans: Iterable[int] | None = None) -> list[Study]:
        """The studies with these ids as dicts (see `record.encode`), with the given scans only (default: all)."""
        chosen = None if scans is None else list(scans)
        return [self.record(int(i)).study(chosen) for i in ids]

    def close(self) -> None:
        """Closes the open shard files; reading opens them again."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def _reader(self, number: int):
        reader = self._readers.get(number)
        if reader is not None:
            return reader
        with self._lock:
            if number not in self._readers:
                about = self._about[number]
                path = self.dir / about["file"]
                reader = array_record_module.ArrayRecordReader(
                    str(path), _READER_OPTIONS, file_reader_buffer_size=1 << 15
                )
                if not reader.ok() or reader.num_records() != about["records"]:
                    raise UserError(f"{path} does not hold the {about['records']} records of {MANIFEST}; {_FIX}")
                self._readers[number] = reader
            return self._readers[number]


_FIX = "copy the dataset again, or delete this shard with its .json and run `python -m jaxmed.prep` again"


def open_dataset(dir: str | os.PathLike, verify: str = "fast") -> Shards:
    """Opens a dataset folder and checks that it is whole.

    Args:
      dir: folder with `dataset.json`.
      verify: "fast": schema, index checksum, presence, size and record count of every shard's file (the counts are
        compared again with the file when a shard is first read). "full": also the sha256 of every shard.

    Raises:
      UserError: any of that does not hold; names the file and what to do.
    """
    if verify not in ("fast", "full"):
        raise UserError(f"verify={verify!r} is not known; use 'fast' or 'full'")
    dir = Path(dir)
    path = dir / MANIFEST
    if not dir.is_dir():
        raise UserError(f"dataset folder {dir} does not exist; make it with `python -m jaxmed.prep SRC --out={dir}`")
    if not path.exists():
        raise UserError(f"{dir} has no {MANIFEST}: prep has not finished there; run the same prep command again")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a dataset manifest ({e}); run the same prep command again") from e
    if version != SCHEMA:
        raise UserError(
            f"{path}: the shards are of schema version {version}, this jaxmed reads version {SCHEMA}; "
            "make them again with `python -m jaxmed.prep`, or install the jaxmed that wrote them"
        )
    if missing := {"name", "classes", "shards", "index"} - set(manifest):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; run the same prep command again")
    index_path = dir / manifest["index"]["file"]
    if not index_path.exists() or _sha256(index_path) != manifest["index"]["sha256"]:
        raise UserError(
            f"{index_path} is missing or is not the index of these shards (its sha256 differs from {MANIFEST}); "
            "run the same prep command again: it rebuilds the index and keeps whole shards"
        )
    with np.load(index_path, allow_pickle=False) as columns:
        index = {k: columns[k] for k in columns.files}
    numbers, counts = np.unique(index["shard"], return_counts=True)
    rows = dict(zip(numbers.tolist(), counts.tolist()))
    for about in manifest["shards"]:
        shard = dir / about["file"]
        if not shard.exists():
            raise UserError(f"{shard} is missing; {_FIX}")
        if shard.stat().st_size != about["bytes"]:
            raise UserError(f"{shard} has {shard.stat().st_size} bytes instead of {about['bytes']}: truncated? {_FIX}")
        if rows.pop(int(about["file"][6:-13]), 0) != about["records"]:
            raise UserError(f"{index_path} does not list the {about['records']} records of {about['file']}; {_FIX}")
        if verify == "full" and _sha256(shard) != about["sha256"]:
            raise UserError(f"{shard}: its sha256 differs from {MANIFEST}, the file is damaged; {_FIX}")
    if rows:
        raise UserError(f"{index_path} lists records of shards {sorted(rows)} that {MANIFEST} does not have; {_FIX}")
    return Shards(dir, manifest, index)


def split_ids(dataset: Dataset, split: str) -> Int64[np.ndarray, "n"]:
    """The record ids (int64, ascending) of a split.

    Raises:
      UserError: no record has this split; names those that exist.
    """
    ids = np.flatnonzero(dataset.index["split"] == split)
    if not len(ids):
        known, counts = np.unique(dataset.index["split"], return_counts=True)
        have = ", ".join(f"{k!r} ({c} studies)" for k, c in zip(known.tolist(), counts))
        raise UserError(f"input.split={split!r}: {dataset.name} has no such split; it has {have}")
    return ids
