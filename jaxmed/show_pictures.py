"""Pictures for `show`: arrays and curves to PNG bytes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib import image as matplotlib_image
from matplotlib.figure import Figure
from scipy import ndimage

Array = np.ndarray
OUTLINE = (255, 64, 64)


def png(rgb: UInt8[Array, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    matplotlib_image.imsave(buffer, rgb, format="png")
    return buffer.getvalue()


def outlined(gray: UInt8[Array, "h w"], mask: Bool[Array, "h w"] | None, zoom: int) -> UInt8[Array, "hz wz 3"]:
    """A slice, enlarged, with the outline of a mask in red."""
    big = np.repeat(np.repeat(gray, zoom, 0), zoom, 1)
    rgb = np.repeat(big[..., None], 3, axis=-1)
    if mask is not None and mask.any():
        inside = np.repeat(np.repeat(mask, zoom, 0), zoom, 1)
        rgb[ndimage.binary_dilation(inside) & ~inside] = OUTLINE
    return rgb


def strip(slices: UInt8[Array, "n h w"], masks: Bool[Array, "n h w"] | None, height: int = 128) -> Array:
    """Slices of one scan side by side, each about `height` pixels high."""
    zoom = max(height // slices.shape[1], 1)
    parts = [outlined(x, None if masks is None else masks[i], zoom) for i, x in enumerate(slices)]
    gap = np.full((parts[0].shape[0], 2, 3), 255, np.uint8)
    return np.concatenate([y for x in parts for y in (x, gap)][:-1], axis=1)


def stack(rows: Sequence[Array], gap: int = 4) -> UInt8[Array, "h w 3"]:
    """Pictures under each other on white."""
    width = max(r.shape[1] for r in rows)
    out = []
    for r in rows:
        out.append(np.pad(r, ((0, gap), (0, width - r.shape[1]), (0, 0)), constant_values=255))
    return np.concatenate(out)


def curves(lines: Sequence[Mapping[str, float]], panels: Mapping[str, Sequence[str]]) -> bytes:
    """One panel per entry: title -> metric names, over the step."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    for i, (title, names) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, i + 1)
        for name in names:
            points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
            axis.plot(*zip(*points), marker="o" if len(points) < 20 else None, markersize=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1 or names[0] != title:
            axis.legend(fontsize=7)
    return _save(figure)


def bars(names: Sequence[str], values: Mapping[str, Sequence[float]], truth: Sequence[float]) -> bytes:
    """Scores of one study per class, one colour per evaluation; the true classes are bold."""
    figure = Figure(figsize=(3.4, 0.32 * len(names) * len(values) + 0.5), layout="constrained")
    axis = figure.add_subplot()
    height = 0.8 / len(values)
    for i, (label, scores) in enumerate(values.items()):
        at = np.arange(len(names)) + (i - (len(values) - 1) / 2) * height
        axis.barh(at, scores, height, label=label, color=("#b0b7c3", "#2f6fde")[min(i + 2 - len(values), 1)])
    axis.set_yticks(np.arange(len(names)), names, fontsize=8)
    for tick, right in zip(axis.get_yticklabels(), truth):
        tick.set_fontweight("bold" if right > 0.5 else "normal")
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    if min(min(v) for v in values.values()) >= 0:
        axis.set_xlim(0, 1)
    axis.legend(fontsize=7, loc="lower right")
    return _save(figure)


def _save(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=96)
    return buffer.getvalue()
