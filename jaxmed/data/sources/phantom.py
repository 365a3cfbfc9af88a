"""Phantom studies: SYNTHETIC brain MR and CT with reports, made on the spot. No patient is in them.

The anatomy is the MNI152 average brain that `nilearn` ships, bent into a new head for every subject; lesions are drawn
into it, scans follow the signal equations, and reports say what was drawn. Enough to try every command, and to check
that a model learns; not enough to learn medicine.

    python -m jaxmed.data.sources.phantom --out=shards/phantom             # a dataset
    python -m jaxmed.data.sources.phantom --out=raw --raw=8                # NIfTI and DICOM files with a CSV, for prep
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.core.command import exit_code
from jaxmed.core.metrics import table
from jaxmed.core.rng import np_rng
from jaxmed.data import shards
from jaxmed.data.record import encode
from jaxmed.data.sources import phantom_anatomy as anatomy
from jaxmed.data.sources import phantom_imaging as imaging
from jaxmed.data.sources import phantom_shards
from jaxmed.data.sources import phantom_words as words

VERSION = 2  # of what is drawn; part of the recipe, so that old folders are made again
CLASSES = ("normal", *anatomy.LESIONS)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Config:
    """What subjects look like; ranges are uniform.

    Attributes:
      size: in-plane pixels of every scan.
      depth: fewest and most slices of a scan, in steps of `depth_step`.
      scans: fewest and most scans of a study, each of another sequence.
      sequences: those of `imaging.SEQUENCES` that are acquired.
      planes: how often each of `imaging.PLANES` is, as shares of 1.
      step_mm, warp_mm: see `anatomy.head`.
      cover_mm, fov_mm: what the slices, and the pixels, span.
      noise: as a share of white matter's signal.
      grey: how much the grey values of scanners differ: spread of the logarithm of an MR's gamma and of a CT's window.
      lesion_scale: multiplies the radius of every lesion.
      distractors: multiplies how often there is something else to see: atrophy, full sinuses, white matter spots, a
        cyst, motion.
    """

    size: int = 40
    depth: tuple[int, int] = (8, 12)
    depth_step: int = 4
    scans: tuple[int, int] = (2, 5)
    sequences: tuple[str, ...] = imaging.SEQUENCES
    planes: tuple[float, float, float] = (0.8, 0.1, 0.1)
    step_mm: float = 4.0
    warp_mm: float = 4.0
    cover_mm: tuple[float, float] = (130.0, 150.0)
    fov_mm: tuple[float, float] = (185.0, 205.0)
    noise: tuple[float, float] = (0.01, 0.035)
    grey: float = 0.08
    lesion_scale: float = 1.0
    distractors: float = 1.0


DEFAULT = Config()


@dataclass(frozen=True)
class Finding:
    """What was drawn: a class of `CLASSES`, where, and how large (mm across; ml of the lesion without its oedema)."""

    kind: str
    side: str = ""
    region: str = ""
    count: int = 0
    mm: float = 0.0
    ml: float = 0.0


_OTHERS = np.array([0.3, 0.3, 0.2, 0.15])  # how often: atrophy, full sinuses, spots, cyst
# Radius ranges in mm.
_RADIUS = {"hemorrhage": (18, 28), "infarct": (26, 42), "mass": (17, 25), "metastases": (8, 12)}


def draw_lesion(rng: np.random.Generator, head: anatomy.Head, kind: str, scale: float = 1.0) -> Finding:
    """Draws one of `CLASSES` into a head; for any modality that is made from it."""
    if kind == "normal":
        return Finding("normal")
    side = ("left", "right")[int(rng.integers(2))]
    region = anatomy.REGIONS[int(rng.integers(len(anatomy.REGIONS)))]
    lo, hi = (scale * r for r in _RADIUS[kind])
    count = int(rng.integers(5, 10)) if kind == "metastases" else 1
    radii = rng.uniform(lo, hi, count)
    if kind == "metastases":
        for i, radius in enumerate(radii):
            at_side = ("left", "right")[i % 2]
            where = anatomy.REGIONS[int(rng.integers(len(anatomy.REGIONS)))]
            anatomy.add_mass(rng, head, anatomy.place(rng, head, where, at_side, radius), radius, small=True)
        side = region = ""
    else:
        add = {
            "hemorrhage": anatomy.add_hemorrhage,
            "infarct": anatomy.add_infarct,
            "mass": anatomy.add_mass,
        }[kind]
        depth = 0.0 if kind == "infarct" else 0.6 * radii[0]
        add(rng, head, anatomy.place(rng, head, region, side, depth), float(radii[0]))
    ml = float((head.lesion_mask() > 0).sum()) * head.step**3 / 1000
    return Finding(kind, side, region, count, round(2 * float(radii.max()), 1), round(ml, 2))


def subject(
    seed: int | tuple[int, ...], cfg: Config = DEFAULT, kind: str | None = None, *, raw: bool = False
) -> dict[str, Any]:
    """A study of one synthetic subject, as in `data.record`; a pure function of its arguments.

    Args:
      seed: non-negative integers.
      kind: one of `CLASSES`; None draws one.
      raw: int16 voxels as a scanner gives them (CT in HU) instead of stored uint8.

    Returns:
      The study; its labels are 1 for its class and 0 for the others. Every scan's `meta` has "plane", "slice_mm",
      "pixel_mm", "motion" and, with a lesion, "mask_runs" (see `data.masks`), "lesion_mm" (across),
      "lesion_ml", "contrast" and "cnr" (contrast over noise).
    """
    seed = (seed,) if isinstance(seed, int) else tuple(seed)
    rng = np_rng(*seed)
    kind = CLASSES[int(rng.integers(len(CLASSES)))] if kind is None else kind
    # What has nothing to do with the lesion.
    atrophic, swollen, spotted, cystic = (rng.random(4) < cfg.distractors * _OTHERS).tolist()
    head = anatomy.head(
        rng,
        step=cfg.step_mm,
        warp_mm=cfg.warp_mm,
        atrophy=rng.uniform(2.5, 5) if atrophic else rng.uniform(0, 1),
        ventricles=rng.uniform(1.4, 1.9) if atrophic else rng.uniform(0.85, 1.15),
        sinus=rng.uniform(0.7, 1) if swollen else rng.uniform(0, 0.15),
    )
    cyst_side = ("left", "right")[int(rng.integers(2))]
    if cystic:
        anatomy.add_cyst(rng, head, cyst_side, rng.uniform(12, 20))
    anatomy.add_calcium(rng, head, rng.uniform(2, 7))
    if spotted:
        anatomy.add_spots(rng, head, int(rng.integers(10, 25)), (1.5, 3.0))
    finding = draw_lesion(rng, head, kind, cfg.lesion_scale)
    lesion = None if kind == "normal" else head.lesion_mask()

    count = int(rng.integers(cfg.scans[0], cfg.scans[1] + 1))
    names = rng.permutation(cfg.sequences)[:count]
    values = np.stack([imaging.signals(rng, name) for name in names])
    volumes = imaging.material_volumes(head, values)
    moved = rng.random() < 0.15 * cfg.distractors
    tilt = np.eye(4)
    tilt[:3, :3] = anatomy.rotation(rng.normal(0, 0.08, 3))  # the head's axes are not the scanner's
    scans = []
    for name, volume, signal in zip(names, volumes, values):
        depth = int(rng.integers(cfg.depth[0] // cfg.depth_step, cfg.depth[1] // cfg.depth_step + 1)) * cfg.depth_step
        plane = imaging.PLANES[int(rng.choice(3, p=cfg.planes))]
        one = imaging.scan(
            rng,
            head,
            volume,
            str(name),
            signal,
            lesion,
            shape=(depth, cfg.size, cfg.size),
            plane=plane,
            cover_mm=cfg.cover_mm,
            fov_mm=cfg.fov_mm,
            noise=cfg.noise,
            grey=cfg.grey,
            motion=moved and rng.random() < 0.7,
            raw=raw,
        )
        one["affine"] = tilt @ one["affine"]
        if lesion is not None:
            one["meta"] |= {"lesion_mm": finding.mm, "lesion_ml": finding.ml}
        scans.append(one)
    main = words.lesion_sentence(
        rng,
        None if kind == "normal" else kind,
        side=finding.side,
        region=finding.region,
        mm=finding.mm,
        count=finding.count,
    )
    moved = any(s["meta"]["motion"] for s in scans)
    present = {"atrophy": atrophic, "sinus": swollen, "spots": spotted, "cyst": cystic, "motion": moved}
    others = {k: (cyst_side if k == "cyst" else "") if v else None for k, v in present.items()}
    key = hashlib.sha256(f"phantom {VERSION} {seed}".encode()).hexdigest()[:16]
    return {
        "key": key,
        "patient": key,
        "scans": scans,
        "sentences": words.report(rng, main, others),
        "labels": {name: float(name == kind) for name in CLASSES},
        "split": "",
    }


# ---- A dataset.


def make(
    dir: str | os.PathLike,
    *,
    train: int = 1200,
    val: int = 0,
    test: int = 200,
    seed: int = 0,
    threads: int | None = None,
    shard_records: int = 50,
    **cfg,
) -> Path:
    """Writes a dataset of phantom studies; does nothing if `dir` already holds exactly this one.

    A run that was stopped goes on with the shards that are missing. Ends with a table of the test lesions.

    Args:
      dir: dataset folder (see `data.shards`).
      train, val, test: subjects of each split; none is in two.
      threads: subjects made at once [the number of cores]; the result does not depend on it.
      shard_records: studies per shard.
      **cfg: fields of `Config`.

    Raises:
      UserError: `dir` holds something else, or a field is unknown.
    """
    config = phantom_shards.options(Config, cfg)
    counts = phantom_shards.counts(train, val, test, "subjects")
    recipe = {"name": "phantom", "synthetic": True, "version": VERSION, "seed": seed, "value_range": [0, 255]}
    recipe |= {"counts": counts, "shard_records": shard_records, "config": dataclasses.asdict(config)}
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    dir = Path(dir)
    if not phantom_shards.begin(dir, recipe):
        print(f"{dir}: {sum(counts.values())} phantom studies are there already")
        print(describe(dir))
        return dir

    seeds = [(name, (seed, k, i)) for k, name in enumerate(SPLITS) for i in range(counts[name])]
    parts = [seeds[i : i + shard_records] for i in range(0, len(seeds), shard_records)]

    def one(item):
        split, key = item
        study = subject(key, config)
        return [encode({**study, "split": split})]

    about = {"name": "phantom (synthetic)", "unit": "study", "classes": CLASSES}
    phantom_shards.write(dir, recipe, parts, one, **about, threads=threads)
    print(describe(dir))
    return dir


def describe(dir: str | os.PathLike, split: str = "test") -> str:
    """A table of the lesions of a split: how large they are, and how they stand out in each sequence.

    Sizes are medians with the 10th and 90th percentile; contrast to noise is |lesion - brain around it| over the
    standard deviation of the noise, median.
    """
    dataset = shards.open_dataset(dir)
    if split not in dataset.manifest["splits"]:
        split = next(iter(dataset.manifest["splits"]))
    rows = [(f"synthetic lesions ({split})", "studies", "mm across", "ml", *(f"CNR {k}" for k in imaging.SEQUENCES))]
    studies = dataset.read(shards.split_ids(dataset, split))
    for kind in CLASSES[1:]:
        scans = [s["scans"] for s in studies if s["labels"][kind]]
        first = [x[0]["meta"] for x in scans]
        cells = [kind, str(len(scans))]
        for key in ("lesion_mm", "lesion_ml"):
            values = [m[key] for m in first]
            cells.append("{1:.0f} ({0:.0f}-{2:.0f})".format(*np.percentile(values, (10, 50, 90))) if values else "-")
        for name in imaging.SEQUENCES:
            cnr = [x["meta"]["cnr"] for study in scans for x in study if x["name"] == name and "cnr" in x["meta"]]
            cells.append(f"{np.median(cnr):.1f}" if cnr else "-")
        rows.append(tuple(cells))
    dataset.close()
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxmed.data.sources.phantom", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the dataset, or with --raw of the files")
    parser.add_argument("--raw", type=int, metavar="N", help="write N subjects as NIfTI and DICOM with a manifest.csv")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--val", type=int, default=0)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return exit_code(_make, args)


def _make(args) -> None:
    if args.raw is None:
        make(args.out, train=args.train, val=args.val, test=args.test, seed=args.seed)
        return
    from jaxmed.data.sources.phantom_raw import write_raw

    manifest = write_raw(args.out, args.raw, seed=args.seed)
    print(f"next: python -m jaxmed.prep {args.out} --manifest={manifest} --recipe=hlip_brain_mri --out=DIR")


if __name__ == "__main__":
    sys.exit(main())
