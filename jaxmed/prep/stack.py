"""Planes -> volumes: which slices belong together, in which order, on which grid."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from jaxmed.prep.frames import Slice
from jaxmed.prep.scan import ReadOptions, Rejected

SAME_ORIENTATION = 2e-3  # largest difference of direction cosines: headers round to 3-6 digits
SAME_POSITION = 0.02  # mm along the normal
UNIFORM = 0.1  # of a step: how far a slice may lie from an even grid before the stack counts as uneven
SLAB_GAP = 10.0  # steps: a wider gap is not a loss of slices but another slab

Note = dict[str, str]


def note(reason: str, detail: str) -> Note:
    return {"reason": reason, "detail": detail}


def stacks(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Splits a series where size, spacing, echo, image kind or orientation differ; order of first appearance."""
    groups: dict[tuple, list[list[Slice]]] = defaultdict(list)
    for s in slices:
        for group in groups[s.stack]:
            first = group[0].orientation
            if (first is None) == (s.orientation is None) and (
                first is None or np.abs(first - s.orientation).max() < SAME_ORIENTATION
            ):
                group.append(s)
                break
        else:
            groups[s.stack].append([s])
    return [group for found in groups.values() for group in found]


def normal_of(orientation: np.ndarray) -> np.ndarray:
    """Row direction x column direction (LPS): slices are ordered along it."""
    normal = np.cross(orientation[:3], orientation[3:])
    return normal / np.linalg.norm(normal)


def place(group: list[Slice]) -> list[float] | None:
    """Each slice's place along the normal in mm; positions that are absent are made from locations or numbers.

    Returns None if orientation is unknown.
    """
    if group[0].orientation is None:
        return None
    normal = normal_of(group[0].orientation)
    if all(s.position is not None for s in group):
        return [float(s.position @ normal) for s in group]
    if all(s.location is not None for s in group):
        return [float(s.location) for s in group]
    return None


def merge_copies(slices: Sequence[Slice]) -> tuple[list[Slice], int]:
    """Files stored twice (same instance, same plane) become alternates of the first; returns how many."""
    known: dict[tuple, list[Slice]] = defaultdict(list)
    result, copies = [], 0
    for s in slices:
        at = () if s.position is None else tuple(np.round(s.position, 3))
        same = known[(s.uid, s.frame, s.tile, at, s.number, s.stack)] if s.uid else []
        first = next((k for k in same if k.file != s.file), None)
        if first is not None:
            first.alternates.append(s)
            copies += 1
        else:
            same.append(s)
            result.append(s)
    return result, copies


def volumes(group: list[Slice], places: list[float]) -> list[list[tuple[float, Slice]]]:
    """Splits slices that share positions into volumes (time points, directions, repetitions).

    The first header value, or combination of values, that tells all slices of a position apart does it; if none does
    and every position is there equally often, the order of instance numbers does. Otherwise the rest are duplicates:
    they stay in one volume, several slices at one place.
    """
    pairs = sorted(zip(places, group), key=lambda p: (p[0], p[1].number, p[1].file, p[1].frame))
    cells = _cells([p for p, _ in pairs])
    counts = np.bincount(cells)
    if counts.max() == 1:
        return [pairs]
    keys = len(group[0].volume)
    for chosen in [(i,) for i in range(keys)] + [tuple(range(i)) for i in range(2, keys + 1)]:
        split: dict[tuple, list[int]] = defaultdict(list)
        for index, (_, s) in enumerate(pairs):
            split[tuple(s.volume[i] for i in chosen)].append(index)
        if len(split) < 2 or any(len({cells[i] for i in rows}) < len(rows) for rows in split.values()):
            continue
        if min(len(rows) for rows in split.values()) * 2 < len(counts):
            continue  # a few repeated slices are no volume of their own
        order = sorted(split.values(), key=lambda rows: min(pairs[i][1].number for i in rows))
        return [[pairs[i] for i in rows] for rows in order]
    if counts.min() == counts.max():
        times = int(counts[0])
        return [[pairs[i] for i in range(k, len(pairs), times)] for k in range(times)]
    return [pairs]


def _cells(places: Sequence[float]) -> np.ndarray:
    """Numbers of the distinct places in a sorted list."""
    gaps = np.diff(np.asarray(places)) > SAME_POSITION
    return np.concatenate([[0], np.cumsum(gaps)]).astype(np.int64)


@dataclasses.dataclass
class Volume:
    """Planes on an even grid along a line; affine in DICOM's LPS convention, index order (d, h, w)."""

    planes: list[np.ndarray]  # (h, w) each, already rescaled
    affine: np.ndarray  # (4, 4)
    step: float  # mm along the normal between planes
    tilt: float  # degrees between the line of positions and the normal
    filled: int
    resampled: bool
    notes: list[Note]


def assemble(
    pairs: list[tuple[float, Slice]],
    load: Callable[[Slice], np.ndarray | None],
    options: ReadOptions,
) -> list[Volume]:
    """Decodes and stacks one volume; several slabs far apart give several.

    Args:
      pairs: (place along the normal, slice), ascending; equal places are duplicates.
      load: the plane's pixels, or None if its file is bad (the caller has noted why).

    Raises:
      Rejected: "missing-slices", "non-uniform-spacing", "inconsistent", "no-geometry", "too-few-slices".
    """
    notes: list[Note] = []
    kept: list[tuple[float, Slice, np.ndarray]] = []
    duplicates = bad = 0
    cells = _cells([p for p, _ in pairs])
    for cell in range(cells[-1] + 1):
        candidates = [pairs[i] for i in np.flatnonzero(cells == cell)]
        for at, (where, s) in enumerate(candidates):
            plane = load(s)
            if plane is not None:
                kept.append((where, s, plane))
                duplicates += len(candidates) - at - 1
                break
        else:
            bad += 1
    if not kept:
        return []
    if duplicates:
        notes.append(note("duplicate-slices", f"{duplicates} slices at positions already filled were dropped"))
    if bad:
        notes.append(note("missing-slices", f"{bad} slices could not be read"))
    slabs = _slabs(kept)
    if len(slabs) > 1:
        notes.append(note("several-slabs", f"the stack falls into {len(slabs)} slabs"))
    result = []
    for slab in slabs:
        if len(slab) < options.min_slices:
            raise Rejected("too-few-slices", f"{len(slab)} slices, {options.min_slices} asked for")
        result.append(_grid(slab, options, list(notes)))
    return result


def _slabs(kept: list) -> list[list]:
    """Cuts at gaps that are far wider than the usual step."""
    if len(kept) < 4:
        return [kept]
    steps = np.diff([where for where, _, _ in kept])
    cuts = np.flatnonzero(steps > SLAB_GAP * np.median(steps)) + 1
    bounds = [0, *cuts.tolist(), len(kept)]
    return [kept[a:b] for a, b in itertools.pairwise(bounds)]


def _grid(slab: list, options: ReadOptions, notes: list[Note]) -> Volume:
    where = np.array([p for p, _, _ in slab])
    slices, planes = [s for _, s, _ in slab], [plane for _, _, plane in slab]
    first, count = slices[0], len(slices)
    if first.spacing is None:
        raise Rejected("no-geometry", "no pixel spacing")
    orientation = first.orientation
    normal = normal_of(orientation)
    placed = all(s.position is not None for s in slices)
    if placed:
        points = np.stack([s.position for s in slices])
    else:  # orientation and slice locations only: the plane's place within the patient is unknown
        points = where[:, None] * normal
        notes.append(note("no-orientation", "no positions; the origin is arbitrary"))
    filled, resampled, tilt = 0, False, 0.0
    if count == 1:
        step = first.between or first.thickness or 1.0
        vector = normal * step
    else:
        span = where[-1] - where[0]
        line = (points[-1] - points[0]) / span
        off = points - points[0] - (where - where[0])[:, None] * line
        allowed = max(0.5 * min(first.spacing), 0.1 * span / (count - 1))
        if np.abs(off).max() > allowed:
            raise Rejected("inconsistent", "the slices do not lie on one line")
        tilt = math.degrees(math.acos(min(1.0, float(line @ normal) / float(np.linalg.norm(line)))))
        target, filled, resampled = _even(where, options, notes)
        planes = _interpolate(where, planes, target)
        step = span / (len(target) - 1)
        vector = line * step
    affine = np.eye(4)
    affine[:3, 0] = vector
    affine[:3, 1] = orientation[3:] * first.spacing[0]
    affine[:3, 2] = orientation[:3] * first.spacing[1]
    affine[:3, 3] = points[0]
    return Volume(planes, affine, float(step), tilt, filled, resampled, notes)


def _even(where: np.ndarray, options: ReadOptions, notes: list[Note]) -> tuple[np.ndarray, int, bool]:
    """An even grid over the same span: (places, slices filled in, were slices moved).

    Isolated steps of two, three, ... times the usual one are missing slices; any other unevenness (runs of other
    steps, drifting steps) is resampled to the smallest usual step.
    """
    steps = np.diff(where)
    even = np.linspace(where[0], where[-1], len(where))
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])
    if np.abs(where - even).max() <= UNIFORM * usual:
        return where, 0, False
    times = np.round(steps / usual)
    gap = times >= 2
    beside = np.concatenate([[False], gap[:-1]]) | np.concatenate([gap[1:], [False]])
    regular = np.abs(steps / usual - times) <= 0.15 * np.maximum(times, 1)
    if regular.all() and (times >= 1).all() and not (gap & beside).any() and gap.sum() * 2 <= len(steps):
        missing = int((times - 1).sum())
        if missing > options.max_missing:
            raise Rejected(
                "missing-slices", f"{missing} of {len(where) + missing} slices; {options.max_missing} allowed"
            )
        notes.append(note("missing-slices", f"{missing} of {len(where) + missing} slices were interpolated"))
        # A present slice keeps its exact pixels: its own place is a place of the grid.
        places = np.concatenate([np.linspace(a, b, int(t) + 1)[:-1] for a, b, t in zip(where[:-1], where[1:], times)])
        return np.concatenate([places, where[-1:]]), missing, False
    ratio = float(steps.max() / steps.min())
    if ratio > options.max_step_ratio:
        raise Rejected(
            "non-uniform-spacing",
            f"steps from {steps.min():.2f} to {steps.max():.2f} mm; a ratio of {options.max_step_ratio:g} is allowed",
        )
    step = float(np.percentile(steps, 10))
    count = max(2, round((where[-1] - where[0]) / step) + 1)
    target = np.linspace(where[0], where[-1], count)
    detail = f"steps from {steps.min():.2f} to {steps.max():.2f} mm were resampled to {target[1] - target[0]:.2f} mm"
    notes.append(note("non-uniform-spacing", detail))
    return target, 0, True


def _interpolate(where: np.ndarray, planes: list[np.ndarray], target: np.ndarray) -> list[np.ndarray]:
    """Linear along the stack; integer planes stay integer (rounded)."""
    if target is where:
        return planes
    right = np.clip(np.searchsorted(where, target), 1, len(where) - 1)
    result = []
    for place_, b in zip(target, right):
        a = b - 1
        weight = float(np.clip((place_ - where[a]) / (where[b] - where[a]), 0.0, 1.0))
        if weight < 1e-6 or weight > 1 - 1e-6:
            result.append(planes[a] if weight < 0.5 else planes[b])
            continue
        mixed = planes[a].astype(np.float32) * (1 - weight) + planes[b].astype(np.float32) * weight
        if planes[a].dtype.kind in "iu":
            mixed = np.rint(mixed)
        result.append(mixed.astype(planes[a].dtype))
    return result


def plane_name(affine: np.ndarray) -> str:
    """ "axial", "coronal" or "sagittal": the plane that the slices (first index) are closest to."""
    normal = np.cross(affine[:3, 1], affine[:3, 2])
    return ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]


def narrow(voxels: np.ndarray) -> np.ndarray:
    """Integers as uint8, int16 or uint16 if their values fit, everything else as float32."""
    if voxels.dtype in (np.uint8, np.int16, np.uint16):
        return voxels
    if voxels.dtype.kind in "iu":
        low, high = (int(voxels.min()), int(voxels.max())) if voxels.size else (0, 0)
        for dtype in (np.int16, np.uint16):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return voxels.astype(dtype)
    return voxels.astype(np.float32)
