"""Stored pixel values of a radiograph to [0, 1], as one lookup table per image (numpy only; runs in loader threads).

Records hold radiographs as they were stored, in uint16, and beside them in the scan's meta the plain numbers that say
how to look at them (DICOM PS3.3 C.11.1 modality LUT, C.11.2 VOI LUT, C.7.6.3.1.2 photometric interpretation):

  offset          voxel = stored value + offset; above 0 where stored values are signed [0]
  range           (smallest, largest) voxel of the image
  photometric     "MONOCHROME1" (small values are shown bright) or "MONOCHROME2"
  modality_lut    {"first", "bits", "values"}: the value of stored values first, first + 1, ...; before and behind it
                  the nearest one
  rescale         (slope, intercept), where there is no modality_lut [(1, 0)]
  voi_lut         {"first", "bits", "values"} over what the modality transform gives
  windows         [(centre, width), ...], where there is no voi_lut; the first one that is valid counts
  window_function "LINEAR" [default], "LINEAR_EXACT" or "SIGMOID"
  percentiles     (0.5, 99.5) percentiles, after the modality transform, of the pixels inside the collimation; where
                  neither a voi_lut nor a window is given

All keys but `range` may be absent. PresentationLUTShape is no part of it: INVERSE says the same as MONOCHROME1, so
prep only reports where the two disagree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8, UInt16

Array = np.ndarray

VALUES = 65536
PERCENTILES = (0.5, 99.5)
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
INTENSITIES = ("voi", "percentiles", "reference")


def table(meta: Mapping[str, Any], *, intensity: str = "voi") -> UInt16[Array, "65536"]:
    """What every voxel value is shown as: 0 black, 65535 white. `table(meta)[voxels]` is the image.

    Args:
      meta: of the scan, see above.
      intensity: see `unit`.

    Raises:
      ValueError: unknown `intensity`.
    """
    return np.rint(unit(meta, intensity=intensity) * (VALUES - 1)).astype(np.uint16)


def unit(meta: Mapping[str, Any], *, intensity: str = "voi") -> Float64[Array, "65536"]:
    """`table` before it is rounded: values in [0, 1].

    Args:
      meta: of the scan, see above.
      intensity: "voi": modality transform, then VOI LUT, else window, else percentiles; inverted once for MONOCHROME1.
        "percentiles": the same without VOI LUT and windows, for archives whose windows are not to be trusted.
        "reference": the pipeline of the thesis that radiograph MAE comes from: no modality transform, no window;
        inverted by the maximum of the image for MONOCHROME1, then divided by the maximum.
        Where all pixels of an image are equal everything is 0 (the thesis: not-a-number).

    Raises:
      ValueError: unknown `intensity`.
    """
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity={intensity!r} is not known; use one of {', '.join(INTENSITIES)}")
    low, high = (int(v) for v in meta["range"])
    if low == high:
        return np.zeros(VALUES)
    stored = np.arange(VALUES, dtype=np.int64) - int(meta.get("offset", 0))
    inverted = meta.get("photometric") == "MONOCHROME1"
    if intensity == "reference":
        shown = (stored[high] - stored if inverted else stored).astype(np.float64)
        return _share(shown, 0.0, shown[low] if inverted else shown[high])
    x = modality(meta, stored)
    shown = _voi(meta, x) if intensity == "voi" else None
    if shown is None:
        shown = _share(x, *meta.get("percentiles") or sorted((x[low], x[high])))
    return 1.0 - shown if inverted else shown


def thumbnail(voxels: UInt16[Array, "h w"], meta: Mapping[str, Any], side: int) -> tuple[UInt8[Array, "h2 w2"], int]:
    """A radiograph as it is shown, in means over blocks, so that no side has more than `side` pixels; the block's side.

    Sides that are no multiple of the block lose what is left over.
    """
    step = max(1, -(-max(voxels.shape) // side))
    step_h, step_w = (min(step, n) for n in voxels.shape)
    h, w = voxels.shape[0] // step_h, voxels.shape[1] // step_w
    shown = table(meta)[voxels[: h * step_h, : w * step_w]].reshape(h, step_h, w, step_w)
    return (shown.mean((1, 3), dtype=np.float32) / 257).astype(np.uint8), step


def modality(meta: Mapping[str, Any], stored: Int64[Array, "n"]) -> Float64[Array, "n"]:
    """Stored values to what the modality transform makes of them: modality LUT, else slope and intercept, else same."""
    if lut := meta.get("modality_lut"):
        return _look_up(lut, stored.astype(np.float64))
    slope, intercept = meta.get("rescale") or (1.0, 0.0)
    return stored * float(slope) + float(intercept)


def window(x: Float64[Array, "n"], centre: float, width: float, function: str = "LINEAR") -> Float64[Array, "n"]:
    """A window of DICOM (PS3.3 C.11.2.1.2 and C.11.2.1.3) onto [0, 1].

    Raises:
      ValueError: unknown `function`, or a width that it does not allow (see `valid_window`).
    """
    if not valid_window(centre, width, function):
        raise ValueError(f"no window: centre {centre}, width {width}, function {function!r}")
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (x - centre) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return np.clip((x - centre) / width + 0.5, 0.0, 1.0)
    if width == 1:  # a threshold: the limit of the formula
        return (x > centre - 0.5).astype(np.float64)
    return np.clip((x - (centre - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def valid_window(centre: float, width: float, function: str = "LINEAR") -> bool:
    """Does DICOM allow it: a known function, finite numbers, a width of at least 1 (LINEAR) or above 0 (the others)?"""
    wide = width >= 1 if function == "LINEAR" else width > 0
    return function in WINDOW_FUNCTIONS and bool(np.isfinite([centre, width]).all()) and wide


def how(meta: Mapping[str, Any]) -> str:
    """What `intensity="voi"` uses for this image: "lut", "window" or "percentiles"."""
    return "lut" if meta.get("voi_lut") else "window" if _window(meta) else "percentiles"


def histogram_percentiles(
    counts: Int64[Array, "65536"], meta: Mapping[str, Any], shares: Sequence[float] = PERCENTILES
) -> tuple[float, ...]:
    """Percentiles of an image after the modality transform, from the number of pixels of every voxel value.

    Each is the smallest value that at least so many percent of the pixels do not exceed. No pixels at all give zeros.
    """
    at = np.flatnonzero(counts)
    if not len(at):
        return (0.0,) * len(shares)
    x = modality(meta, at - int(meta.get("offset", 0)))
    order = np.argsort(x, kind="stable")
    below = np.cumsum(counts[at][order])
    wanted = np.asarray(shares) / 100.0 * below[-1]
    return tuple(float(v) for v in x[order][np.minimum(np.searchsorted(below, wanted), len(x) - 1)])


def _voi(meta: Mapping[str, Any], x: Array) -> Array | None:
    if lut := meta.get("voi_lut"):
        values = _look_up(lut, x)
        # Some tables hold more than their bits allow; then they end at their own maximum.
        return values / max((1 << int(lut["bits"])) - 1, max(lut["values"]), 1)
    if pair := _window(meta):
        return window(x, *pair, meta.get("window_function") or "LINEAR")
    return None


def _window(meta: Mapping[str, Any]) -> tuple[float, float] | None:
    function = meta.get("window_function") or "LINEAR"
    pairs = ((float(c), float(w)) for c, w in meta.get("windows") or ())
    return next((pair for pair in pairs if valid_window(*pair, function)), None)


def _look_up(lut: Mapping[str, Any], x: Array) -> Array:
    values = np.asarray(lut["values"], np.float64)
    return values[np.clip(np.rint(x - lut["first"]), 0, len(values) - 1).astype(np.int64)]


def _share(x: Array, low: float, high: float) -> Array:
    """x as a share of low .. high, clipped; zeros if that is nothing."""
    return np.clip((x - low) / (high - low), 0.0, 1.0) if high > low else np.zeros(x.shape)
