"""Studies to shards: planned, parallel, restartable, and a report of everything that was left out.

    OUT/shard-*.array_record, shard-*.json, index.npz, dataset.json     the data set (see `data.shards`)
    OUT/prep_report.json                                                what was refused, and why
    OUT/contact_sheet.png                                               radiographs: some of them, the suspects first
    OUT/.prep/                                                          private: keep it, never pass it on
        salt         secret of the study keys, unless given by file or environment
        run.json     the arguments, so that a restart with others is noticed
        part-*.json  what the report says about the studies of one shard
        tmp/         members of zips, unpacked while they are read

Which study goes into which shard is decided from the sorted list of studies before any voxel is read, and shards are
written one after another in that order. So the bytes of a shard do not depend on the number of workers nor on where an
earlier run was killed; shards that are whole are never written again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxmed.core.errors import UserError
from jaxmed.core.files import is_full, write_file
from jaxmed.data import shards
from jaxmed.data.record import CODECS, DEFAULT_CODEC
from jaxmed.prep import contact_sheet, discover, headers, recipes, sanity, scan, splits
from jaxmed.prep import report as report_file
from jaxmed.prep.convert import Converted, Job, convert, parse_split, where
from jaxmed.prep.pool import Died, Failed, Pool
from jaxmed.prep.sources import find as find_in_source

PRIVATE = ".prep"
SALT_VARIABLE = "JAXMED_PREP_SALT"


def plan_shards(
    studies: Sequence[scan.RawStudy], recipe: recipes.Recipe, *, shard_mb: int, shard_studies: int = 0
) -> list[range]:
    """Consecutive ranges of the sorted studies, one per shard.

    Args:
      shard_mb: aimed size. Estimated from the number of series and the recipe's grid; medical volumes pack to about
        a half; scans that the recipe does not bring to one size count as 16 MB.
      shard_studies: if not 0, exactly so many studies per shard instead.
    """
    if shard_studies:
        return [range(i, min(i + shard_studies, len(studies))) for i in range(0, len(studies), shard_studies)]
    each = (recipe.scan_bytes() or 16 << 20) / 2
    found, first, size = [], 0, 0.0
    for i, study in enumerate(studies):
        size += each * len(study.series)
        if size >= shard_mb << 20:
            found.append(range(first, i + 1))
            first, size = i + 1, 0.0
    return [*found, range(first, len(studies))] if first < len(studies) else found


def find_salt(out: Path, salt_file: str | None, *, create: bool) -> str:
    """The secret of the study keys: from a file, else the environment, else `OUT/.prep/salt`, made there if absent.

    Raises:
      UserError: the file cannot be read or holds fewer than 8 characters.
    """
    own = out / PRIVATE / "salt"
    if salt_file:
        where, path = f"--salt-file={salt_file}", Path(salt_file)
    elif SALT_VARIABLE in os.environ:
        where, path = f"environment variable {SALT_VARIABLE}", None
    else:
        where, path = str(own), own
        if not own.exists():
            salt = secrets.token_hex(32)
            if create:
                _write_private(own, salt)
            return salt
    try:
        salt = os.environ[SALT_VARIABLE].strip() if path is None else path.read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{where}: cannot be read ({type(e).__name__})") from None
    if len(salt) < 8:
        raise UserError(f"{where}: a salt has at least 8 characters; `openssl rand -hex 32` makes a good one")
    return salt


def _write_private(path: Path, text: str) -> None:
    """A file that only its owner may read, from its first byte on."""
    half = path.with_name(f".{path.name}.tmp")
    try:
        with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(half, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; free space or choose another folder") from None


def prepare(
    sources: Sequence[str],
    out: str | os.PathLike,
    *,
    recipe: recipes.Recipe,
    read: dict[str, Any] | None = None,
    manifest: Sequence[str] = (),
    report: str = "sentences",
    labels: Sequence[str] = (),
    study: str = "",
    patient: str = "",
    name: str = "",
    codec: str = DEFAULT_CODEC,
    split: str = "train",
    stratify: int | None = None,
    paths: str = "redact",
    salt_file: str | None = None,
    shard_mb: int = 256,
    shard_studies: int = 0,
    workers: int = 1,
    dry_run: bool = False,
    source: str = "",
    source_options: dict[str, Any] | None = None,
) -> report_file.Summary:
    """From raw scans to a finished data set folder; running it again continues, or finds nothing left to do.

    Args:
      sources, manifest, report, labels, study, patient, paths: see `discover.find_studies`.
      out: folder of the data set.
      recipe: see `recipes.get`.
      read: see `recipes.read_options`.
      name: of the data set; default: the folder's.
      codec: see `data.record`.
      split: shares of the patients whose manifest row names no split, see `parse_split`.
      stratify: seed of a split that shares the rarest labels out, see `splits.stratified`; None: by hash alone.
      salt_file: see `find_salt`.
      shard_mb, shard_studies: see `plan_shards`.
      workers: processes; 0 = this one (then a decoder that crashes takes everything with it).
      source, source_options: a module of `data.sources` and what its `open_dataset` gets, instead of `sources`.
      dry_run: only look for studies; nothing is written.

    Raises:
      UserError: arguments that are wrong or differ from those that `out` was begun with, nothing usable, another prep
        at work in `out`, a full disk.
    """
    started = time.monotonic()
    out = Path(out)
    read = recipes.read_options(recipe) if read is None else dict(read)
    if codec not in CODECS:
        raise UserError(f"--codec={codec}: choose one of {', '.join(CODECS)}")
    for given in sources:
        if not dry_run and out.resolve().is_relative_to(Path(given).resolve()):
            raise UserError(f"--out={out}: lies inside the source {given}; choose a folder outside of the scans")
    if source and read["projections"]:
        raise UserError(
            f"--source={source}: recipe {recipe.name} reads files (DICOM, PNG, JPEG); give a folder of them"
        )
    shares = parse_split(split)
    fields = {f.name for f in dataclasses.fields(scan.ReadOptions)}
    job = Job(
        recipe,
        scan.ReadOptions(**{k: v for k, v in read.items() if k in fields}),
        codec,
        shares,
        str(out / PRIVATE / "tmp"),
    )
    with contextlib.ExitStack() as stack:
        if not dry_run:
            stack.enter_context(_own(out))
        salt = find_salt(out, salt_file, create=not dry_run)
        pool = stack.enter_context(Pool(workers))
        rejects: list[scan.Reject] = []
        if source:
            studies, content = find_in_source(source, source_options or {}, salt)
        else:
            studies, rejects = discover.find_studies(
                sources,
                salt=salt,
                manifest=manifest,
                report=report,
                labels=labels,
                study=study,
                patient=patient,
                skip_names=read["skip_names"],
                paths=paths,
                projections=read["projections"],
                map_fn=functools.partial(_map, pool),
            )
            content = ""
        if stratify is not None:
            splits.stratified(studies, shares, stratify)
        plan = plan_shards(studies, recipe, shard_mb=shard_mb, shard_studies=shard_studies)
        if dry_run:
            summary = report_file.summarise(studies, rejects, [])
            return dataclasses.replace(summary, shards=len(plan), seconds=time.monotonic() - started)
        arguments = {
            "recipe": recipe.describe(),
            "read": read,
            "report": report,
            "codec": codec,
            "split": dict(shares),
            "stratify": stratify,
            "name": name or out.resolve().name,
            "salt": scan.salted_hash(salt, "jaxmed prep"),
            "shards": [len(r) for r in plan],
            "sources": _digest(studies, content),
        }
        _same_run(out, arguments)
        _write_shards(out, job, studies, plan, pool)
        parts = [_part(out, i) for i in range(len(plan))]
        summary = report_file.write(out, arguments, studies, rejects, parts)
        if not summary.studies:
            top = ", ".join(f"{reason} ({n})" for reason, n in summary.rejected.most_common(3)) or "no file at all"
            raise UserError(f"{out}: no usable study among the sources; {report_file.NAME} there says why: {top}")
        stored = {k: arguments[k] for k in ("read", "report", "split", "stratify")}
        shards.finish(out, arguments["name"], {**arguments["recipe"], **stored})
        if job.read.projections:
            contact_sheet.write(out)
    return dataclasses.replace(summary, seconds=time.monotonic() - started)


@contextlib.contextmanager
def _own(out: Path) -> Iterator[None]:
    """Makes the folder ours for the time being, and removes what a killed run left half-written."""
    private = out / PRIVATE
    try:
        private.mkdir(parents=True, exist_ok=True)
        private.chmod(0o700)
        lock = open(private / "lock", "w")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror}); choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out={out}: another prep is at work there; wait for it or choose another folder"
            ) from None
        ours = ("shard-*", shards.INDEX, shards.MANIFEST, report_file.NAME, sanity.SHEET)
        for half in [*private.glob(".*.tmp"), *(p for name in ours for p in out.glob(f".{name}.*.tmp"))]:
            half.unlink()
        temporary = private / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _map(pool: Pool, function, items) -> Iterator[Any]:
    """`map` over the pool for the reading of headers, some files per task; a file that kills its process is refused."""
    for chunk, result in pool.run(functools.partial(_each, function), _chunks(items, 32)):
        if isinstance(result, Died):
            with Pool(1) as other:
                result = [r for _, r in other.run(function, chunk)]
        for found in [result] if isinstance(result, Failed) else result:
            if isinstance(found, Failed):
                raise found.error
            if isinstance(found, Died):
                found = headers.Header("", "unreadable", f"the process that read it died ({found.how})")
            yield found


def _each(function, items: list) -> list:
    return [function(item) for item in items]


def _chunks(items, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _digest(studies: Sequence[scan.RawStudy], content: str) -> str:
    """Hash of everything about the studies that ends up in shards or decides what does."""
    known = [
        [s.key, s.patient, s.sentences, sorted(s.labels.items()), s.split]
        + [[r.key, len(r.files), r.rescale, r.spacing] for r in s.series]
        for s in studies
    ]
    return hashlib.sha256(json.dumps([content, known]).encode()).hexdigest()


def _same_run(out: Path, arguments: dict[str, Any]) -> None:
    """Refuses to continue what was begun with other arguments; notes them if this is the beginning."""
    path = out / PRIVATE / "run.json"
    arguments = json.loads(json.dumps(arguments))
    begun = bool(shards.sidecars(out))
    if begun and not path.exists():
        raise UserError(f"--out={out}: holds shards that this command did not write; choose another folder")
    if not begun:  # nothing that other arguments could contradict
        for part in path.parent.glob("part-*.json"):
            part.unlink()
        write_file(path, json.dumps(arguments, indent=1).encode())
        return
    before = json.loads(path.read_text())
    different = [k for k in arguments if arguments[k] != before.get(k)]
    if not different:
        return
    what = {
        "recipe": lambda: "--recipe (" + ", ".join(_changes(before["recipe"], arguments["recipe"])) + ")",
        "read": lambda: "--read (" + ", ".join(_changes(before["read"], arguments["read"])) + ")",
        "salt": lambda: "the salt",
        "sources": lambda: "the sources or the manifest (other studies, reports, labels or splits)",
        "shards": lambda: "the sources, --shard-mb or --shard-studies",
    }
    first = different[0] if different[0] != "shards" or "sources" not in different else "sources"
    said = what.get(first, lambda: f"--{first} ({before.get(first)} then, {arguments[first]} now)")()
    raise UserError(
        f"--out={out} was begun with other arguments; different: {said}. Repeat the old ones to continue, or choose "
        "another folder"
    )


def _changes(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("name") != new.get("name"):  # another recipe: all the rest differs with it
            return [f"{old.get('name')} then, {new.get('name')} now"]
        keys = [k for k in [*old, *[k for k in new if k not in old]] if old.get(k) != new.get(k)]
        return [c for k in keys for c in _changes(old.get(k), new.get(k), k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [c for a, b in zip(old, new) if a != b for c in _changes(a, b, where)]
    return [f"{where} {json.dumps(old)} then, {json.dumps(new)} now"]


def _part(out: Path, number: int) -> dict[str, Any]:
    return json.loads((out / PRIVATE / f"part-{number:05d}.json").read_text())


def _write_shards(out: Path, job: Job, studies: Sequence, plan: Sequence[range], pool: Pool) -> None:
    """Converts what no whole shard holds yet. The part of the report goes first, the shard makes it count."""
    whole = {s["file"]: s["records"] for s in shards.sidecars(out)}

    def done(number: int) -> bool:
        try:
            part = _part(out, number)
        except (OSError, ValueError):
            return False
        return whole.get(shards.shard_name(number), 0) == part["studies"]

    todo = [i for i in range(len(plan)) if not done(i)]
    kept = sum(len(r) for r in plan) - sum(len(plan[i]) for i in todo)
    results = pool.run(functools.partial(convert, job), (studies[i] for n in todo for i in plan[n]))
    bar = tqdm(total=len(studies), initial=kept, desc="prep", unit="study", mininterval=0.5, file=sys.stderr)
    with bar, contextlib.closing(results):
        for number in todo:
            part: dict[str, Any] = {"studies": 0, "scans": 0, "rejects": [], "notes": [], "images": []}
            with shards.ShardWriter(out, number, job.codec) as writer:
                for _ in plan[number]:
                    result = _settled(out, *next(results))
                    if result.data is not None:
                        writer.add(result.data)
                        part["studies"] += 1
                    part["scans"] += result.scans
                    part["rejects"] += result.rejects
                    part["notes"] += result.notes
                    part["images"] += result.images
                    bar.update()
                write_file(out / PRIVATE / f"part-{number:05d}.json", json.dumps(part).encode())


def _settled(out: Path, study: scan.RawStudy, result: Any) -> Converted:
    """The result of a study whose worker may have died or failed: that costs the study, nothing else."""
    if isinstance(result, Converted):
        return result
    if isinstance(result, Failed) and is_full(result.error):
        raise UserError(
            f"cannot write {out / PRIVATE / 'tmp'}: {os.strerror(result.error.errno)}; free space or choose another "
            "folder, then run the same command again (whole shards are kept)"
        )
    reason, detail = ("worker-died", result.how) if isinstance(result, Died) else ("failed", where(result.error))
    files = sum(len(s.files) for s in study.series)
    return Converted(None, 0, [dataclasses.asdict(scan.Reject(study.key, reason, detail, "study", files))], [], [])
