"""The table that joins reports, labels, splits and patients to studies."""

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxmed.core.errors import UserError
from jaxmed.prep import text
from jaxmed.prep.volumes import stem

# Column (lower case, without spaces, dashes and underscores) -> meaning.
_KEYS = {
    "path": "path",
    "file": "path",
    "filename": "path",
    "folder": "path",
    "studyinstanceuid": "uid",
    "studyuid": "uid",
    "accessionnumber": "accession",
    "accession": "accession",
    "bids": "bids",
    "bidsid": "bids",
    "participantid": "bids",
    "sessionid": "session",
    "volumename": "volume",
    "imageid": "volume",
    "imageindex": "volume",
    "filestem": "volume",
    "split": "split",
    "patient": "patient",
    "patientid": "patient",
    "study": "study",
}
_REPORT = ("report", "sentences", "text")
_LABEL = re.compile(r"label[s]?[:/._](.+)", re.I)
_SPACING = ("xyspacing", "zspacing")
_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
_NUMBERS = ("rescaleslope", "rescaleintercept", "zspacing")


@dataclasses.dataclass
class Row:
    """One row: how it finds its study, and what it says."""

    line: int  # in the file, from 1; the n-th object of a JSON list
    manifest: str = ""  # the file's path
    path: str = ""
    volume: str = ""  # a file's name without its ending, wherever it lies; such a row is about a scan, not a study
    uid: str = ""
    accession: str = ""
    bids: str = ""  # "sub-01" or "sub-01/ses-02"
    study: str = ""  # rows with the same word are one study
    patient: str = ""
    split: str = ""
    sentences: list[str] = dataclasses.field(default_factory=list)
    labels: dict[str, float] = dataclasses.field(default_factory=dict)
    # What the headers of volumes lack: "rescale" is (slope, intercept), "spacing" mm along (k, j, i) of the file.
    volumes: dict[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Manifest:
    """One table: its rows, and the columns that nothing reads."""

    path: str
    rows: list[Row]
    unread: list[str]


def read_manifests(
    paths: Sequence[str | Path], report: str = "sentences", labels: Sequence[str] = ()
) -> list[Manifest]:
    """Several tables about the same studies, e.g. one of reports, one of labels, one of metadata.

    Args:
      report: "sentences", or another of `text.FORMS`, composed in those tables that have its columns.
      labels: columns that are labels without saying so, or files: tables whose every other column is a label (they
        are read like manifests and need not be among `paths`).

    Raises:
      UserError: see `read_manifest`; no table has the columns of `report`; no table has a column of `labels`.
    """
    names = [n for n in labels if Path(n).suffix.lower() not in _KINDS]
    tables = {os.path.abspath(n): n for n in labels if n not in names}
    paths = [*paths, *(n for at, n in tables.items() if at not in {os.path.abspath(p) for p in paths})]
    if not paths:
        if names:
            raise UserError(f"--labels={','.join(names)}: columns need a table; give it with --manifest=FILE")
        return []
    if report not in text.FORMS:
        raise UserError(f"--report={report}: choose one of {', '.join(text.FORMS)}")
    read = [_records(Path(p)) for p in paths]
    headers = [{str(c): None for _, record in records for c in record} for records in read]
    columns = {c.strip().lower() for header in headers for c in header}
    for name in names:
        if name.strip().lower() not in columns:
            known = ", ".join(c for header in headers for c in header)
            raise UserError(f"--labels={name}: no manifest has this column; there are {known}")
    composing = [report not in ("sentences", "none") and text.has(header, report) for header in headers]
    if report not in ("sentences", "none") and not any(composing):
        text.compose(dict(read[0][0][1]), report, f"manifest {paths[0]}")  # raises, naming the columns
    wanted = {n.strip().lower() for n in names}
    result = []
    for path, records, header, here in zip(paths, read, headers, composing):
        every = os.path.abspath(path) in tables
        rows = []
        for line, record in records:
            row = _row(Path(path), line, record, wanted, every)
            if report != "sentences":
                row.sentences = (
                    text.compose({**header, **record}, report, f"manifest {path}, line {line}") if here else []
                )
            rows.append(row)
        used = text.columns_of(header, report) if here else []
        unread = [c for c in header if c not in used and not every and not _meaning(c, wanted)]
        result.append(Manifest(str(path), rows, unread))
    return result


def read_manifest(path: str | Path, report: str = "sentences", labels: Sequence[str] = ()) -> list[Row]:
    """Reads CSV, TSV, JSON (a list of objects) or JSON lines.

    Names of columns are compared without capitals, blanks, `-` and `_`. A row finds its study by `path` (a file or
    folder, relative to the manifest or to a source), `StudyInstanceUID`, `AccessionNumber`, or `bids` /
    `participant_id` (with `session_id`), or its scan by `VolumeName` (or `image_id`,
    `Image Index`, `filestem`: a file's name, wherever the file lies); a row
    with several needs one that matches. `report` is a text (split into sentences) or in JSON a list of sentences;
    `label:NAME` or `label_NAME` columns, or `labels` as an object in JSON, are numbers (empty = missing; true/false,
    yes/no count as 1/0); `split` and `patient` are words; rows of the same `study` are one study. `RescaleSlope`,
    `RescaleIntercept`, `XYSpacing` ("[0.7, 0.7]", rows first as in DICOM, or one number) and `ZSpacing` (mm) replace
    what the headers of NIfTI and NRRD files say, as CT-RATE needs it. Other columns are ignored.

    Args:
      report, labels: see `read_manifests`.

    Raises:
      UserError: names the file, the line and the column.
    """
    return read_manifests([path], report, labels)[0].rows


def _records(path: Path) -> list[tuple[int, dict]]:
    """(line, columns) of every row."""
    suffix = path.suffix.lower()
    if suffix not in _KINDS:
        raise UserError(f"manifest {path}: unknown kind {suffix!r}; give .csv, .tsv, .json or .jsonl")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"manifest {path}: the file does not exist") from None
    except OSError as e:
        raise UserError(f"manifest {path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"manifest {path}: is not UTF-8 text; save it as CSV UTF-8") from None
    if suffix in (".csv", ".tsv"):
        records = _csv(path, content, "\t" if suffix == ".tsv" else None)
    else:
        records = _json(path, content, lines=suffix != ".json")
    if not records:
        raise UserError(f"manifest {path}: no rows; it needs a header line and one row per study")
    return records


def _csv(path: Path, content: str, delimiter: str | None) -> list[tuple[int, dict]]:
    if delimiter is None:
        first = content.split("\n", 1)[0]
        delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, dict]] = []
    header: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not any(c.strip() for c in cells):
                continue
            if header is None:
                header = [c.strip() for c in cells]
                twice = sorted({c for c in header if c and header.count(c) > 1})
                if twice:
                    raise UserError(f"manifest {path}, line {line}: column {twice[0]!r} appears twice; rename one")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"manifest {path}, line {line}: {len(cells)} cells but {len(header)} columns; "
                    f"quote texts that hold {delimiter!r}"
                )
            records.append((line, dict(zip(header, cells))))
    except csv.Error as e:
        raise UserError(f"manifest {path}, line {begin}: not valid CSV ({e}); check the quotes") from None
    return records


def _json(path: Path, content: str, lines: bool) -> list[tuple[int, dict]]:
    records: list[tuple[int, object]] = []
    if lines:
        for line, part in enumerate(content.splitlines(), 1):
            if part.strip():
                try:
                    records.append((line, json.loads(part)))
                except json.JSONDecodeError as e:
                    raise UserError(
                        f"manifest {path}, line {line}, column {e.colno}: not valid JSON ({e.msg})"
                    ) from None
    else:
        try:
            found = json.loads(content)
        except json.JSONDecodeError as e:
            raise UserError(f"manifest {path}, line {e.lineno}, column {e.colno}: not valid JSON ({e.msg})") from None
        if not isinstance(found, list):
            raise UserError(f"manifest {path}: a JSON manifest is a list of objects, one per study")
        records = list(enumerate(found, 1))
    for line, record in records:
        if not isinstance(record, dict):
            raise UserError(f"manifest {path}, entry {line}: not an object")
    return records  # type: ignore[return-value]


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]", "", column.lower())


def _meaning(column: str, labels: set[str]) -> str:
    """What reads a column: a field of `Row`, "session", "report", "label", "labels", "volumes", or "" for nothing."""
    plain = _plain(column)
    if column.strip().lower() in labels:
        return "label"
    if plain in _KEYS:
        return _KEYS[plain]
    if plain in _REPORT:
        return "report"
    if plain in _NUMBERS or plain in _SPACING:
        return "volumes"
    if plain == "labels":
        return "labels"
    return "label" if _LABEL.fullmatch(column.strip()) else ""


def _row(path: Path, line: int, record: dict, labels: set[str], every: bool) -> Row:
    row, session, numbers = Row(line, str(path)), "", {}
    for column, content in record.items():
        column = str(column)
        meaning = _meaning(column, labels) or ("label" if every else "")
        where = f"manifest {path}, line {line}, column {column!r}"
        if meaning == "report":
            row.sentences = _sentences(where, content)
        elif meaning == "label":
            prefixed = _LABEL.fullmatch(column.strip())
            _label(where, row, (prefixed[1] if prefixed else column).strip(), content)
        elif meaning == "labels":
            if content in (None, ""):
                continue
            if not isinstance(content, dict):
                raise UserError(f"{where}: needs an object {{name: number}}; in CSV use columns 'label:NAME'")
            for name, found in content.items():
                _label(where, row, str(name), found)
        elif meaning == "volumes":
            numbers[_plain(column)] = _numbers(where, _plain(column), content)
        elif meaning:
            word = "" if content is None else str(content).strip()
            if isinstance(content, (dict, list)):
                raise UserError(f"{where}: a word is needed, not {type(content).__name__}")
            if meaning == "session":
                session = word
            elif word:
                setattr(row, meaning, word)
    slope, intercept = numbers.get("rescaleslope"), numbers.get("rescaleintercept")
    if slope or intercept:
        row.volumes["rescale"] = ((slope or (1.0,))[0], (intercept or (0.0,))[0])
    inplane, step = numbers.get("xyspacing"), numbers.get("zspacing")
    if inplane or step:
        inplane = (inplane or (None,)) * (2 if len(inplane or (None,)) == 1 else 1)
        row.volumes["spacing"] = ((step or (None,))[0], *inplane)
    row.volume = stem(row.volume)
    if row.bids:
        row.bids = row.bids if row.bids.startswith("sub-") else f"sub-{row.bids}"
        if session:
            row.bids += "/" + (session if session.startswith("ses-") else f"ses-{session}")
    if not (row.path or row.volume or row.uid or row.accession or row.bids):
        raise UserError(
            f"manifest {path}, line {line}: nothing names the study; fill one of the columns 'path', 'VolumeName', "
            f"'StudyInstanceUID', 'AccessionNumber' or 'bids' (it has {', '.join(map(str, record))})"
        )
    return row


def _numbers(where: str, plain: str, content) -> tuple[float, ...]:
    """The numbers of a cell such as "0.7", "[0.7, 0.7]" or [0.7, 0.7]; () if it is empty."""
    if content is None or str(content).strip().lower() in ("", "nan", "n/a", "na", "none"):
        return ()
    listed = content if isinstance(content, list) else re.split(r"[,;\s]+", str(content).strip().strip("[]()").strip())
    try:
        found = tuple(float(v) for v in listed)
    except (TypeError, ValueError):
        found = ()
    most = 2 if plain == "xyspacing" else 1
    good = 1 <= len(found) <= most and all(math.isfinite(v) for v in found)
    if not good or (plain in _SPACING and min(found) <= 0) or (plain == "rescaleslope" and not found[0]):
        kind = {"xyspacing": "one or two positive numbers (mm)", "zspacing": "a positive number (mm)"}.get(
            plain, "a number" + (" other than 0" if plain == "rescaleslope" else "")
        )
        raise UserError(f"{where}: {content!r} is not {kind}; correct it, or leave the cell empty")
    return found


def _label(where: str, row: Row, name: str, content) -> None:
    if isinstance(content, str):
        content = content.strip()
        content = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}.get(content.lower(), content)
    if content is None or content in ("", "n/a", "NA", "nan", "NaN"):
        return
    try:
        found = float(content)
    except (TypeError, ValueError):
        raise UserError(f"{where}: label {name!r} is {content!r}; it needs a number, or nothing if unknown") from None
    if math.isinf(found):
        raise UserError(f"{where}: label {name!r} is infinite; it needs a number, or nothing if unknown")
    if not math.isnan(found):
        row.labels[name] = found


def _sentences(where: str, content) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return split_sentences(content)
    if isinstance(content, list) and all(isinstance(c, str) for c in content):
        return [s for s in (" ".join(c.split()) for c in content) if s]
    raise UserError(f"{where}: a report is a text or a list of texts")


# Words whose full stop ends no sentence. "no" is not among them: "... masses? No." is more frequent than "No. 4".
_ABBREVIATIONS = {
    *(
        "dr",
        "mr",
        "mrs",
        "ms",
        "prof",
        "st",
        "vs",
        "approx",
        "ca",
        "cf",
        "eg",
        "ie",
        "fig",
        "figs",
        "max",
        "min",
        "resp",
    ),
    *("incl", "excl", "dept", "ant", "post", "lat", "med", "sup", "inf"),
    *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"),
}


def split_sentences(report: str) -> list[str]:
    """A report as sentences: split after . ! ? before a new start, at blank lines and at list items.

    Decimals ("1.5 cm"), abbreviations and initials do not end a sentence; a line break inside a sentence is a blank;
    headings that stand alone ("IMPRESSION:") are dropped.
    """
    result: list[str] = []
    text = report.replace("\r\n", "\n").replace("\r", "\n")
    # A new paragraph, a list item or a heading in capitals begins anew, whether or not the one before has a stop.
    for block in re.split(
        r"\n\s*\n|\n(?=\s*(?:[-*\u2022]|\d{1,2}[.)])\s)|\n(?=\s*[A-Z][A-Z /&-]{2,}:)|(?<=[A-Z]:)\s*\n", text
    ):
        block = re.sub(r"^\s*(?:[-*\u2022]|\d{1,2}[.)])\s+", "", block)
        block = " ".join(block.split())
        start = 0
        for match in re.finditer(r"[.!?]+[\"')\]]*(?=\s+[\"'(\[]?[A-Z0-9])", block):
            before = block[start : match.start()].split(" ")[-1].lstrip("\"'([")
            short = re.fullmatch(r"[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]", before)  # initials, "e.g", "a.m"
            listed = re.fullmatch(r"\d{1,2}", before) and match.start() - start == len(before)  # "3. Lung"
            if match.group().startswith(".") and (before.lower() in _ABBREVIATIONS or short or listed):
                continue
            result.append(block[start : match.end()])
            start = match.end() + 1
        result.append(block[start:])
    return [s for s in (r.strip() for r in result) if re.search(r"\w", s) and not re.fullmatch(r"[A-Z][A-Z /&-]*:", s)]
