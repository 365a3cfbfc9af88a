"""The table that joins reports, labels, splits and patients to studies."""

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

from jaxmed.core.errors import UserError
from jaxmed.prep import text

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
}
_REPORT = ("report", "sentences", "text")
_OTHER = ("split", "patient", "study")
_LABEL = re.compile(r"label[s]?[:/.](.+)", re.I)


@dataclasses.dataclass
class Row:
    """One row: how it finds its study, and what it says."""

    line: int  # in the file, from 1; the n-th object of a JSON list
    path: str = ""
    uid: str = ""
    accession: str = ""
    bids: str = ""  # "sub-01" or "sub-01/ses-02"
    study: str = ""  # rows with the same word are one study
    patient: str = ""
    split: str = ""
    sentences: list[str] = dataclasses.field(default_factory=list)
    labels: dict[str, float] = dataclasses.field(default_factory=dict)


def read_manifest(path: str | Path, report: str = "sentences") -> list[Row]:
    """Reads CSV, TSV, JSON (a list of objects) or JSON lines.

    A row finds its study by `path` (a file or folder, relative to the manifest or to a source), `StudyInstanceUID`,
    `AccessionNumber`, or `bids` / `participant_id` (with `session_id`); a row with several needs one that matches.
    `report` is a text (split into sentences) or in JSON a list of sentences; `label:NAME` columns, or `labels` as an
    object in JSON, are numbers (empty = missing; true/false, yes/no count as 1/0); `split` and `patient` are words;
    rows of the same `study` are one study. Other columns are ignored.

    Args:
      report: "sentences", or another of `text.FORMS` that composes the report from other columns.

    Raises:
      UserError: names the file, the line and the column.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"manifest {path}: the file does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"manifest {path}: cannot be read as UTF-8 text ({type(e).__name__}); save it as UTF-8"
        ) from None
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        records = _json(path, content, lines=suffix != ".json")
    elif suffix in (".csv", ".tsv"):
        records = _csv(path, content, "\t" if suffix == ".tsv" else None)
    else:
        raise UserError(f"manifest {path}: unknown kind {suffix!r}; give .csv, .tsv, .json or .jsonl")
    if report not in text.FORMS:
        raise UserError(f"--report={report}: choose one of {', '.join(text.FORMS)}")
    rows = [_row(path, line, record) for line, record in records]
    if report != "sentences":
        for row, (line, record) in zip(rows, records):
            row.sentences = text.compose(record, report, f"manifest {path}, line {line}")
    if not rows:
        raise UserError(f"manifest {path}: no rows; it needs a header line and one row per study")
    return rows


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


def _row(path: Path, line: int, record: dict) -> Row:
    row, session = Row(line), ""
    for column, content in record.items():
        plain = re.sub(r"[\s_-]", "", str(column).lower())
        label = _LABEL.fullmatch(str(column).strip())
        where = f"manifest {path}, line {line}, column {column!r}"
        if plain in _KEYS or plain in _OTHER:
            word = "" if content is None else str(content).strip()
            if isinstance(content, (dict, list)):
                raise UserError(f"{where}: a word is needed, not {type(content).__name__}")
            meaning = _KEYS.get(plain, plain)
            if meaning == "session":
                session = word
            elif word:
                setattr(row, meaning, word)
        elif plain in _REPORT:
            row.sentences = _sentences(where, content)
        elif label:
            _label(where, row, label[1].strip(), content)
        elif plain == "labels" and content not in (None, ""):
            if not isinstance(content, dict):
                raise UserError(f"{where}: needs an object {{name: number}}; in CSV use columns 'label:NAME'")
            for name, found in content.items():
                _label(where, row, str(name), found)
    if row.bids:
        row.bids = row.bids if row.bids.startswith("sub-") else f"sub-{row.bids}"
        if session:
            row.bids += "/" + (session if session.startswith("ses-") else f"ses-{session}")
    if not (row.path or row.uid or row.accession or row.bids):
        raise UserError(
            f"manifest {path}, line {line}: nothing names the study; fill one of the columns 'path', "
            "'StudyInstanceUID', 'AccessionNumber' or 'bids'"
        )
    return row


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
