"""Small studies for the tests of this floor; also a source outside the tree that counts what is read."""

import threading
from pathlib import Path

import numpy as np

from jaxmed.core.rng import np_rng
from jaxmed.data import shards


def study(i: int, *, scans: int | None = None, depth: int | None = None, hw=(6, 5), dtype="uint8", **fields):
    """Study `i`: 1-5 scans of 1-12 slices unless said; no voxel is 0, so that padding shows."""
    rng = np_rng(7, i)
    n = int(rng.integers(1, 6)) if scans is None else scans
    volumes = []
    for k in range(n):
        d = int(rng.integers(1, 13)) if depth is None else depth
        affine = np.diag([1.0 + k, 0.5, 2.0, 1.0])
        affine[:3, 3] = (-i, k, 7)
        voxels = rng.integers(1, 200, (d, *hw)).astype(dtype)
        volumes.append({"voxels": voxels, "affine": affine, "name": f"scan{k}", "meta": {"thickness": np.float32(d)}})
    return {
        "key": f"study{i:03d}",
        "patient": f"patient{i // 2:03d}",
        "scans": volumes,
        "sentences": [f"Finding {i}.", "No bleeding.", "Normal size."][: 1 + i % 3],
        "labels": {"odd": i % 2} | ({"third": 1.0} if i % 3 == 0 else {}),
        "split": "val" if i % 5 == 4 else "train",
        **fields,
    }


def write(dir, studies, *, per_shard: int = 8, codec: str = "lz4", **finish) -> Path:
    studies = list(studies)
    for number, first in enumerate(range(0, len(studies), per_shard)):
        with shards.ShardWriter(dir, number, codec) as writer:
            for one in studies[first : first + per_shard]:
                writer.add(one)
    shards.finish(dir, "tiny", **finish)
    return Path(dir)


class Counting(shards.Shards):
    """Counts the records that are read and how many at once."""

    def record(self, id):
        with LOCK:
            READ.append(id)
        return super().record(id)


READ: list[int] = []
LOCK = threading.Lock()


def open_dataset(dir) -> Counting:
    opened = shards.open_dataset(dir)
    return Counting(opened.dir, opened.manifest, opened.index)
