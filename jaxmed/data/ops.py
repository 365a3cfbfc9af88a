"""Transforms of volumes, in numpy and scipy only, so that any worker process or loader thread can call them.

Every function that changes the voxel grid returns `(voxels, to_old)`: `to_old` is a (4, 4) float64 matrix that takes an
index (d, h, w, 1) of the new grid to the (fractional) index of the old one. Grids chain by matrix products, the affine
of a result is `affine_of_the_source @ to_old`, and `back_to_source` writes a map back into the scan's own grid.

Interpolation is half-pixel: index i covers [i, i + 1) of the old width, `old = (new + 0.5) * n_old / n_new - 0.5`,
clamped at the borders, never antialiased (what torch calls align_corners=False). Sources: HLIP preparation scripts
(chest CT, raw brain MRI, brain evaluation); pinned by the goldens of kind `prep_*` and `scan_sampling`.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

CODES = "RLAPSI"  # a letter is the direction in which the index grows; pairs are opposite ends of one axis of RAS+
# Mean of the three ImageNet channel means and deviations: what HLIP normalises unit-range voxels with.
PIXEL_MEAN, PIXEL_STD = 0.449, 0.226


def shift(offset: Sequence[float]) -> np.ndarray:
    """(4, 4): index i of the new grid is index i + offset of the old one."""
    to_old = np.eye(4)
    to_old[:3, 3] = offset
    return to_old


def zoom(old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """(4, 4) of a half-pixel resize from shape `old` to shape `new`."""
    scale = np.asarray(old, np.float64) / np.asarray(new, np.float64)
    to_old = np.diag([*scale, 1.0])
    to_old[:3, 3] = 0.5 * scale - 0.5
    return to_old


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """(3,) millimetres between neighbours along d, h, w (along the sheared slice axis if the grid is tilted)."""
    return np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)


# Intensities.


def unit_range(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of [low, high] to [0, 1], clipped; float32."""
    x = np.clip(np.asarray(x, np.float32), np.float32(low), np.float32(high))
    return (x - np.float32(low)) / np.float32(high - low)


def standardise(unit: np.ndarray, mean: float = PIXEL_MEAN, std: float = PIXEL_STD) -> np.ndarray:
    """(unit - mean) / std in float32."""
    return (np.asarray(unit, np.float32) - np.float32(mean)) / np.float32(std)


def window_uint8(hu: np.ndarray, level: float, width: float) -> np.ndarray:
    """A CT window: HU level - width/2 .. level + width/2 to 0..255, rounded."""
    return np.rint(unit_range(hu, level - width / 2, level + width / 2) * np.float32(255)).astype(np.uint8)


def percentile_unit(x: np.ndarray, low: float = 0.5, high: float = 99.5) -> np.ndarray:
    """Clips to two percentiles of the whole volume, then min-max with 1e-8 in the denominator.

    Float32 input is processed in float32, where the 1e-8 vanishes and the top is exactly 1. Integer input is processed
    in float64, where it does not, so that the top stays below 1: the reference has this quirk and trained with it.

    Returns:
      float32 for float32 input, else float64, in [0, 1].
    """
    bounds = np.percentile(x, (low, high))
    if np.asarray(x).dtype == np.float32:
        bounds = bounds.astype(np.float32)
    x = np.clip(x, bounds[0], bounds[1])
    bottom, top = x.min(), x.max()
    return (x - bottom) / (top - bottom + x.dtype.type(1e-8))


def truncate_uint8(unit: np.ndarray) -> np.ndarray:
    """Unit range to 0..255 without rounding, as stored by the reference (top 255 for floats, 254 for integers)."""
    return (unit * unit.dtype.type(255)).astype(np.uint8)


# Grids.


def axis_codes(affine: np.ndarray) -> str:
    """Three letters of `CODES`: the nearest anatomical direction of the d, h and w axis, e.g. "IPR".

    The largest direction cosine is served first; of equal ones the last in the order (x, y, z), then (d, h, w).
    """
    directions = np.asarray(affine, np.float64)[:3, :3]
    cosines = directions / np.linalg.norm(directions, axis=0)
    open_cells = np.ones((3, 3), bool)
    codes = [""] * 3
    for _ in range(3):
        flat = np.where(open_cells, np.abs(cosines), -1.0).ravel()
        world, axis = divmod(8 - int(np.argmax(flat[::-1])), 3)
        open_cells[world], open_cells[:, axis] = False, False
        codes[axis] = CODES[2 * world + int(cosines[world, axis] < 0)]
    return "".join(codes)


def reorient(x: np.ndarray, affine: np.ndarray, axes: str, slice_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Permutes and flips so that d, h, w grow towards the three letters of `axes`; nothing is interpolated.

    "IPR" is the order of the reference's brain scans: head to foot, front to back, left to right.

    Args:
      x: (d, h, w), or (d, h, w, c).
      affine: (4, 4) index -> RAS+ mm.
      axes: three of R/L, A/P, S/I.
      slice_first: then move the axis with the largest spacing to the front; of equal ones the first.
    """
    have = axis_codes(affine)
    order, flips = [], []
    for letter in axes:
        pair = CODES.index(letter) // 2
        source = next(i for i, h in enumerate(have) if CODES.index(h) // 2 == pair)
        order.append(source)
        flips.append(have[source] != letter)
    if slice_first:
        # Rounded: spacings that differ by the noise of a header are equal.
        front = int(np.argmax(np.round(spacing_of(affine)[order], 4)))
        order.insert(0, order.pop(front))
        flips.insert(0, flips.pop(front))
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips)):
        to_old[old, new] = -1 if flip else 1
        to_old[old, 3] = x.shape[old] - 1 if flip else 0
    x = x.transpose(*order, *range(3, x.ndim))
    return np.ascontiguousarray(x[tuple(slice(None, None, -1 if f else None) for f in flips)]), to_old


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index and weight of the upper one (float32) for every new index."""
    # One rounding at the end, as with the fused multiply-add of the reference's CPU kernels: at pixel 400 a second
    # rounding already moves the weights by 1e-5.
    scale = np.float64(np.float32(old) / np.float32(new))
    at = np.maximum((scale * (np.arange(new) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    low = np.minimum(at.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), np.minimum(at - low.astype(np.float32), np.float32(1))


def resize(x: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear, half-pixel, no antialias; bilinear if the depth stays.

    Works slice by slice: besides input and output only a few slices are in memory.

    Args:
      x: (d, h, w) of any real dtype.
      size: new (d, h, w), each at least 1.

    Returns:
      float32 volume, to_old.
    """
    size = tuple(int(n) for n in size)
    taps = [_taps(o, n) if o != n else None for o, n in zip(x.shape, size)]
    out = np.empty(size, np.float32)
    for i in range(size[0]):
        if taps[0] is None:
            plane = x[i].astype(np.float32)
        else:
            low, high, w = (t[i] for t in taps[0])
            plane = x[low].astype(np.float32)
            if w > 0:
                plane = plane * (np.float32(1) - w) + x[high].astype(np.float32) * w
        if taps[1] is not None:
            low, high, w = taps[1]
            plane = plane[low] * (np.float32(1) - w)[:, None] + plane[high] * w[:, None]
        if taps[2] is not None:
            low, high, w = taps[2]
            plane = np.take(plane, low, axis=1) * (np.float32(1) - w) + np.take(plane, high, axis=1) * w
        out[i] = plane
    return out, zoom(x.shape, size)


def resize_depth(x: np.ndarray, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest-exact along the first axis: slice floor((i + 0.5) * d / slices). Keeps the dtype."""
    scale = np.float32(x.shape[0]) / np.float32(slices)
    at = np.floor((np.arange(slices, dtype=np.float32) + np.float32(0.5)) * scale).astype(np.int64)
    return x[np.minimum(at, x.shape[0] - 1)], zoom(x.shape, (slices, *x.shape[1:]))


def resample(x: np.ndarray, spacing: Sequence[float], target: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """To `target` mm per voxel: new size int(n * spacing / target), truncated and at least 1, then `resize`."""
    size = [max(1, int(n * s / t)) for n, s, t in zip(x.shape, spacing, target)]
    return resize(x, size)


def center_offset(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """First kept index per axis: padding is centred with the odd voxel at the end, the crop offset floors."""
    return [-((n - o) // 2) if n >= o else (o - n) // 2 for o, n in zip(old, new)]


def pad_crop(x: np.ndarray, size: Sequence[int], fill: float, offset: Sequence[int] | None = None):
    """Pads with `fill` and crops to `size`; new index i is old index i + offset (default: `center_offset`).

    Returns:
      voxels of the same dtype, to_old.
    """
    offset = center_offset(x.shape, size) if offset is None else offset
    out = np.full(tuple(size), fill, x.dtype)
    inside = [(max(0, -o), min(n, m - o)) for o, n, m in zip(offset, size, x.shape)]
    if all(a < b for a, b in inside):
        target = tuple(slice(a, b) for a, b in inside)
        source = tuple(slice(a + o, b + o) for (a, b), o in zip(inside, offset))
        out[target] = x[source]
    return out, shift(offset)


def pad_square(x: np.ndarray, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Pads the shorter in-plane side to the longer one, centred, the odd pixel at the right or bottom."""
    side = max(x.shape[1:])
    return pad_crop(x, (x.shape[0], side, side), fill)


def slice_grid(
    x: np.ndarray, *, resize_to: int, slices: int, crop: int, fill: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The brain grid: pad to a square, bilinear in-plane, nearest-exact along depth, centre crop in-plane.

    Args:
      x: (d, h, w).
      resize_to: in-plane side after the resize, 0 = keep the scan's own pixels.
      slices: depth, 0 = keep the scan's own slices.
      crop: in-plane side at the end, 0 = no crop (then a scan that is not resized is not padded to a square either).
      fill: value outside of the scan.

    Returns:
      float32 volume, to_old.
    """
    to_old = np.eye(4)
    slices = slices or x.shape[0]
    if slices < x.shape[0]:  # dropping slices first is the same and cheaper
        x, step = resize_depth(x, slices)
        to_old = to_old @ step
    x = np.asarray(x, np.float32)
    if resize_to:
        x, step = pad_square(x, fill)
        to_old = to_old @ step
        x, step = resize(x, (x.shape[0], resize_to, resize_to))
        to_old = to_old @ step
    if crop:
        x, step = pad_crop(x, (x.shape[0], crop, crop), fill)
        to_old = to_old @ step
    if slices > x.shape[0]:
        x, step = resize_depth(x, slices)
        to_old = to_old @ step
    return x, to_old


def deskew(x: np.ndarray, affine: np.ndarray, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Resamples a sheared grid (gantry tilt) to an orthogonal one that holds all of it.

    The w axis and the plane of the slices stay; the slice step is kept along the slice normal.

    Returns:
      float32 volume, to_old.
    """
    affine = np.asarray(affine, np.float64)
    columns = affine[:3, :3]
    w_axis = columns[:, 2] / np.linalg.norm(columns[:, 2])
    h_axis = columns[:, 1] - w_axis * (columns[:, 1] @ w_axis)
    h_step = np.linalg.norm(h_axis)
    h_axis = h_axis / h_step
    normal = np.cross(h_axis, w_axis)
    step = float(columns[:, 0] @ normal)
    new = np.eye(4)
    new[:3, :3] = np.stack([normal * step, h_axis * h_step, columns[:, 2]], axis=1)
    new[:3, 3] = affine[:3, 3]
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in x.shape], indexing="ij"), -1).reshape(-1, 3)
    corners = corners @ (np.linalg.inv(new) @ affine)[:3, :3].T
    low, high = np.floor(corners.min(0) + 1e-6), np.ceil(corners.max(0) - 1e-6)
    new = new @ shift(low)
    to_old = np.linalg.inv(affine) @ new
    out = _sample(x, to_old, tuple(int(n) for n in high - low + 1), fill, nearest=False)
    return out, to_old


# What to keep when the grid is smaller than the scan.


def body(hu: np.ndarray, air: float = -500.0) -> np.ndarray:
    """Mask of the largest thing denser than air with what each slice encloses: skin, everything inside, lungs."""
    dense = hu > air
    labels, count = ndimage.label(dense)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        dense = labels == int(np.argmax(sizes))
    return np.stack([ndimage.binary_fill_holes(s) for s in dense])


def lungs(hu: np.ndarray, air: float = -500.0) -> np.ndarray:
    """Mask of the large air spaces inside the body; those below a tenth of the largest (bowel, folds) are left out."""
    inside = body(hu, air) & (hu <= air)
    labels, count = ndimage.label(inside)
    if not count:
        return inside
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.isin(labels, np.flatnonzero(sizes >= max(1, sizes.max() // 10)))


def foreground_offset(mask: np.ndarray, size: Sequence[int], shape: Sequence[int] | None = None) -> list[int]:
    """Offsets for `pad_crop` that keep most of a mask: per axis the window with the largest count, ties in the middle.

    Args:
      mask: (d, h, w) of bool, may be coarser than the volume.
      size: of the crop, in voxels of the volume.
      shape: of the volume, default that of the mask.
    """
    shape = mask.shape if shape is None else shape
    offset = center_offset(shape, size)
    for axis, (n, m) in enumerate(zip(shape, size)):
        profile = mask.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.int64)
        if n <= m or not profile.any():
            continue
        at = np.minimum(np.arange(n) * len(profile) // n, len(profile) - 1)
        total = np.concatenate([[0], np.cumsum(profile[at])])
        kept = total[m:] - total[:-m]
        best = np.flatnonzero(kept == kept.max())
        # Equally good windows lie side by side unless the mask has gaps: then the run nearest to the middle.
        runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
        middles = [int(r[0] + r[-1]) // 2 for r in runs]
        offset[axis] = min(middles, key=lambda o: (abs(o - offset[axis]), o))
    return offset


def chest_offset(hu: np.ndarray, size: Sequence[int], foreground: str = "lungs", stride: int = 4) -> list[int]:
    """Where a chest CT is cropped: around the lungs, or the body if there are none ("body": always the body)."""
    coarse = np.ascontiguousarray(hu[:, ::stride, ::stride])
    mask = lungs(coarse) if foreground == "lungs" else body(coarse)
    if foreground == "lungs" and mask.mean() < 0.005:
        mask = body(coarse)
    return foreground_offset(mask, size, hu.shape)


# Back.


def _sample(x: np.ndarray, to_x: np.ndarray, shape: Sequence[int], fill: float, nearest: bool) -> np.ndarray:
    """`x` at index `to_x @ i` for every i of `shape`; `fill` beyond the outer faces of its voxels.

    Trilinear to float32, or nearest in the dtype of `x`.
    """
    # Snapped: a permutation that went through floats must stay one, or every value would be a mix of two.
    matrix = np.round(np.asarray(to_x, np.float64), 9)
    x = np.asarray(x) if nearest else np.asarray(x, np.float32)
    out = np.empty(tuple(shape), x.dtype)
    h, w = (np.arange(n, dtype=np.float64) for n in shape[1:])
    plane = matrix[:3, 1, None, None] * h[:, None] + matrix[:3, 2, None, None] * w + matrix[:3, 3, None, None]
    last = np.array(x.shape)[:, None, None] - 1
    for i in range(shape[0]):
        at = plane + matrix[:3, 0, None, None] * i
        if nearest:
            values = x[tuple(np.clip(np.floor(at + 0.5).astype(np.int64), 0, last))]
        else:
            values = ndimage.map_coordinates(x, at, order=1, mode="nearest")
        inside = np.all((at >= -0.5 - 1e-6) & (at <= last + 0.5 + 1e-6), axis=0)
        out[i] = np.where(inside, values, x.dtype.type(fill))
    return out


def back_to_source(
    values: np.ndarray,
    affine: np.ndarray,
    source_affine: np.ndarray,
    source_shape: Sequence[int],
    *,
    fill: float = 0.0,
    nearest: bool = False,
) -> np.ndarray:
    """A map on the stored grid (heat map, mask) in the grid of the scan as it was acquired.

    Args:
      values: (d, h, w) on the stored grid; a map on a coarser grid of the same extent is `resize`d to it first.
      affine: (4, 4) of the stored grid, as in the record.
      source_affine, source_shape: of the scan's own array, as in the record.
      fill: where the stored grid does not reach (cropped away).
      nearest: for masks and labels; else trilinear.

    Returns:
      float32 of `source_shape`; with `nearest` in the dtype of `values`.
    """
    to_stored = np.linalg.inv(np.asarray(affine, np.float64)) @ np.asarray(source_affine, np.float64)
    return _sample(values, to_stored, source_shape, fill, nearest)


def scan_indices(count: int, num_scans: int, how: str = "train") -> np.ndarray:
    """Which scans of a (permuted) study of `count` are used when every study must have the same number.

    Args:
      count: scans of the study, at least 1.
      num_scans: wanted number.
      how: "train" repeats the list ceil(num_scans / count) times and truncates; "eval_main" does not truncate;
        "eval_newer" uses every scan once.

    Returns:
      int64 indices into the list.
    """
    if how not in ("train", "eval_main", "eval_newer"):
        raise ValueError(f"how={how!r}: 'train', 'eval_main' or 'eval_newer'")
    repeats = 1 if how == "eval_newer" else -(-num_scans // count)
    indices = np.tile(np.arange(count, dtype=np.int64), repeats)
    return indices[:num_scans] if how == "train" else indices
