"""What about a radiograph looks wrong: suspicions for people to look at, nothing is refused for them."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt16
from scipy import ndimage

from jaxmed.data import intensity
from jaxmed.prep.stack import Note, note

Array = np.ndarray

SUSPECT = ("photometric-disagreement", "looks-inverted", "clipped", "low-contrast", "burnt-in-text")
_WHITE, _BLACK = 0.25, 0.6  # of the exposed pixels: more than that at one end of the scale is clipped
_SIDE = 256


def look(
    voxels: UInt16[Array, "h w"], inside: Bool[Array, "h w"], counts: Int64[Array, "65536"], meta: dict[str, Any]
) -> list[Note]:
    """Suspicions about one image as it is shown with `intensity="voi"`.

    Args:
      inside: the exposed pixels, see `collimation.exposed`; `counts` of each value among them.
    """
    unit = intensity.unit(meta)
    notes = []
    total = max(int(counts.sum()), 1)
    white, black = (int(counts[at].sum()) / total for at in (unit >= 254 / 255, unit <= 1 / 255))
    if white > _WHITE or black > _BLACK:
        said = f"{white:.0%} of the exposed pixels are white, {black:.0%} black ({intensity.how(meta)})"
        notes.append(note("clipped", said))
    order = np.argsort(unit, kind="stable")
    shares = np.cumsum(counts[order]) / total
    tenth, most = (unit[order][min(np.searchsorted(shares, s), len(order) - 1)] for s in (0.1, 0.9))
    if most - tenth < 0.05:
        notes.append(note("low-contrast", f"80% of the exposed pixels lie within {most - tenth:.1%} of the scale"))
    if _inverted(unit, voxels, inside):
        notes.append(note("looks-inverted", "the corners of the field are bright and its middle is dark"))
    if letters := _letters(voxels):
        notes.append(note("burnt-in-text", f"{letters} shapes like letters in a row"))
    return notes


def _inverted(unit: Array, voxels: Array, inside: Array) -> bool:
    """Air surrounds a patient, so the corners of the exposed field are dark; bright ones over a dark middle are not."""
    step = max(1, min(voxels.shape) // _SIDE)
    image, mask = unit[voxels[::step, ::step]], inside[::step, ::step]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    h, w = (max(1, n // 12) for n in image.shape)
    corners = [np.median(image[a, b]) for a in (slice(h), slice(-h, None)) for b in (slice(w), slice(-w, None))]
    middle = np.median(image[image.shape[0] // 3 : -(image.shape[0] // 3) or None, image.shape[1] // 3 :][:, : 4 * w])
    return bool(np.median(corners) > 0.65 and middle < np.median(corners) - 0.2)


def _letters(voxels: Array) -> int:
    """The longest row of shapes of one height at the largest or smallest value: 0 if fewer than 6.

    Letters are drawn with one value, are 7 to 80 pixels high, no wider than high and a half, and fill a part of their
    box. A side marker is one to three of them.
    """
    best = 0
    for value in (int(voxels.max()), int(voxels.min())):
        drawn = voxels == value
        if not 0.0001 < drawn.mean() < 0.3:
            continue
        labels, count = ndimage.label(drawn, np.ones((3, 3)))
        if count > 20000:
            continue
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        shapes = []
        for i, box in enumerate(ndimage.find_objects(labels), 1):
            h, w = (s.stop - s.start for s in box)
            if 7 <= h <= 80 and 2 <= w <= 1.5 * h and 0.12 < sizes[i] / (h * w) < 0.95 and sizes[i] >= 12:
                shapes.append((box[0].stop, h, box[1].start))
        for bottom, height, _ in shapes if len(shapes) < 2000 else ():
            row = [s for s in shapes if abs(s[0] - bottom) <= 0.15 * height and abs(s[1] - height) <= 0.25 * height]
            starts = sorted(s[2] for s in row)
            run = longest = 1
            for a, b in itertools.pairwise(starts):
                run = run + 1 if b - a <= 3 * height else 1
                longest = max(longest, run)
            best = max(best, longest)
    return best if best >= 6 else 0
