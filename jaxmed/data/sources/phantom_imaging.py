"""Synthetic scans of phantom heads: MR contrasts by the signal equations, CT in Hounsfield units.

A scan is the head's material times the signal of each material, averaged over thick slices of one of three
orientations, then spoiled as scanners do: uneven sensitivity, noise, motion, unknown gain.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from jaxmed.data.masks import to_runs
from jaxmed.data.sources.phantom_anatomy import LESION_PARTS, TISSUES, Head, smooth_field

Array = np.ndarray

SEQUENCES = ("t1w", "t1c", "t2w", "flair", "pd", "ct")
PLANES = ("axial", "sagittal", "coronal")

# T1 (ms), T2 (ms), proton density, contrast uptake (1/s), Hounsfield units; rounded values for 1.5 tesla. Fat has the
# long T2 that it seems to have in fast spin echo.
MATERIALS: dict[str, tuple[float, float, float, float, float]] = {
    "grey": (1000, 95, 0.82, 0.05, 38),
    "white": (680, 78, 0.70, 0.03, 29),
    "csf": (4000, 1500, 1.00, 0.0, 6),
    "bone": (400, 6, 0.10, 0.0, 900),
    "fat": (280, 180, 0.95, 0.0, -80),
    "muscle": (900, 45, 0.80, 0.3, 55),
    "fluid": (3500, 900, 1.00, 0.0, 8),
    "mucosa": (1500, 200, 0.90, 1.2, 30),
    "vessel": (1300, 25, 0.60, 3.0, 45),
    "calcium": (900, 30, 0.30, 0.0, 130),
    "clot": (850, 32, 0.85, 0.0, 75),
    "old_clot": (380, 120, 0.90, 0.0, 62),
    "ischemia": (1500, 190, 0.97, 0.05, 14),
    "oedema": (1250, 145, 0.92, 0.05, 20),
    "solid": (1200, 105, 0.88, 5.0, 50),
    "necrosis": (2400, 320, 0.97, 0.0, 14),
}
_TABLE = np.array([MATERIALS[m] for m in (*TISSUES, *LESION_PARTS)], np.float64).T
_GREY, _WHITE, _CSF = (TISSUES.index(k) for k in ("grey", "white", "csf"))
_BRAIN_WINDOW = (0.0, 80.0)  # HU: level 40, width 80


def signals(rng: np.random.Generator, sequence: str) -> Float[Array, "materials"]:
    """The signal of every material (`TISSUES`, then `LESION_PARTS`; air is 0) with a protocol near the usual one.

    MR is in arbitrary units; "ct" is HU + 1000.
    """
    t1, t2, density, uptake, hu = _TABLE

    def about(value, spread=0.1):
        return value * np.exp(rng.normal(0, spread))

    # Materials differ a little between people too.
    t1, t2 = t1 * np.exp(rng.normal(0, 0.04, t1.shape)), t2 * np.exp(rng.normal(0, 0.05, t2.shape))
    if sequence == "ct":
        return hu + rng.normal(0, 1.5, hu.shape) + 1000
    if sequence == "flair":
        tr, te, ti = about(9000, 0.05), about(110), 2450 * (1 + rng.normal(0, 0.02))
        return density * np.abs(1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)
    tr, te = {"t1w": (550, 12), "t1c": (550, 12), "t2w": (4500, 100), "pd": (2600, 20)}[sequence]
    if sequence == "t1c":
        t1 = 1 / (1 / t1 + about(1.0) * uptake / 1000)
    return density * (1 - np.exp(-about(tr) / t1)) * np.exp(-about(te) / t2)


def material_volumes(head: Head, values: Float[Array, "n materials"]) -> Float[Array, "n x y z"]:
    """Signal on the head's grid for n scans at once: tissue first, lesion parts painted over it in order."""
    base = values[:, : len(TISSUES)].astype(np.float32) @ head.tissue.reshape(len(TISSUES), -1)
    volumes = base.reshape(len(values), *head.tissue.shape[1:])
    for part in head.parts:
        signal = values[:, len(TISSUES) + LESION_PARTS.index(part.material)].astype(np.float32)
        at = (slice(None), *part.box)
        volumes[at] += part.amount[None] * (signal[:, None, None, None] - volumes[at])
    return volumes


# ---- Geometry.


def geometry(
    rng: np.random.Generator, plane: str, depth: int, size: int, cover_mm: tuple[float, float], fov_mm: tuple
) -> tuple[Float[Array, "4 4"], float, float]:
    """A scan's affine, from index (d, h, w, 1) to head coordinates; its slice and pixel spacing in mm.

    Axes are ordered as the brain recipe stores them (right-increasing, front to back, head to foot), with the slice
    axis moved to the front.
    """
    pixel = rng.uniform(*fov_mm) / size
    spacing = rng.uniform(*cover_mm) / depth
    centre = np.array([0, -16, 14]) + rng.normal(0, (2, 4, 4))
    signs = {"x": (0, 1.0), "y": (1, -1.0), "z": (2, -1.0)}
    axes = {"axial": "zyx", "sagittal": "xzy", "coronal": "yzx"}[plane]
    affine = np.eye(4)
    affine[:3, :3] = 0
    shape = (depth, size, size)
    for k, name in enumerate(axes):
        axis, sign = signs[name]
        step = sign * (spacing if k == 0 else pixel)
        affine[axis, k] = step
        affine[axis, 3] = centre[axis] - step * (shape[k] - 1) / 2
    return affine, spacing, pixel


def resample(volume: Float[Array, "x y z"], head: Head, affine: Array, shape) -> Float[Array, "d h w"]:
    """Means over voxels (a triangle of at least the grid's step on every axis); air outside the head's box."""
    axes = [int(np.argmax(np.abs(affine[:3, k]))) for k in range(3)]
    result = volume.transpose(axes)
    for k, axis in enumerate(axes):
        at = affine[axis, 3] + affine[axis, k] * np.arange(shape[k])
        width = max(abs(affine[axis, k]), head.step)
        weights = np.maximum(1 - np.abs(at[:, None] - head.xyz[axis][None]) / width, 0)
        weights = (weights / np.maximum(weights.sum(1, keepdims=True), 0.5 * width / head.step)).astype(np.float32)
        result = np.moveaxis(np.tensordot(weights, result, axes=(1, k)), 0, k)
    return result


# ---- What scanners do to it.


def spoil(
    rng: np.random.Generator, clean: Float[Array, "d h w"], sequence: str, noise: float, motion: bool
) -> Float[Array, "d h w"]:
    """Adds coil sensitivity (MR), ghosts of a moving head, and noise of standard deviation `noise`."""
    image = clean
    if sequence != "ct":
        image = image * np.exp(np.float32(0.12) * smooth_field(rng, clean.shape, 4))
    if motion:
        shift, share = int(rng.integers(3, 7)), np.float32(rng.uniform(0.25, 0.4))
        ghost = 0.5 * (np.roll(image, shift, 1) + np.roll(image, -shift, 1))
        image = (1 - share) * ndimage.uniform_filter1d(image, 3, axis=1) + share * ghost
    noisy = image + noise * rng.standard_normal(image.shape, np.float32)
    return noisy if sequence == "ct" else np.abs(noisy)


def store(rng: np.random.Generator, image: Float[Array, "d h w"], sequence: str, grey: float) -> UInt8[Array, "d h w"]:
    """To uint8 as the brain recipe stores scans: clip to the 0.5 and 99.5 percentiles (CT: to a window), min-max.

    Before that an unknown gamma (MR) or window (CT) of spread `grey`, so that absolute grey values mean little.
    """
    if sequence == "ct":
        lo, hi = _BRAIN_WINDOW
        lo, hi = lo + rng.normal(0, 40 * grey), hi * np.exp(rng.normal(0, grey))
        unit = np.clip((image - 1000 - lo) / (hi - lo), 0, 1)
    else:
        lo, hi = np.percentile(image[:, ::2, ::2], (0.5, 99.5))
        unit = np.clip((image - lo) / max(hi - lo, 1e-8), 0, 1) ** np.float32(np.exp(rng.normal(0, grey)))
    return (unit * 255).astype(np.uint8)


def contrast(clean: Float[Array, "d h w"], mask: Array, brain: Array, noise: float) -> Mapping[str, float]:
    """How well a lesion stands out: |mean inside - mean of the brain around it| over the noise."""
    inside = mask > 0.5
    near, far = (ndimage.uniform_filter(inside.astype(np.float32), n) > 1e-4 for n in ((3, 3, 3), (5, 9, 9)))
    around = far & ~near & (brain > 0.7)
    if not inside.any() or not around.any():
        return {}
    difference = float(clean[inside].mean() - clean[around].mean())
    return {"contrast": round(difference, 4), "cnr": round(abs(difference) / noise, 2)}


def scan(
    rng: np.random.Generator,
    head: Head,
    volume: Float[Array, "x y z"],
    sequence: str,
    values: Float[Array, "materials"],
    lesion: Float[Array, "x y z"] | None,
    *,
    shape: tuple[int, int, int],
    plane: str,
    cover_mm: tuple[float, float],
    fov_mm: tuple[float, float],
    noise: tuple[float, float],
    grey: float,
    motion: bool,
    raw: bool = False,
) -> dict[str, Any]:
    """One scan: voxels uint8, affine in head coordinates, name, meta (plane, spacing, motion, lesion).

    Args:
      volume: its signal on the head's grid, and `values` the signal of the materials.
      lesion: mask on the head's grid, kept in meta as run lengths (`data.masks`); never part of the voxels.
      noise: range of the noise, as a share of white matter's signal (CT: of 29 HU).
      grey: see `store`.
      raw: voxels as a scanner gives them, int16 (CT in HU), instead of `store`d ones.
    """
    affine, spacing, pixel = geometry(rng, plane, shape[0], shape[1], cover_mm, fov_mm)
    clean = resample(volume, head, affine, shape)
    reference = 29.0 if sequence == "ct" else float(values[_WHITE])
    sigma = rng.uniform(*noise) * reference
    meta: dict[str, Any] = {"plane": plane, "slice_mm": round(spacing, 3), "pixel_mm": round(pixel, 3)}
    meta["motion"] = int(motion)
    if lesion is not None:
        mask = resample(lesion, head, affine, shape)
        brain = resample(head.tissue[_GREY] + head.tissue[_WHITE] + head.tissue[_CSF], head, affine, shape)
        meta["mask_runs"] = to_runs(mask > 0.5)
        meta |= contrast(clean, mask, brain, sigma)
    image = spoil(rng, clean, sequence, sigma, motion)
    if raw:
        voxels = np.rint(image - 1000 if sequence == "ct" else image * 2000).astype(np.int16)
    else:
        voxels = store(rng, image, sequence, grey)
    return {"voxels": voxels, "affine": affine, "name": sequence, "meta": meta}
