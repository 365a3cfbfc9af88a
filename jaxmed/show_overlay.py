"""Heat maps over the slices of a study, as one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxmed.data import ops
from jaxmed.evals import relevance

OPPOSITE = dict(zip("RLAPSI", "LRPAIS"))
SLICES = 5
ROWS = 10  # scans shown; those with the highest relevance
ALPHA = 0.5


def overlay(
    path: Path, scans: Sequence[Mapping[str, Any]], maps: Sequence[Float[np.ndarray, "d h w"]], title: str
) -> None:
    """Writes the picture: a row per scan, `SLICES` of its slices, the one with the highest relevance among them.

    Every slice is scaled to its own range and what is below a quarter of it is hidden (see `relevance.to_show`), so
    colours compare places within a slice; the number above a slice is its share of the largest value of the study.

    Args:
      scans: with "voxels" (d, h, w), "affine" and "name", on the grid that the model saw.
      maps: relevance per voxel of each.
    """
    order = sorted(range(len(scans)), key=lambda i: -float(maps[i].max()))[:ROWS]
    top = max((float(m.max()) for m in maps), default=0.0) or 1.0
    figure = Figure(figsize=(2.1 * SLICES + 0.3, 2.35 * len(order) + 0.5), layout="constrained", facecolor="black")
    axes = figure.subplots(len(order), SLICES, squeeze=False)
    for row, i in enumerate(sorted(order)):
        voxels, spacing, codes = (
            scans[i]["voxels"],
            ops.spacing_of(scans[i]["affine"]),
            ops.axis_codes(scans[i]["affine"]),
        )
        scaled, shown = relevance.to_show(maps[i])
        for column, axis in enumerate(axes[row]):
            axis.set_axis_off()
            chosen = _slices(maps[i])
            if column >= len(chosen):
                continue
            k = chosen[column]
            axis.imshow(_blend(voxels[k], scaled[k], shown[k]), aspect=spacing[1] / spacing[2], interpolation="nearest")
            share = float(maps[i][k].max()) / top
            axis.set_title(f"slice {k + 1}: {100 * share:.0f} %", fontsize=8, color="white", pad=2)
            if column == 0:
                axis.text(0.02, 0.02, f"{i} {scans[i]['name']}", transform=axis.transAxes, color="yellow", fontsize=9)
                for x, y, letter in (
                    (0.02, 0.5, OPPOSITE[codes[2]]),
                    (0.93, 0.5, codes[2]),
                    (0.5, 0.93, OPPOSITE[codes[1]]),
                ):
                    axis.text(x, y, letter, transform=axis.transAxes, color="white", fontsize=8)
    figure.suptitle(title, fontsize=11, color="white")
    figure.savefig(path, format="png", dpi=96, facecolor="black")


def _slices(voxels: Float[np.ndarray, "d h w"]) -> list[int]:
    """The slice with the highest relevance, and others evenly over the scan."""
    d = len(voxels)
    best = int(voxels.max(axis=(1, 2)).argmax())
    even = np.unique(((np.arange(SLICES) + 0.5) * d / SLICES).astype(int)).tolist()
    if best not in even:
        even[int(np.argmin([abs(k - best) for k in even]))] = best
    return sorted(even)


def _blend(gray: np.ndarray, heat: np.ndarray, shown: np.ndarray) -> np.ndarray:
    low, high = np.percentile(gray, (1, 99.5))
    base = np.clip((gray.astype(np.float32) - low) / max(float(high - low), 1e-6), 0, 1)[..., None].repeat(3, -1)
    colour = colormaps["jet"](heat)[..., :3]
    return np.where(shown[..., None], (1 - ALPHA) * base + ALPHA * colour, base)
