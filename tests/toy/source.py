"""Small studies whose report and voxels share one number."""

from pathlib import Path

import numpy as np

from jaxmed.core.rng import np_rng
from jaxmed.data import shards


def make(dir: str, *, studies: int = 24, seed: int = 0) -> None:
    if (Path(dir) / "dataset.json").exists():
        return
    with shards.ShardWriter(dir, 0) as writer:
        for i in range(studies):
            rng = np_rng(seed, i)
            level = int(rng.integers(0, 200))
            scans = [
                {
                    "voxels": (level + rng.integers(0, 50, (int(rng.integers(2, 5)), 8, 8))).astype(np.uint8),
                    "affine": np.eye(4),
                    "source_affine": np.eye(4),
                    "source_shape": (4, 8, 8),
                    "name": "toy",
                    "meta": {},
                }
                for _ in range(int(rng.integers(1, 4)))
            ]
            writer.add(
                {
                    "key": f"study{i:03d}",
                    "patient": f"patient{i:03d}",
                    "scans": scans,
                    "sentences": [f"level {level}."],
                    "labels": {"bright": float(level > 100)},
                    "split": "train" if i % 4 else "test",
                }
            )
    shards.finish(dir, "toy", recipe={"name": "toy", "value_range": [0, 255]}, classes=["bright"])
