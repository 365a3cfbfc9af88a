"""From what lies in the way of X-rays to stored pixels: light, noise, collimator, grey scale of synthetic radiographs.

Nothing here knows what is on the picture, so nothing of it tells.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from jaxmed.data import intensity

Array = np.ndarray

# The letters of side markers, in lead.
_GLYPHS = {"L": ("#..", "#..", "#..", "#..", "###"), "R": ("##.", "#.#", "##.", "#.#", "#.#")}


def stored(
    rng: np.random.Generator,
    mass: Float[Array, "h w"],
    pixel: float,
    region: str,
    view: str,
    *,
    noise: tuple[float, float],
    collimated: float,
    monochrome1: float,
) -> dict[str, Any]:
    """Absorption to the stored values of some machine, with what a header would say of them.

    Args:
      mass: absorption along the ray of each pixel.
      pixel: mm.
      noise, collimated, monochrome1: see `phantom_radiographs.Config`.

    Returns:
      A scan as in `data.record`, (1, h, w) uint16, with a meta as `prep --recipe=radiograph` writes it.
    """
    h, w = mass.shape
    mass = ndimage.gaussian_filter(mass, rng.uniform(0.4, 0.9))
    _mark(rng, mass)
    quanta = np.float32(10 ** rng.uniform(*noise))
    light = np.exp(-mass)
    light = light + np.float32(rng.uniform(0.02, 0.12)) * light.mean()  # scatter
    ramp = 1 + 0.15 * rng.normal(0, 1, 2).clip(-1.5, 1.5)[:, None] * np.linspace(-1, 1, 2)[None]  # heel effect
    light *= np.linspace(*ramp[0], h, dtype=np.float32)[:, None] * np.linspace(*ramp[1], w, dtype=np.float32)[None]
    field, black = _field(rng, (h, w), collimated)
    if field is not None and not black:
        light = np.where(field, light, np.float32(0.004) + np.float32(0.02) * light)
    counts = quanta * light
    counts = np.maximum(counts + np.sqrt(counts) * rng.standard_normal(mass.shape, np.float32), 0.5)
    signal = np.log(quanta) - np.log(counts)  # dense is large
    exposed = signal.ravel() if field is None else signal[field]
    low, high = np.percentile(exposed[::5], (1, 99))
    share = (signal - low) / max(high - low, 1e-3)
    share = np.clip(share, -0.5, 1.6)
    share = np.sign(share) * np.abs(share) ** np.float32(np.exp(rng.normal(0, 0.35)))
    bits = int(rng.choice((10, 12, 12, 15)))
    top = (1 << bits) - 1
    base, span = rng.uniform(0.1, 0.3), rng.uniform(0.35, 0.55)
    values = np.clip(np.rint(top * (base + span * share)), 1, top).astype(np.uint16)
    inverted = rng.random() < monochrome1
    voxels = (top - values).astype(np.uint16) if inverted else values
    if field is not None and black:
        voxels[~field] = top if inverted else 0
    meta = {"kind": "phantom", "planar": True, "modality": "DX", "bits": bits, "region": region, "view": view}
    meta |= {"photometric": "MONOCHROME1" if inverted else "MONOCHROME2", "pixel_mm": [round(pixel, 4)] * 2}
    meta["range"] = [int(voxels.min()), int(voxels.max())]
    inside = voxels if field is None else voxels[field]
    meta["percentiles"] = list(intensity.histogram_percentiles(np.bincount(inside.ravel(), minlength=65536), meta))
    if field is not None:
        rows, columns = np.flatnonzero(field.any(1)), np.flatnonzero(field.any(0))
        meta |= {"box": [int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1], "box_from": "header"}
    if rng.random() < 0.7:
        ends = np.array(meta["percentiles"]) + rng.normal(0, 0.12, 2) * np.ptp(meta["percentiles"])
        function = str(rng.choice(intensity.WINDOW_FUNCTIONS))
        meta["windows"] = [[round(float(ends.mean()), 1), round(max(float(np.ptp(ends)), 8.0), 1)]]
        meta["window_function"] = function
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.diag([1.0, pixel, pixel, 1.0])[[2, 1, 0, 3]]
    return {"voxels": voxels[None], "affine": affine, "name": "dx", "meta": meta}


def _mark(rng: np.random.Generator, mass: Array) -> None:
    """A lead letter near a corner."""
    if rng.random() < 0.5:
        glyph = np.array([[c == "#" for c in row] for row in _GLYPHS["LR"[int(rng.integers(2))]]], np.float32)
        glyph = glyph.repeat(3, 0).repeat(3, 1)
        r, c = (int(rng.integers(4, max(5, n // 6))) for n in mass.shape)
        r, c = (n - 24 - v if rng.random() < 0.5 else v for n, v in zip(mass.shape, (r, c)))
        mass[r : r + glyph.shape[0], c : c + glyph.shape[1]] += 2.5 * glyph


def _field(
    rng: np.random.Generator, shape: tuple[int, int], collimated: float
) -> tuple[Bool[Array, "h w"] | None, bool]:
    """The collimated field (None: the whole picture), and whether a shutter blackens what lies outside."""
    if rng.random() >= collimated:
        return None, False
    h, w = shape
    sides = rng.uniform(0.0, 0.2, 4) * (rng.random(4) < 0.7)
    angle = np.radians(rng.uniform(-6, 6)) if rng.random() < 0.4 else 0.0
    v, u = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j].astype(np.float32)
    x, y = (
        u * np.float32(np.cos(angle)) - v * np.float32(np.sin(angle) * h / w),
        v + u * np.float32(np.sin(angle) * w / h),
    )
    field = (
        (y > -1.05 + 2 * sides[0]) & (y < 1.05 - 2 * sides[1]) & (x > -1.05 + 2 * sides[2]) & (x < 1.05 - 2 * sides[3])
    )
    return (None, False) if field.all() else (field, rng.random() < 0.6)
