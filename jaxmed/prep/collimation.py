"""Which pixels of a radiograph were exposed: what header and edges say about shutters and collimators."""

import numpy as np
from jaxtyping import Bool, UInt16
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from scipy import ndimage

from jaxmed.prep import frames

Array = np.ndarray
Box = tuple[int, int, int, int]

_NEAR = 0.01  # of the range of an image: so far from its smallest or largest value a pixel still counts as unexposed
_BLUR = 0.3  # of the range: nearly white
_LEAST = 0.02  # of the pixels: fewer exposed ones are a mistake of ours or of the header
_SIDE = 512  # pixels of the shorter side on which connected borders are looked for


def exposed(
    pixels: UInt16[Array, "h w"], ds: Dataset | None = None, *, white: str = "high"
) -> tuple[Bool[Array, "h w"], Box | None, str]:
    """The pixels that carry the picture.

    A pixel is left out where a shutter or collimator of the header (rectangular, circular, polygonal; PS3.3 C.7.6.11
    and C.8.7.3.1) covers it, and where it belongs to an area of the smallest or largest value that touches the edge of
    the image: the shadow of a collimator, also a tilted one, or air that saturates the detector.

    Args:
      ds: the header, if there is one.
      white: which stored values are shown white, "high" or "low" (MONOCHROME1).

    Returns:
      The mask; the box (top, left, bottom, right), end exclusive, around the collimated field, None if that is the
      whole image; what gave it: "header", "edges", "both" or "".
    """
    shape = pixels.shape
    mask, said = np.ones(shape, bool), False
    for word in ("Shutter", "Collimator") if ds is not None else ():
        covered = _of_header(ds, word, shape)
        if covered is not None:
            mask, said = mask & covered, True
    if mask.mean() < _LEAST:
        mask, said = np.ones(shape, bool), False
    flat = _flat_areas(pixels)
    edges = _trimmed(pixels, white == "low")
    box = _box_of(mask) if said else (0, 0, *shape)
    box = tuple(max(a, b) for a, b in zip(box[:2], edges[:2])) + tuple(min(a, b) for a, b in zip(box[2:], edges[2:]))
    found = edges != (0, 0, *shape)
    if box[2] - box[0] < 1 or box[3] - box[1] < 1:  # header and edges contradict each other
        box, found = _box_of(mask), False
    inside = mask & ~flat
    inside[: box[0]] = inside[box[2] :] = False
    inside[:, : box[1]] = inside[:, box[3] :] = False
    if inside.mean() < _LEAST:
        inside = mask
    source = "both" if said and found else "header" if said else "edges" if found else ""
    return inside, None if box == (0, 0, *shape) else box, source


def _near_extremes(pixels: Array) -> tuple[Array, Array]:
    """Pixels at the smallest, and at the largest value of the image."""
    low, high = int(pixels.min()), int(pixels.max())
    reach = int(_NEAR * (high - low))
    return pixels <= low + reach, pixels >= high - reach


def _flat_areas(pixels: Array) -> Bool[Array, "h w"]:
    """Areas of one extreme value that touch the edge, each at least half a percent of the image."""
    step = max(1, min(pixels.shape) // _SIDE)
    result = np.zeros(pixels[::step, ::step].shape, bool)
    for near in _near_extremes(pixels[::step, ::step]):
        if near.mean() < 0.005:
            continue
        labels, count = ndimage.label(near)
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        touching = np.zeros(count + 1, bool)
        touching[edge] = True
        touching[0] = False
        result |= (touching & (sizes >= 0.005 * near.size))[labels]
    return result.repeat(step, 0).repeat(step, 1)[: pixels.shape[0], : pixels.shape[1]]


def _trimmed(pixels: Array, white_is_low: bool) -> Box:
    """The image without rows and columns at its edges that hold one extreme value.

    White ones are the shadow of a collimator; what follows while it is nearly white is its blurred edge.
    """
    low, high = int(pixels.min()), int(pixels.max())
    means = [pixels.mean(axis) for axis in (1, 0)]
    limits = [[0, pixels.shape[0]], [0, pixels.shape[1]]]
    for near, extreme in zip(_near_extremes(pixels), (low, high)):
        shadow = (extreme == low) == white_is_low
        for axis in (0, 1):
            kept = np.flatnonzero(near.mean(1 - axis) < 0.99)
            if not len(kept):
                continue
            bright = np.abs(means[axis] - extreme) < _BLUR * (high - low)
            reach = int(0.1 * len(bright)) if shadow else 0
            first, last = int(kept[0]), int(kept[-1])
            if first:
                first += next((i for i, b in enumerate(bright[first : first + reach]) if not b), reach)
            if last < len(bright) - 1:
                back = bright[max(last - reach + 1, 0) : last + 1][::-1]
                last -= next((i for i, b in enumerate(back) if not b), reach)
            limits[axis] = [max(limits[axis][0], first), min(limits[axis][1], last + 1)]
    (top, bottom), (left, right) = limits
    if (bottom - top) * (right - left) < _LEAST * pixels.size or bottom <= top or right <= left:
        return 0, 0, *pixels.shape
    return top, left, bottom, right


def _box_of(mask: Array) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _of_header(ds: Dataset, word: str, shape: tuple[int, int]) -> Array | None:
    """What a shutter (or collimator) of the header leaves free; None if it says nothing that makes sense.

    Rows and columns are counted from 1; edges outside of the image are in some other unit (machines differ) and count
    for nothing. Several shapes cover together.
    """
    mask, said = np.ones(shape, bool), False
    row, column = np.ogrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    shapes = {s.upper() for s in frames.texts(ds, f"{word}Shape")}
    if "RECTANGULAR" in shapes:
        names = ("UpperHorizontalEdge", "LeftVerticalEdge", "LowerHorizontalEdge", "RightVerticalEdge")
        edges = [frames.number(ds, f"{word}{name}") for name in names]
        if None not in edges and 0 <= edges[0] < edges[2] <= shape[0] + 1 and 0 <= edges[1] < edges[3] <= shape[1] + 1:
            top, left, bottom, right = edges
            mask, said = mask & (row >= top) & (row <= bottom) & (column >= left) & (column <= right), True
    if "CIRCULAR" in shapes:
        centre = frames.numbers(ds, f"CenterOfCircular{word}", 2)
        radius = frames.number(ds, f"RadiusOfCircular{word}")
        if centre is not None and radius and radius > 0:
            mask, said = mask & ((row - centre[0]) ** 2 + (column - centre[1]) ** 2 <= radius**2), True
    if "POLYGONAL" in shapes:
        points = _points(ds, f"VerticesOfThePolygonal{word}")
        if points is not None:
            image = Image.new("1", (shape[1], shape[0]))
            ImageDraw.Draw(image).polygon([(c - 1, r - 1) for r, c in points], fill=1, outline=1)
            mask, said = mask & np.asarray(image), True
    return mask if said and mask.mean() >= _LEAST else None


def _points(ds: Dataset, name: str) -> list[tuple[float, float]] | None:
    """(row, column) of the corners of a polygon, at least three, or None."""
    try:
        found = [float(v) for v in frames.value(ds, name, ())]
    except (TypeError, ValueError):
        return None
    return list(zip(found[::2], found[1::2])) if len(found) >= 6 and len(found) % 2 == 0 else None
