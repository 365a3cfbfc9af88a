"""Batches of images of every size, cut into patches (spec: radiograph MAE, sections 3 and 4). One record is one image.

    patch   (b, n, p * p) uint16, 65535 is white: the image, zero-padded below and right to whole patches; patches row
            by row, in each (row, column). Mode `pack`: the images of a row one after the other. The rest is zero
    grid    (b, 2) int32, rows and columns of patches, (0, 0) = padding row. Mode `pack`: (b, K, 2). Mode `dbb`: that of
            the bin, as published: the padding of the bin counts as image
    where   (b, K, A) int32, on demand and with buckets that have an `attention` size A: the place in the row of every
            patch of every image, n = none; so attention can be padded to A patches again
    label   (b, k) float32, NaN = missing; mode `pack`: (b, K, k)
    _mask   (b,) float32, 0 = no image in the row
    _id     (b,) int32, record id, -1 = none; mode `pack`: (b, K)

Buckets are those of the plan modes `length`, `pack` and `dbb`. Nothing is random.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from jaxmed.core import memory
from jaxmed.core.errors import UserError
from jaxmed.data import intensity as intensities
from jaxmed.data.labels import columns as label_columns
from jaxmed.data.plan import PAD, Bucket
from jaxmed.data.shards import Dataset

KEYS = ("patch", "where", "label")


@dataclass(frozen=True)
class Radiographs:
    """See the module and `jaxmed.data.collate` for the contract, `make` for the options."""

    dataset: Dataset
    ids: np.ndarray
    sizes: dict[str, np.ndarray]
    elements: np.ndarray  # patches of every record
    digest: str
    patch: int
    intensity: str
    keys: tuple[str, ...]
    labels: np.ndarray  # (number of records, k) float32

    def slots(self, bucket: Bucket) -> int:
        sides = self._bin(bucket)
        return dict(bucket)["tokens"] if sides is None else sides[0] * sides[1]

    def _bin(self, bucket: Bucket) -> tuple[int, int] | None:
        """Rows and columns of patches of a bin."""
        sides = dict(bucket)
        return None if "tokens" in sides else (-(-sides["height"] // self.patch), -(-sides["width"] // self.patch))

    def spec(self, bucket: Bucket, b: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        images = (b, dict(bucket)["images"]) if "images" in dict(bucket) else (b,)
        every = {
            "patch": ((b, self.slots(bucket), self.patch**2), np.dtype(np.uint16)),
            "grid": ((*images, 2), np.dtype(np.int32)),
            "where": ((*images, dict(bucket).get("attention", 0)), np.dtype(np.int32)),
            "label": ((*images, self.labels.shape[1]), np.dtype(np.float32)),
        }
        if "where" in self.keys and "attention" not in dict(bucket):
            raise UserError("input.keys has 'where': only input.mode='pack' with attention='rebucket' plans for it")
        wanted = {*self.keys, "grid"} if "patch" in self.keys else set(self.keys)
        fixed = {"_mask": ((b,), np.dtype(np.float32)), "_id": (images, np.dtype(np.int32))}
        return {k: v for k, v in every.items() if k in wanted} | fixed

    def assemble(self, bucket: Bucket, ids: np.ndarray, step: int, pool: Executor | None) -> dict[str, np.ndarray]:
        batch = {
            k: (memory.empty if k == "patch" else memory.zeros)(*v) for k, v in self.spec(bucket, len(ids)).items()
        }
        rows = ids.reshape(len(ids), -1)
        batch["_mask"][:] = (rows != PAD).any(1)
        batch["_id"][:] = ids
        if "label" in batch:
            batch["label"][:] = np.where((ids == PAD)[..., None], np.float32(np.nan), self.labels[ids])
        if "patch" not in batch:
            return batch

        index, sides = self.dataset.index, self._bin(bucket)
        grids = np.stack(
            [-(-index[side][rows].astype(np.int64) // self.patch) for side in ("height", "width")], axis=-1
        )
        grids[rows == PAD] = 0
        used = grids.prod(-1)
        batch["grid"].reshape(grids.shape)[:] = grids
        if sides is not None:
            batch["grid"][ids != PAD] = sides
        if "where" in batch:
            within = np.arange(batch["where"].shape[-1])
            starts = (np.cumsum(used, axis=1) - used)[..., None]
            batch["where"][:] = np.where(within < used[..., None], starts + within, batch["patch"].shape[1])

        def fill(place: tuple[int, int]) -> None:
            row, k = place
            high, wide = grids[row, k].tolist()
            if sides is None:
                first = int(used[row, :k].sum())
                cells = batch["patch"][row, first : first + high * wide].reshape(high, wide, self.patch, self.patch)
            else:
                cells = batch["patch"][row].reshape(*sides, self.patch, self.patch)
                cells[high:] = 0
                cells[:high, wide:] = 0
            self._fill(cells[:high, :wide], int(rows[row, k]))

        for row, count in enumerate(used.sum(1)):
            if sides is None or not count:
                batch["patch"][row, count:] = 0
        places = [(row, k) for row, k in np.argwhere(rows != PAD).tolist()]
        for _ in map(fill, places) if pool is None else pool.map(fill, places):
            pass
        return batch

    def _fill(self, cells: np.ndarray, id: int) -> None:
        """Writes one image into `cells` (rows, columns, p, p), all of it."""
        record = self.dataset.record(id)
        scan = record.study([0])["scans"][0]
        voxels = scan["voxels"]
        height, width = (int(self.dataset.index[side][id]) for side in ("height", "width"))
        if (
            "range" not in scan["meta"]
            or voxels.shape not in ((1, height, width), (1, height, width, 1))
            or voxels.dtype.kind != "u"
        ):
            raise UserError(
                f"study {record.key}: {voxels.shape} {voxels.dtype} with {sorted(scan['meta'])} instead of "
                f"(1, {height}, {width}) uint16 with 'range' and what else describes intensities; make the shards "
                "again with python -m jaxmed.prep --recipe=radiograph"
            )
        high, wide, p, _ = cells.shape
        shown = np.zeros((high * p, wide * p), np.uint16)
        shown[:height, :width] = intensities.table(scan["meta"], intensity=self.intensity)[
            voxels.reshape(height, width)
        ]
        cells[...] = shown.reshape(high, p, wide, p).swapaxes(1, 2)


def make(
    dataset: Dataset,
    ids: np.ndarray,
    *,
    train: bool,
    seed: int,
    buckets: Mapping[str, Sequence[int]] | None,
    patch: int,
    intensity: str = "voi",
    keys: Sequence[str] = ("patch",),
    classes: Sequence[str] | None = None,
) -> Radiographs:
    """Checks everything that can be checked before the first step.

    Args:
      dataset, ids: the records to use, one image each.
      train, seed, buckets: nothing here depends on them.
      patch: edge of a patch in pixels.
      intensity: how stored values become grey values, see `jaxmed.data.intensity`.
      keys: which of `KEYS` a batch has (`patch` brings `grid`, `where` needs it; all have `_mask` and `_id`).
      classes: label names, in order; default: those of the dataset.

    Raises:
      UserError: an option is unknown, or the records do not fit it; names the field or the study.
    """
    for field, value, known in (
        ("intensity", intensity, intensities.INTENSITIES),
        *(("keys", key, KEYS) for key in keys),
    ):
        if value not in known:
            raise UserError(f"input.{field}={value!r} is not known; use one of {', '.join(known)}")
    if "where" in keys and "patch" not in keys:
        raise UserError("input.keys has 'where', which says where patches are: it needs 'patch' too")
    if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:
        raise UserError(f"input.patch={patch!r} must be a whole number of at least 1")
    index = dataset.index
    for i in ids[(index["slices"][ids] != 1) | (index["scans"][ids] != 1)][:1]:
        raise UserError(
            f"study {index['key'][i]} has {index['scans'][i]} scans with {index['slices'][i]} slices; collate "
            "'radiograph' takes one image per record (python -m jaxmed.prep --recipe=radiograph)"
        )
    chosen, labels = label_columns(dataset, classes, "label" in keys)
    height, width = (index[side].astype(np.int64) for side in ("height", "width"))
    tokens = -(-height // patch) * -(-width // patch)
    options = {"patch": patch, "intensity": intensity, "keys": sorted(keys), "classes": chosen}
    return Radiographs(
        dataset=dataset,
        ids=ids,
        sizes={"height": height[ids], "width": width[ids], "tokens": tokens[ids]},
        elements=tokens.astype(np.float64),
        digest=hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest(),
        patch=patch,
        intensity=intensity,
        keys=tuple(keys),
        labels=labels,
    )
