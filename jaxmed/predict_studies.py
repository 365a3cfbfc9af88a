"""Raw studies as a model sees them: found and prepared as `prep` does it, padded to a few shapes."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Num

from jaxmed.core.errors import UserError
from jaxmed.data.record import decode
from jaxmed.prep import discover, recipes, scan
from jaxmed.prep.convert import Converted, Job, convert, where
from jaxmed.prep.pool import Died, Failed, Pool
from jaxmed.prep.run import find_salt

SCANS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40)  # beyond: multiples of 16


class Bucket(NamedTuple):
    """The shape of a compiled program: scans, and (d, h, w) voxels of each, in one dtype."""

    scans: int
    depth: int
    height: int
    width: int
    dtype: str


@dataclasses.dataclass
class Study:
    """A study that can be asked about. Scans are in the order of series numbers, then of places: always the same."""

    key: str
    path: str
    scans: list[dict[str, Any]]  # of `data.record`
    bucket: Bucket
    number: int = 0  # in the order of keys


@dataclasses.dataclass
class Reader:
    """What was found, and then, while `studies` runs, what could not be used."""

    found: list[scan.RawStudy]
    rejects: list[dict[str, Any]]  # lines of `prep_report.json`
    notes: list[dict[str, Any]]
    failed: list[dict[str, str]]  # studies without a prediction: key, path, reason, detail


def choose_recipe(
    known: Mapping[str, Any] | None,
    name: str | None,
    overrides: Sequence[tuple[str, str]],
    img_size: Sequence[int],
) -> recipes.Recipe:
    """The recipe that the user names, else the one that the model's training data were made with; for phantoms, which
    are drawn as the brain recipe stores scans, that one on their grid.

    Raises:
      UserError: neither is known, or an option is wrong.
    """
    if name is not None:
        return recipes.get(name, overrides)
    if _synthetic(known):
        drawn = known["config"]
        grid = [("slices", drawn["depth"][-1]), ("resize", drawn["size"]), ("crop", drawn["size"])]
        return recipes.get("hlip_brain_mri", [*((k, str(v)) for k, v in grid), *overrides])
    d, h, w = img_size
    if known is None or known.get("name") not in recipes.RECIPES:
        what = "is not known here" if known is None else f"is {known.get('name')!r}, which is no recipe of prep"
        raise UserError(
            f"--recipe is missing: how the model's training data were prepared {what}. The model's grid is "
            f"{d}x{h}x{w}; published weights for brain MR and head CT (48x224x224) were trained with "
            "--recipe=hlip_brain_mri and --recipe=hlip_head_ct, those for chest CT with hlip_chest_ct_published; other "
            "grids by --recipe.OPTION=VALUE (python -m jaxmed.prep --list-recipes). With the same flags python -m "
            "jaxmed.port stores it beside the weights"
        )
    recipe = recipes.RECIPES[known["name"]]
    stored = {k: v for step in known.get("steps", ()) for k, v in step.items() if k != "step"}
    stored |= {k: known[k] for k in ("value_range",) if k in known}
    options = {k: _like(stored[k], v) if k in stored else v for k, v in recipe.options.items()}
    recipe = dataclasses.replace(recipe, options=options)
    changed = recipes.get(recipe.name, overrides)  # checks them; those that were given win
    given = {key.partition(".")[0] for key, _ in overrides}
    options = {k: changed.options[k] if k in given else v for k, v in recipe.options.items()}
    modalities = changed.modalities if "modalities" in given else tuple(known.get("modalities", recipe.modalities))
    return dataclasses.replace(recipe, options=options, modalities=modalities)


def remarks(known: Mapping[str, Any] | None, chosen: recipes.Recipe, img_size: Sequence[int]) -> list[str]:
    """What a person should know before believing a prediction, in sentences."""
    said, grid = [], chosen.grid()
    if _synthetic(known):
        said.append(
            "the model has seen phantoms (synthetic brains) only: what it says of real scans means nothing. CT, which "
            "it knows in a brain window, needs --recipe=hlip_head_ct with its slices, resize and crop"
        )
    if grid and grid != tuple(img_size):
        made, own = ("x".join(map(str, x)) for x in (grid, img_size))
        said.append(
            f"recipe {chosen.name} makes scans of {made}, the model's own grid is {own}: positions are resampled"
        )
    return said


def _synthetic(known: Mapping[str, Any] | None) -> bool:
    return known is not None and known.get("name") == "phantom" and "config" in known


def _like(value: Any, default: Any) -> Any:
    """A value that went through JSON, with tuples where the recipe has tuples."""
    return tuple(value) if isinstance(default, tuple) and value is not None else value


def find(
    sources: Sequence[str],
    read: dict[str, Any],
    *,
    out: Path,
    salt_file: str | None = None,
    manifest: Sequence[str] | None = None,
    study: str = "",
    paths: str = "redact",
) -> Reader:
    """Studies among the sources; see `prep.run.prepare` for the arguments.

    Raises:
      UserError: a source does not exist, or there is no study.
    """
    salt = find_salt(out, salt_file, create=True)
    studies, rejects = discover.find_studies(
        sources,
        salt=salt,
        manifest=manifest,
        study=study,
        skip_names=read["skip_names"],
        paths=paths,
        projections=read["projections"],
    )
    return Reader(studies, [dataclasses.asdict(r) for r in rejects], [], [])


def studies(
    reader: Reader, recipe: recipes.Recipe, read: dict[str, Any], *, patch: Sequence[int], workers: int
) -> Iterator[Study]:
    """Prepares one study after the other, as `prep` does; what cannot be used is noted in `reader` with its reason."""
    fields = {f.name for f in dataclasses.fields(scan.ReadOptions)}
    options = scan.ReadOptions(**{k: v for k, v in read.items() if k in fields})
    with tempfile.TemporaryDirectory() as temporary, Pool(workers) as pool:
        job = Job(recipe, options, temporary=temporary)
        for number, (raw, result) in enumerate(pool.run(functools.partial(convert, job), reader.found)):
            path = place(raw)
            if not isinstance(result, Converted):
                lost = ("worker-died", result.how) if isinstance(result, Died) else ("failed", _why(result))
                reader.failed.append({"key": raw.key, "path": path, "reason": lost[0], "detail": lost[1]})
                continue
            reader.notes += result.notes
            if result.data is None:
                own = [r for r in result.rejects if r["kind"] != "study"]
                reader.rejects += own
                why = "; ".join(sorted({f"{r['reason']} ({r['detail']})" if r["detail"] else r["reason"] for r in own}))
                reader.failed.append({"key": raw.key, "path": path, "reason": "no-images", "detail": why})
                continue
            reader.rejects += result.rejects
            scans = decode(result.data)["scans"]
            try:
                yield Study(raw.key, path, scans, bucket_of(scans, patch), number)
            except UserError as e:
                reader.failed.append({"key": raw.key, "path": path, "reason": "does-not-fit", "detail": str(e)})


def _why(failed: Failed) -> str:
    return where(failed.error)


def place(study: scan.RawStudy) -> str:
    """Where a study lies, as prep's report would show it: its file, or the folder that holds all of its files."""
    shown = sorted({f.shown for series in study.series for f in series.files})
    return shown[0] if len(shown) == 1 else os.path.commonpath(shown)


def bucket_of(scans: Sequence[Mapping[str, Any]], patch: Sequence[int]) -> Bucket:
    """The smallest bucket that holds a study: few shapes, so that a folder of studies compiles few programs.

    Depths go up in steps of an eighth to a quarter, in whole patches; in-plane padding has no mask, so there is none.

    Raises:
      UserError: scans of different in-plane sizes, with channels, or smaller than a patch.
    """
    shapes = [s["voxels"].shape for s in scans]
    if any(len(s) != 3 for s in shapes):
        raise UserError("a scan with several channels; this task takes scans with one")
    planes = sorted({s[1:] for s in shapes})
    if len(planes) > 1:
        sizes = ", ".join("x".join(map(str, p)) for p in planes)
        raise UserError(f"scans of different in-plane sizes ({sizes}); use a recipe that brings them to one")
    deepest = max(s[0] for s in shapes)
    if deepest < patch[0] or planes[0][0] < patch[1] or planes[0][1] < patch[2]:
        have, need = ("x".join(map(str, x)) for x in ((deepest, *planes[0]), patch))
        raise UserError(f"no scan fills a patch of {need} voxels: the largest has {have}")
    return Bucket(scans_of(len(scans)), depth_of(deepest, patch[0]), *planes[0], str(scans[0]["voxels"].dtype))


def scans_of(count: int) -> int:
    """The scans of the smallest bucket that holds so many."""
    return next((n for n in SCANS if n >= count), -(-count // 16) * 16)


def depth_of(slices: int, patch: int) -> int:
    """The depth of the smallest bucket that holds so many slices: in steps of an eighth to a quarter, whole patches."""
    slabs = -(-slices // patch)
    step = max(1, 1 << max(0, slabs.bit_length() - 3))
    return -(-slabs // step) * step * patch


def stack(group: Sequence[Study], rows: int) -> dict[str, Num[np.ndarray, "b s d h w"] | Int[np.ndarray, "b s"]]:
    """Studies of one bucket as a batch of `rows`: `image`, and `scan_depths` that say what is real."""
    b = group[0].bucket
    image = np.zeros((rows, b.scans, b.depth, b.height, b.width), b.dtype)
    depths = np.zeros((rows, b.scans), np.int32)
    for i, study in enumerate(group):
        for j, one in enumerate(study.scans):
            depths[i, j] = len(one["voxels"])
            image[i, j, : depths[i, j]] = one["voxels"]
    return {"image": image, "scan_depths": depths}
