"""Example studies for reports: a few slices of every scan, as small arrays in one file.

`examples.npz` has "about" (JSON: name of the dataset, is it synthetic, and "studies", each with key, sentences, labels
and scans), and for scan s of study e "image/e/s" (slices, h, w) uint8 and, where the record's meta has a mask
("mask_runs"), "mask/e/s" (bool).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.core.files import write_arrays
from jaxmed.data import intensity
from jaxmed.data.masks import from_runs
from jaxmed.data.shards import Dataset

NAME = "examples.npz"
RADIOGRAPH = 384


def to_gray(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """To uint8, `low` black and `high` white."""
    return (np.clip((x.astype(np.float32) - low) / max(high - low, 1e-8), 0, 1) * 255).astype(np.uint8)


def slices_of(scan: dict[str, Any], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`count` slices of a scan as uint8 (slices, h, w), and its mask there; centred on the mask's largest slice.

    Of a radiograph one picture, windowed and inverted as its meta says, at most `RADIOGRAPH` pixels on a side.
    """
    if scan["meta"].get("planar") and "range" in scan["meta"]:  # a radiograph as prep stores it
        return intensity.thumbnail(scan["voxels"][0], scan["meta"], RADIOGRAPH)[0][None], None
    voxels = scan["voxels"] if scan["voxels"].ndim == 3 else scan["voxels"][..., 0]
    depth, mask = len(voxels), None
    middle = depth // 2
    if "mask_runs" in scan["meta"]:
        mask = from_runs(scan["meta"]["mask_runs"], voxels.shape)
        middle = int(mask.sum((1, 2)).argmax())
    step = max(depth // 8, 1)
    at = np.clip(middle + step * (np.arange(count) - count // 2), 0, depth - 1)
    if voxels.dtype == np.uint8:
        image = voxels[at]
    else:
        image = to_gray(voxels[at], *np.percentile(voxels, (0.5, 99.5)))
    return image, None if mask is None else mask[at]


def collect(dataset: Dataset, ids: Sequence[int], *, slices: int = 3, scans: int = 6) -> dict[str, np.ndarray]:
    """The content of `examples.npz` for these records."""
    about, arrays = [], {}
    for e, id in enumerate(ids):
        study = dataset.record(int(id)).study()
        entry = {k: study[k] for k in ("key", "sentences", "labels", "split")} | {"id": int(id), "scans": []}
        for s, scan in enumerate(study["scans"][:scans]):
            image, mask = slices_of(scan, slices)
            arrays[f"image/{e}/{s}"] = image
            if mask is not None:
                arrays[f"mask/{e}/{s}"] = mask
            meta = {k: v for k, v in scan["meta"].items() if isinstance(v, int | float | str)}
            entry["scans"].append({"name": scan["name"], "shape": list(scan["voxels"].shape), "meta": meta})
        about.append(entry)
    synthetic = bool(dataset.manifest["recipe"].get("synthetic", False))
    text = json.dumps({"dataset": dataset.name, "synthetic": synthetic, "studies": about})
    return {"about": np.array(text), **arrays}


def save(outdir: Path, dataset: Dataset, ids: Sequence[int]) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    write_arrays(outdir / NAME, collect(dataset, ids), compressed=True)
