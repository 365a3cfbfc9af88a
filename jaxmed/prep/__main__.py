"""`python -m jaxmed.prep`: raw scans to shards, and a vocabulary from reports."""

import argparse
import csv
import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from jaxmed.core.command import exit_code
from jaxmed.core.errors import UserError

EPILOG = """\
recipes (all their options: --list-recipes):
{recipes}
  --recipe.OPTION=VALUE changes one option, e.g. --recipe.slices=24, --recipe.size=112,256,256,
  --recipe.windows.blood=80,200, --recipe.modalities=CT. --read.OPTION=VALUE changes how files are read, e.g.
  --read.max_missing=0, --read.skip_names=mask. Both are stored with the shards.

manifest:
  One row per study (or per file), found by one of the columns: path (file or folder, relative to the manifest or to
  SRC), StudyInstanceUID, AccessionNumber, bids or participant_id with session_id, VolumeName (a file's name, wherever
  it lies). What it says: report (text, split into sentences; in JSON also a list), label:NAME or label_NAME (numbers,
  yes/no, empty = unknown; in JSON also labels = an object), split, patient, study (rows with the same word are one
  study), RescaleSlope, RescaleIntercept, XYSpacing, ZSpacing (replace what NIfTI and NRRD headers say).
  Capitals, blanks, - and _ in these names do not matter. Several manifests are joined on the studies they find.
  CT-RATE as published: SRC = dataset/train, and
    --manifest=train_reports.csv --manifest=train_metadata.csv --labels=train_predicted_labels.csv
    --report=ct_rate_raw --recipe=hlip_chest_ct --patient='train_\\d+'
  The reconstructions train_1_a_1, train_1_a_2 lie in one folder and so are scans of one study; if yours lie otherwise,
  add --study='train_\\d+_[a-z]+'. A config with buckets scans=(1,) then draws one of them per study and epoch. Volumes
  whose headers and values are repaired already (train_fixed) need no metadata table.

sources:
  --source=tfds --source.dir=FOLDER --source.image=FIELD --source.text=FIELD makes shards of a TensorFlow Datasets set
  that is stored as array_record (pip install 'jaxmed[tfds]'); other options are those of its open_dataset.

radiographs:
  --recipe=radiograph makes one record of every single-frame DICOM projection, PNG and JPEG: native size, the stored
  values, and beside them windows, tables, inversion, spacing, region, side, view and the collimated field; training
  turns them into pictures. Rows about a folder, study or patient hold for all of its images; image_id, Image Index and
  filestem name a file as VolumeName does. Pictures know no patient: give --patient=REGEX or the manifest's column, e.g.
    --recipe=radiograph --patient='patient\\d+' --split=train=0.8075,val=0.0425,test=0.15 --stratify=42
  --read.secondary=true keeps images whose type says secondary, --read.min_side=N sets the smallest side.
  OUT/prep_report.json has a section "sanity" (inverted, clipped, text in the pixels, photometric disagreement, copies),
  OUT/contact_sheet.png shows suspects first. Look at it before you pass the data set on.

identities:
  The keys of studies and patients are hashes with a secret, the salt: the same salt gives the same keys, without it
  nobody can compute them. It comes from --salt-file, else from the environment variable JAXMED_PREP_SALT, else it is
  made once and kept in OUT/.prep/salt (readable by you only). Keep it to join the data later; leave the folder .prep
  out when you pass the data set on.

again:
  The same command continues after a stop, a kill or a full disk: whole shards are kept, half-written files are removed.
  Shards hold the same bytes for any number of workers. Other arguments on the same OUT are refused.

report:
  OUT/prep_report.json lists every file and series that was left out, with its reason. Exit code 0: the data set is
  finished (also if some files were refused); 2: it is not, and one line says why.

vocab:
  python -m jaxmed.prep vocab --reports=TABLE_OR_TEXT_OR_DATASET ... --size=N --out=vocab.txt
"""


def _stopped(*_) -> None:
    """SIGTERM of a batch system: leave through the exits, so that nothing half-written stays."""
    print("error: stopped; run the same command again to continue", file=sys.stderr)
    sys.exit(143)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    """Runs the command in this process; returns the exit code."""
    return exit_code(_vocab, argv[1:]) if argv[:1] == ["vocab"] else exit_code(_prep, argv)


def _prep(argv: list[str]) -> int:
    from jaxmed.data.record import CODECS, DEFAULT_CODEC
    from jaxmed.prep import recipes, text

    lines = "\n".join(f"  {r.name:24} {r.about}" for r in recipes.RECIPES.values())
    parser = _Parser(
        prog="python -m jaxmed.prep",
        description="Turns folders and zips of DICOM, NIfTI, NRRD and BIDS (radiographs: PNG, JPEG too) into a jaxmed "
        "data set of shards.",
        epilog=EPILOG.format(recipes=lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    forms = "; ".join(f"{k}: {v}" for k, v in text.FORMS.items())
    add = parser.add_argument
    add("sources", nargs="*", metavar="SRC", help="folder, zip or image file")
    add("--out", metavar="DIR", help="folder of the data set")
    add("--source", default="", metavar="NAME", help="a module of jaxmed/data/sources instead of SRC, see below")
    add(
        "--manifest",
        action="append",
        default=[],
        metavar="FILE",
        help="CSV, TSV, JSON or JSON lines with reports, labels, splits of the studies, see below; may be repeated",
    )
    add(
        "--labels",
        action="append",
        default=[],
        metavar="COLUMNS",
        help="columns that are labels without the prefix label:, with commas between; or a table whose every other "
        "column is one; may be repeated",
    )
    add("--study", default="", metavar="REGEX", help="what it matches in a file's place names its study")
    add("--patient", default="", metavar="REGEX", help="what it matches in a file's place names its patient")
    add("--report", metavar="FORM", default="sentences", choices=text.FORMS, help=f"text of a study: {forms}")
    add("--recipe", metavar="NAME", default="native", help="how scans are stored (default: native)")
    add("--list-recipes", action="store_true", help="print the recipes with all their options as JSON and stop")
    add("--split", default="train", help="shares of patients, e.g. train=0.8,val=0.1,test=0.1 (default: all train)")
    add(
        "--stratify",
        type=int,
        metavar="SEED",
        help="share patients out by their rarest label (radiographs without labels: region) instead of by hash alone, "
        "so that every split has its part of every label; 15%% test, then 5%% of the others val, is "
        "--split=train=0.8075,val=0.0425,test=0.15",
    )
    add("--name", default="", help="of the data set (default: the name of OUT)")
    add(
        "--codec",
        default=DEFAULT_CODEC,
        help=f"of the records: {', '.join(CODECS)} (default: {DEFAULT_CODEC}; b2nd: for volumes read by crop)",
    )
    add(
        "--paths",
        default="redact",
        choices=("redact", "hash", "keep"),
        help="places in the report: redact hides names and numbers "
        "that headers hold, UIDs and dates; hash hides everything",
    )
    add("--salt-file", metavar="FILE", help="see below")
    add("--shard-mb", type=int, default=256, metavar="MB", help="aimed size of a shard (default: 256)")
    add("--shard-studies", type=int, default=0, metavar="N", help="exactly so many studies per shard instead")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: all cores); 0: this one")
    add("--dry-run", action="store_true", help="only look for studies and count them")
    args, rest = parser.parse_known_args(argv)
    if args.list_recipes:
        print(json.dumps({r.name: {**r.describe(), "options": r.options} for r in recipes.RECIPES.values()}, indent=1))
        return 0
    overrides: dict[str, list[tuple[str, str]]] = {"recipe": [], "read": [], "source": []}
    for extra in rest:
        key, equals, value = extra.removeprefix("--").partition("=")
        group, _, option = key.partition(".")
        if not extra.startswith("--") or group not in overrides or not option or not equals:
            parser.error(f"unknown argument {extra}; options of recipes are written --recipe.OPTION=VALUE")
        overrides[group].append((option, value))
    if bool(args.sources) == bool(args.source):
        parser.error("give either folders, zips or files with scans, or --source=NAME")
    joining = [f"--{k}" for k in ("manifest", "labels", "study", "patient") if getattr(args, k)]
    if args.source and joining:
        parser.error(f"{joining[0]} is about files; a --source brings its own reports, labels and patients")
    args.labels = [part.strip() for text in args.labels for part in text.split(",") if part.strip()]
    if overrides["source"] and not args.source:
        parser.error("--source.OPTION needs --source=NAME")
    if not args.out and not args.dry_run:
        parser.error("--out=DIR is missing")
    for flag, low in (("shard_mb", 1), ("shard_studies", 0), ("workers", 0)):
        if getattr(args, flag) < low:
            parser.error(f"--{flag.replace('_', '-')}={getattr(args, flag)} must be {low} or more")
    recipe = recipes.get(args.recipe, overrides["recipe"])
    read = recipes.read_options(recipe, overrides["read"])
    passed = {k: v for k, v in vars(args).items() if k not in ("sources", "out", "recipe", "list_recipes")}

    from jaxmed.prep import run, sources

    passed["source_options"] = sources.parse(overrides["source"])
    summary = run.prepare(args.sources, args.out or ".", recipe=recipe, read=read, **passed)
    _table(summary, args)
    return 0


def _table(summary, args) -> None:
    rows = [("studies found", summary.studies_found)]
    if args.manifest or args.labels:
        rows += [("  with a report", summary.reports), ("  with labels", summary.labelled)]
    if args.dry_run:
        rows += [("shards planned", summary.shards)]
    else:
        rows += [("studies written", summary.studies), ("scans", summary.scans), ("shards", summary.shards)]
        rows += [("MB", f"{summary.bytes / 1e6:.1f}")]
    rows += [(f"refused: {reason}", n) for reason, n in summary.rejected.most_common()]
    rows += [(f"noted: {reason}", n) for reason, n in summary.noted.most_common()]
    rows += [("seconds", f"{summary.seconds:.1f}")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value:>10}")
    for table, columns in summary.unread.items():
        print(f"columns of {table} that mean nothing to prep: {textwrap.shorten(columns, 200, placeholder=' ...')}")
    if summary.report is not None:
        refused = sum(summary.rejected.values())
        print(f"{args.out} is ready; {refused or 'nothing'} refused{f', see {summary.report}' if refused else ''}")


def _vocab(argv: list[str]) -> int:
    parser = _Parser(
        prog="python -m jaxmed.prep vocab",
        description="Trains a WordPiece vocabulary on reports.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--reports",
        action="append",
        required=True,
        metavar="PATH",
        help="a data set made by prep (its split `train`), a CSV, TSV, JSON or JSON lines table, or a text file with "
        "one report per line; may be repeated",
    )
    add("--column", action="append", help="of a table (default: report, text, findings, impression, sentences)")
    add("--size", type=int, required=True, metavar="N", help="pieces at most")
    add("--out", required=True, metavar="FILE", help="vocab.txt to write")
    add("--cased", action="store_true", help="keep capitals and accents")
    args = parser.parse_args(argv)

    from jaxmed.data.tokenize import train_wordpiece

    texts = [t for path in args.reports for t in _texts(Path(path), args.column)]
    path = train_wordpiece(texts, args.size, args.out, lowercase=not args.cased)
    with open(path) as f:
        print(f"{path}: {sum(1 for _ in f)} pieces from {len(texts)} texts")
    return 0


def _texts(path: Path, columns: list[str] | None) -> Iterator[str]:
    if path.is_dir():
        from jaxmed.data.shards import open_dataset, split_ids

        dataset = open_dataset(path)
        for i in split_ids(dataset, "train"):
            yield from dataset.record(int(i)).sentences
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(content)
        elif path.suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            rows = list(
                csv.DictReader(content.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",")
            )
        else:
            yield from (line for line in content.splitlines() if line.strip())
            return
        known = {name for row in rows for name in row if name is not None}
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as e:
        raise UserError(f"--reports={path}: cannot be read ({type(e).__name__})") from None
    usual = ("report", "text", "findings", "impression", "sentences")
    wanted = columns or sorted(c for c in known if str(c).lower() in usual)
    missing = [c for c in wanted if c not in known]
    if missing or not wanted:
        raise UserError(
            f"--reports={path}: no column {', '.join(missing) or ' or '.join(usual)}; it has "
            f"{', '.join(map(str, sorted(known)))}; name it with --column"
        )
    for row in rows:
        for column in wanted:
            value = row.get(column) or ""
            yield from value if isinstance(value, list) else [str(value)]


if __name__ == "__main__":
    # Workers inherit these: one thread each, and a malloc that keeps volume-sized buffers instead of returning their
    # pages to the system (4-6 times faster for volumes).
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(64 << 20))
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main(sys.argv[1:]))
