"""One study to one record: what a worker does, knowing nothing but its job and the study."""

import contextlib
import dataclasses
import hashlib
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmed.core.errors import UserError
from jaxmed.core.files import is_full
from jaxmed.data.record import DEFAULT_CODEC, encode
from jaxmed.prep import recipes, sanity, scan
from jaxmed.prep.sources import SourceStudy

# What the writing half refuses, besides `scan.REASONS`.
REASONS = {
    **scan.REASONS,
    "wrong-modality": "the recipe does not take scans of this modality",
    "constant": "every voxel has the same value",
    "failed": "an error of prep itself, please report it; the study's other series are kept",
    "worker-died": "the process that read this study died, most often for lack of memory or in a decoder",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know to turn a study into a record."""

    recipe: recipes.Recipe
    read: scan.ReadOptions
    codec: str = DEFAULT_CODEC
    split: tuple[tuple[str, float], ...] = (("train", 1.0),)
    temporary: str | None = None  # folder for unpacked members of zips; None = the system's


@dataclasses.dataclass
class Converted:
    """A study after its recipe: the record's bytes (None if nothing was usable) and what to report."""

    data: bytes | None
    scans: int
    rejects: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    images: list[dict[str, Any]]  # of radiographs: what `sanity` counts


def convert(job: Job, study: scan.RawStudy) -> Converted:
    """Reads every series of a study, applies the recipe, encodes the record. Runs in a worker; knows no global state.

    Raises:
      OSError: the disk of the temporary files is full. Everything else is a reject.
    """
    before, tempfile.tempdir = tempfile.tempdir, job.temporary
    try:
        return _convert(job, study)
    finally:
        tempfile.tempdir = before


def _convert(job: Job, study: scan.RawStudy) -> Converted:
    stored: list[dict[str, Any]] = []
    rejects: list[scan.Reject] = []
    notes: list[dict[str, Any]] = []
    said = {"sentences": study.sentences, "labels": study.labels, "split": study.split}

    def keep(raws: list[scan.RawScan], shown: str, files: int) -> None:
        while raws:  # one at a time, so that the voxels of those done can go
            raw = raws.pop(0)
            notes.extend({"study": study.key, "path": shown, "scan": raw.name, **note} for note in raw.notes)
            if problem := _unfit(job.recipe, raw):
                rejects.append(scan.Reject(shown, *problem, "series", files))
            else:
                stored.extend(recipes.apply(job.recipe, raw))

    if isinstance(study, SourceStudy):
        with _guard(rejects, study.key, 0, "study"):
            raws, said = study.read()
            keep(raws, study.key, 0)
    else:
        for series in study.series:
            shown, files = series.files[0].shown, len(series.files)
            with _guard(rejects, shown, files, "series"):
                raws, refused = scan.read_scans(series, job.read)
                rejects += refused
                keep(raws, shown, files)
    data = None
    if stored:
        said["split"] = said["split"] or study.split or split_of(study.patient, job.split)
        with _guard(rejects, study.key, 0, "study"):
            record = {"key": study.key, "patient": study.patient, "scans": recipes.one_dtype(stored), **said}
            data = encode(record, job.codec)
    else:
        rejects.append(scan.Reject(study.key, "no-images", "none of its series gave a scan", "study", 0))
    images = []
    if data and job.read.projections:
        images = [sanity.of_image(study, said["split"], scan, notes) for scan in stored]
    return Converted(data, len(stored) if data else 0, [dataclasses.asdict(r) for r in rejects], notes, images)


@contextlib.contextmanager
def _guard(rejects: list[scan.Reject], path: str, files: int, kind: str) -> Iterator[None]:
    """Turns any error into a reject, but for a full disk, which is nobody's fault among the scans."""
    try:
        yield
    except MemoryError:
        rejects.append(scan.Reject(path, "too-large", "does not fit into memory", kind, files))
    except Exception as e:
        if is_full(e):
            raise
        rejects.append(scan.Reject(path, "failed", where(e), kind, files))


def _unfit(recipe: recipes.Recipe, raw: scan.RawScan) -> tuple[str, str] | None:
    if recipe.modalities and raw.modality not in recipe.modalities:
        taken = " and ".join(m or "unnamed" for m in recipe.modalities)
        return "wrong-modality", f"{raw.modality or 'unnamed'}; recipe {recipe.name} takes {taken}"
    if raw.voxels.ndim != 3 and not (recipe.channels and raw.voxels.ndim == 4):
        return "inconsistent", f"{raw.voxels.ndim} axes; recipe {recipe.name} takes scans with 3"
    if raw.voxels.min() == raw.voxels.max():
        return "constant", f"shape {'x'.join(map(str, raw.voxels.shape))}"
    return None


def where(error: BaseException) -> str:
    """Kind and place of an error. Not its message: that may quote a header or a path."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + place


def split_of(patient: str, split: Sequence[tuple[str, float]]) -> str:
    """The split of a patient: a hash of the (already salted) patient against the cumulated shares."""
    at = int(hashlib.sha256(f"split:{patient}".encode()).hexdigest()[:13], 16) / 16**13
    for name, share in split:
        at -= share
        if at < 0:
            return name
    return split[-1][0]


def parse_split(text: str) -> tuple[tuple[str, float], ...]:
    """`train=0.8,val=0.1,test=0.1` as pairs; a bare name is everything.

    Raises:
      UserError: not of that form, a name twice, or the shares do not sum to 1.
    """
    pairs = []
    for part in text.split(","):
        name, _, share = (p.strip() for p in part.partition("="))
        try:
            pairs.append((name, float(share) if share else 1.0))
        except ValueError:
            pairs.append(("", 0.0))
    names = [n for n, _ in pairs]
    shares = [s for _, s in pairs]
    good = all(re.fullmatch(r"\w+", n) for n in names) and len(set(names)) == len(names)
    if not good or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"--split={text}: give names and shares that sum to 1, e.g. train=0.8,val=0.1,test=0.1")
    return tuple(pairs)
