"""Phantom radiographs: SYNTHETIC X-ray images of seven body regions in thousands of sizes. No patient is in them.

Every person has bones of their own (`phantom_bones`); a picture is what X-rays leave of them: exponential absorption,
scatter, quantum noise, a collimator, a side marker, an exposure and a scale of grey that say nothing about the region.
Records are as `prep --recipe=radiograph` makes them: stored values in uint16 at native size, how to show them in meta.

    python -m jaxmed.data.sources.phantom_radiographs --out=shards/radiographs
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from jaxmed.core.command import exit_code
from jaxmed.core.metrics import table
from jaxmed.core.rng import np_rng
from jaxmed.data import shards
from jaxmed.data.record import encode
from jaxmed.data.sources import phantom_anatomy as anatomy
from jaxmed.data.sources import phantom_bones as bones
from jaxmed.data.sources import phantom_shards
from jaxmed.data.sources import phantom_xray as xray
from jaxmed.data.sources.phantom import SPLITS

Array = np.ndarray

VERSION = 1  # of what is drawn; part of the recipe, so that old folders are made again
FLAGS = ("fracture", "implant")
CLASSES = (*bones.REGIONS, *FLAGS)
# Absorption per mm at about 60 kV: soft tissue, compact bone, steel.
_MU = {"soft": 0.02, "bone": 0.055, "metal": 0.6}


@dataclass(frozen=True)
class Config:
    """What pictures look like; ranges are uniform.

    Attributes:
      sides: shortest and longest side in pixels.
      images: fewest and most pictures of a patient.
      zoom: of a region's usual field of view.
      turn: degrees that the part is turned in the picture plane, both ways.
      warp_mm: of the smooth bending that makes people differ.
      noise: quanta per pixel without a patient, as powers of ten: fewer are noisier.
      collimated: share of pictures with a collimator's edge in them.
      monochrome1: share stored with small values bright.
      fracture, implant: share of pictures with one.
    """

    sides: tuple[int, int] = (96, 384)
    images: tuple[int, int] = (1, 4)
    zoom: tuple[float, float] = (0.55, 1.25)
    turn: float = 25.0
    warp_mm: float = 4.0
    noise: tuple[float, float] = (2.8, 4.2)
    collimated: float = 0.5
    monochrome1: float = 0.3
    fracture: float = 0.2
    implant: float = 0.2


DEFAULT = Config()


# ---- One picture.


def size(rng: np.random.Generator, cfg: Config = DEFAULT) -> tuple[int, int]:
    """Height and width, spread like those of real radiographs (rows 1543, 2002, 2438 and columns 1117, 1417, 1852 at
    the quartiles), at an eighth of their scale; of the region they say nothing."""
    scale = np.exp(rng.normal(0, 0.28))
    aspect = np.exp(rng.normal(0.29, 0.28))  # rows over columns
    sides = 206 * scale * np.array([aspect**0.5, aspect**-0.5])
    return tuple(int(v) for v in np.clip(np.rint(sides), *cfg.sides))


def patient(seed: int | tuple[int, ...], cfg: Config = DEFAULT) -> list[dict[str, Any]]:
    """The records of one synthetic person, one per picture; a pure function of its arguments.

    Args:
      seed: non-negative integers.

    Returns:
      Studies as in `data.record`, each with one scan (1, h, w) uint16; labels 1 and 0 for every one of `CLASSES`.
    """
    seed = (seed,) if isinstance(seed, int) else tuple(seed)
    rng = np_rng(*seed)
    name = hashlib.sha256(f"phantom radiographs {VERSION} {seed}".encode()).hexdigest()[:16]
    count = int(rng.integers(cfg.images[0], cfg.images[1] + 1))
    regions = list(rng.choice(bones.REGIONS, 2))
    parts: dict[str, Any] = {}
    studies = []
    for i in range(count):
        region = str(regions[0] if rng.random() < 0.75 else regions[1])
        if region not in parts:
            own = np_rng(*seed, 1, bones.REGIONS.index(region))
            if region == bones.HEAD:
                parts[region] = bones.head_volumes(own)
            else:
                parts[region] = bones.PARTS[region](lambda spread, own=own: spread * own.uniform(-1, 1))
        scan, found = picture(np_rng(*seed, 2, i), region, parts[region], cfg)
        studies.append(
            {
                "key": hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:16],
                "patient": name,
                "scans": [scan],
                "sentences": [],
                "labels": {c: float(c == region or c in found) for c in CLASSES},
                "split": "",
            }
        )
    return studies


def picture(
    rng: np.random.Generator, region: str, part: Any, cfg: Config = DEFAULT
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """One radiograph of a person's body part, and which of `FLAGS` are in it."""
    h, w = size(rng, cfg)
    solid = region != bones.HEAD
    mm, turns = (part.mm, part.turns) if solid else (bones.HEAD_MM, bones.HEAD_TURNS)
    pixel = mm * rng.uniform(*cfg.zoom) / max(h, w)
    view = int(rng.integers(len(turns)))
    turn = float(np.radians(rng.uniform(*turns[view])))
    plane = _plane(rng, (h, w), pixel, cfg)
    flags = []
    if solid:
        solids = list(part.solids)
        if rng.random() < cfg.fracture:
            solids = _broken(rng, solids, part)
            flags.append("fracture")
        if rng.random() < cfg.implant:
            solids += _implant(rng, part)
            flags.append("implant")
        mass = _mass(rng, solids, plane, turn)
    else:
        soft, bone = bones.head_thickness(*part, plane.x, plane.y, turn)
        mass = _mass(rng, bones.neck(), plane, turn)
        mass = np.maximum(mass, np.float32(_MU["soft"]) * soft) + np.float32(_MU["bone"]) * bone
    if mass.max() <= 0:  # cannot be but for a zoom beside the part
        mass = mass + np.float32(0.01)
    chances = {k: getattr(cfg, k) for k in ("noise", "collimated", "monochrome1")}
    return xray.stored(rng, mass, pixel, region, ("AP", "LAT")[view], **chances), tuple(flags)


@dataclass(frozen=True)
class Plane:
    """Where in a body part each pixel lies.

    Attributes:
      x, y: (h, w) mm.
      matrix, origin: x and y without bending are matrix @ (row, column) + origin.
      reach: mm that bending moves a pixel at most.
    """

    x: Array
    y: Array
    matrix: Array
    origin: Array
    reach: float

    @functools.cached_property
    def inverse(self) -> Array:
        return np.linalg.inv(self.matrix)

    def box(self, solid: bones.Solid, turn: float) -> tuple[slice, slice]:
        """Rows and columns that hold a solid; empty if it lies outside."""
        x0, y0, x1, y1 = bones.box_of(solid, turn)
        corners = np.array([(x, y) for x in (x0, x1) for y in (y0, y1)])
        ends = (corners - self.origin) @ self.inverse.T
        margin = self.reach / np.hypot(*self.matrix[0]) + 1
        first, last = np.floor(ends.min(0) - margin), np.ceil(ends.max(0) + margin) + 1
        return tuple(slice(int(max(a, 0)), int(max(min(b, n), 0))) for a, b, n in zip(first, last, self.x.shape))


def _plane(rng: np.random.Generator, shape: tuple[int, int], pixel: float, cfg: Config) -> Plane:
    """Centred, turned, the part along the longer side, gently bent."""
    h, w = shape
    angle = np.radians(rng.uniform(-cfg.turn, cfg.turn))
    angle += (np.pi / 2 if w > 1.15 * h else 0.0) + np.pi * (rng.random() < 0.15)
    c, s = pixel * np.cos(angle), pixel * np.sin(angle)
    matrix = np.array([[s, c], [c, -s]])
    if rng.random() < 0.5:
        matrix[0] *= -1
    middle = np.array([(h - 1) / 2, (w - 1) / 2])
    origin = rng.normal(0, 0.06, 2) * pixel * max(h, w) - matrix @ middle
    rows, columns = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)[None]
    bend = np.float32(cfg.warp_mm)
    found, reach = [], 0.0
    for k in range(2):
        field = bend * anatomy.smooth_field(rng, shape, 6)
        reach = max(reach, float(np.abs(field).max()))
        a, b = matrix[k].astype(np.float32)
        found.append(a * rows + b * columns + np.float32(origin[k]) + field)
    return Plane(*found, matrix, origin, reach)


def _mass(rng: np.random.Generator, solids: list, plane: Plane, turn: float) -> Array:
    """Absorption of all solids behind each pixel; each is drawn in the box that holds it."""
    shape = plane.x.shape
    total, soft = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    grain = _grain(rng, shape)
    for solid in solids:
        at = plane.box(solid, turn)
        if any(s.start >= s.stop for s in at):
            continue
        thick = bones.thickness(solid, plane.x[at], plane.y[at], turn)
        if solid.material == "soft":
            # Overlapping flesh is one flesh: the thicker one counts; air takes away.
            soft[at] = np.maximum(soft[at] + thick, 0) if solid.amount < 0 else np.maximum(soft[at], thick)
        elif solid.material == "bone":
            total[at] += np.float32(_MU["bone"]) * thick * grain[at]
        else:
            total[at] += np.float32(_MU["metal"]) * thick
    return total + np.float32(_MU["soft"]) * soft * (1 + np.float32(0.4) * (grain - 1))


def _grain(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Spongy texture around 1."""
    small = rng.standard_normal([-(-n // 2) + 2 for n in shape]).astype(np.float32)
    fine = ndimage.uniform_filter(small, (3, 2)).repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]]
    return 1 + np.float32(0.22) * fine


def _broken(rng: np.random.Generator, solids: list, part: bones.Part) -> list:
    """One long bone in two, with a gap and a step between the ends; a short one (a vertebra) at half its height."""
    k = len(part.solids) - len([s for s in part.solids if s.material == "bone"]) + int(rng.choice(part.long))
    bone = solids[k]
    if np.linalg.norm(bone.b - bone.a) < 3 * max(p[1] for p in bone.profile):
        low = dataclasses.replace(bone, a=bone.a + rng.uniform(0.35, 0.55) * (bone.b - bone.a))
        return [*solids[:k], low, *solids[k + 1 :]]
    at, gap = rng.uniform(0.35, 0.7), rng.uniform(1.5, 4.0)
    along = (bone.b - bone.a) / np.linalg.norm(bone.b - bone.a)
    side = np.array([rng.normal(0, 4), rng.normal(0, 2), rng.normal(0, 4)])
    middle = bone.a + at * (bone.b - bone.a)

    def piece(first: float, last: float) -> tuple:
        points = np.array(bone.profile)
        s = np.linspace(first, last, 9)
        return tuple(
            (i / 8, *(float(np.interp(v, points[:, 0], points[:, j])) for j in (1, 2))) for i, v in enumerate(s)
        )

    radius = float(np.interp(at, *np.array(bone.profile).T[:2]))
    # Rods end in half balls: the ends stand back by a radius, but for the gap.
    near = middle - along * (0.75 * radius + gap / 2)
    far = middle + along * (0.75 * radius + gap / 2) + side
    upper = dataclasses.replace(bone, b=near, profile=piece(0, at), bend=0.0)
    lower = dataclasses.replace(bone, a=far, b=bone.b + 1.6 * side, profile=piece(at, 1), bend=0.0)
    return [*solids[:k], upper, lower, *solids[k + 1 :]]


def _implant(rng: np.random.Generator, part: bones.Part) -> list:
    """A plate with screws, or a nail, along a long bone."""
    rods = [s for s in part.solids if s.material == "bone"]
    bone = rods[int(rng.choice(part.long))]
    axis = bone.b - bone.a
    length = float(np.linalg.norm(axis))
    first, last = sorted(rng.uniform(0.1, 0.9, 2))
    last = max(last, first + min(0.3, 0.9 - first) if first < 0.8 else last)
    a, b = bone.a + first * axis, bone.a + last * axis
    thin = min(p[1] for p in bone.profile)
    if rng.random() < 0.4:
        return [bones.rod(a, b, 0.4 * thin, shell=0, material="metal")]
    aside = np.cross(axis / length, [0.3, 0.1, 1.0])
    aside /= np.linalg.norm(aside)
    radius = float(np.interp((first + last) / 2, *np.array(bone.profile).T[:2]))
    plate = bones.rod(a + aside * radius, b + aside * radius, (0, 1.6, 4.0), (1, 1.6, 4.0), shell=0, material="metal")
    screws = []
    for t in np.linspace(0.08, 0.92, int(rng.integers(3, 7))):
        head = a + t * (b - a) + aside * (radius + 1.5)
        screws.append(bones.rod(head, head - aside * (1.8 * radius), 1.3, shell=0, material="metal"))
    return [plate, *screws]


# ---- A dataset.


def make(
    dir: str | os.PathLike,
    *,
    train: int = 2000,
    val: int = 0,
    test: int = 500,
    seed: int = 0,
    threads: int | None = None,
    shard_records: int = 250,
    **cfg,
) -> Path:
    """Writes a dataset of phantom radiographs; does nothing if `dir` already holds exactly this one.

    A run that was stopped goes on with the shards that are missing. Ends with a table, see `describe`.

    Args:
      dir: dataset folder (see `data.shards`).
      train, val, test: images of each split; no patient is in two.
      threads: patients drawn at once [the number of cores]; the result does not depend on it.
      shard_records: images per shard.
      **cfg: fields of `Config`.

    Raises:
      UserError: `dir` holds something else, or a field is unknown.
    """
    config = phantom_shards.options(Config, cfg)
    counts = phantom_shards.counts(train, val, test, "images")
    recipe = {"name": "phantom_radiographs", "synthetic": True, "version": VERSION, "seed": seed}
    recipe |= {"value_range": [0, 65535], "counts": counts, "shard_records": shard_records}
    recipe = json.loads(json.dumps(recipe | {"config": dataclasses.asdict(config)}))  # as it will be read back
    dir = Path(dir)
    if not phantom_shards.begin(dir, recipe):
        print(f"{dir}: {sum(counts.values())} phantom radiographs are there already")
        print(describe(dir))
        return dir
    plan = list(_plan(counts, seed, config))
    parts = [_by_patient(plan[i : i + shard_records]) for i in range(0, len(plan), shard_records)]

    def one(item):
        split, key, chosen = item
        studies = patient(key, config)
        return [encode({**studies[i], "split": split}) for i in chosen]

    about = {"name": "phantom radiographs (synthetic)", "unit": "patient", "classes": CLASSES}
    phantom_shards.write(dir, recipe, parts, one, **about, threads=threads)
    print(describe(dir))
    return dir


def _plan(counts: dict[str, int], seed: int, cfg: Config) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(split, seed of the patient, number of the image) of every record, in order."""
    for k, name in enumerate(SPLITS):
        left, number = counts[name], 0
        while left > 0:
            key = (seed, k, number)
            images = min(left, int(np_rng(*key).integers(cfg.images[0], cfg.images[1] + 1)))
            yield from ((name, key, i) for i in range(images))
            left, number = left - images, number + 1


def _by_patient(items: list[tuple]) -> list[tuple[str, tuple[int, ...], list[int]]]:
    found: dict[tuple, list[int]] = {}
    for split, key, i in items:
        found.setdefault((split, key), []).append(i)
    return [(split, key, chosen) for (split, key), chosen in found.items()]


def describe(dir: str | os.PathLike) -> str:
    """A table of the dataset, and of what can be told of the region without looking: from the size, from the histogram.

    Balanced accuracies of logistic regressions on the test split (of another split if there is none), fitted on train.
    """
    from jaxmed.data.sources.phantom_checks import baselines  # scikit-learn takes a second to import

    dataset = shards.open_dataset(dir)
    index = dataset.index
    sizes = len(set(zip(index["height"].tolist(), index["width"].tolist())))
    rows = [("phantom radiographs", "images", "patients")]
    for name in SPLITS:
        own = index["split"] == name
        if own.any():
            rows.append((name, str(own.sum()), str(len(set(index["patient"][own])))))
    rows.append(("different sizes", str(sizes), ""))
    rows += [(c, str(int(np.nansum(index[f"label/{c}"]))), "") for c in CLASSES]
    rows += [
        (f"region from {k}, balanced accuracy", f"{v:.3f}", "") for k, v in baselines(dataset, bones.REGIONS).items()
    ]
    dataset.close()
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmed.data.sources.phantom_radiographs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", required=True, help="folder of the dataset")
    for name, count in (("train", 2000), ("val", 0), ("test", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    args = parser.parse_args(argv)
    return exit_code(lambda: make(args.out, train=args.train, val=args.val, test=args.test, seed=args.seed))


if __name__ == "__main__":
    sys.exit(main())
