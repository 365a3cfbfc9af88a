"""Published tables of labels as manifests for `prep`: one row per study, columns "label:NAME" as the suites name them.

Every function takes the rows of a table as {column: text} and gives rows of a manifest (see `python -m jaxmed.prep
--help`): what finds the study, `split`, and the labels, 1, 0 or "" (unknown).
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pydicom

from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file
from jaxmed.evals import scores, suites

Row = dict[str, str]

# Rad-ChestCT calls them otherwise; other findings have the same name.
RAD_CHEST_CT = {
    "Lung nodule": "nodule",
    "Lung opacity": "opacity",
    "Pulmonary fibrotic sequela": "fibrosis",
    "Peribronchial thickening": "bronchial_wall_thickening",
    "Interlobular septal thickening": "septal_thickening",
    "Hiatal hernia": "hernia",
    "Calcification": "calcification",
}
CQ500_LEFT_OUT = ("CQ500-CT-163",)


def rad_chest_ct(rows: Sequence[Row], joined: str | None, where: str) -> list[Row]:
    """imgtest_Abnormality_and_Location_Labels.csv: columns NoteAcc_DEID and "abnormality*location".

    A finding is present if it is at any location: the largest of its columns. There is one calcification label for the
    two calcification scores of the suite.

    Args:
      joined: CT_Scan_Metadata_Complete_35747.csv, for the patients (several scans may be of one).
    """
    patients = {}
    if joined is not None:
        patients = {r["NoteAcc_DEID"]: r["MRN_DEID"] for r in read(joined, ("NoteAcc_DEID", "MRN_DEID"))}
    columns: dict[str, list[str]] = {}
    for column in rows[0]:
        columns.setdefault(column.partition("*")[0], []).append(column)
    wanted = {}
    for name in _labels("rad_chest_ct"):
        finding = RAD_CHEST_CT.get(name, name.lower().replace(" ", "_"))
        if finding not in columns:
            raise UserError(f"{where}: it has no column {finding!r} or '{finding}*LOCATION', which {name} needs")
        wanted[name] = columns[finding]
    made = []
    for i, row in enumerate(rows, 2):
        name = _cell(row, "NoteAcc_DEID", where)
        new = {"VolumeName": name} | ({"patient": patients.get(name, name)} if patients else {})
        for label, parts in wanted.items():
            values = [_number(row[c], f"{where}, line {i}, column {c!r}") for c in parts]
            new[f"label:{label}"] = _text(max((v for v in values if v is not None), default=None))
        made.append(new)
    return made


def cq500(rows: Sequence[Row], joined: str | None, where: str) -> list[Row]:
    """reads.csv: columns name and R1:TARGET, R2:TARGET, R3:TARGET. A label is what at least two of the readers say.

    The folder of study CQ500-CT-7 is "CQ500CT7 CQ500CT7" in the published archives.
    """
    _no_join(joined, "cq500")
    made = []
    for i, row in enumerate(rows, 2):
        name = _cell(row, "name", where)
        if name in CQ500_LEFT_OUT:
            continue
        folder = name.replace("-", "")
        new = {"path": f"{folder} {folder}"}
        for target in _labels("cq500"):
            reads = [
                _number(_cell(row, f"R{reader}:{target}", where), f"{where}, line {i}, column 'R{reader}:{target}'")
                for reader in (1, 2, 3)
            ]
            yes, no = (sum(r is not None and (r > 0.5) == said for r in reads) for said in (True, False))
            new[f"label:{target}"] = "1" if yes >= 2 else "0" if no >= 2 else ""
        made.append(new)
    return made


def rsna(rows: Sequence[Row], joined: str | None, where: str) -> list[Row]:
    """stage_2_train.csv: columns ID ("ID_12cadc6af_epidural") and Label, a row per slice and kind. A study has what any
    of its slices has.

    Args:
      joined: the folder of the DICOM files, or a table of their headers: SOPInstanceUID, StudyInstanceUID, PatientID.
    """
    if joined is None:
        raise UserError(
            "--join is missing: the labels of rsna are of slices; give the folder of the DICOM files, or a table with "
            "the columns SOPInstanceUID and StudyInstanceUID"
        )
    study_of = {r["SOPInstanceUID"]: (r["StudyInstanceUID"], r.get("PatientID", "")) for r in _headers(joined)}
    labels = _labels("rsna")
    studies: dict[tuple[str, str], dict[str, float]] = {}
    for i, row in enumerate(rows, 2):
        image, _, kind = _cell(row, "ID", where).rpartition("_")
        if kind not in labels or image not in study_of:
            continue
        value = _number(_cell(row, "Label", where), f"{where}, line {i}, column 'Label'")
        found = studies.setdefault(study_of[image], {})
        if value is not None:
            found[kind] = max(value, found.get(kind, 0.0))
    if not studies:
        raise UserError(f"{where}: none of its images is among those of --join={joined}")
    return [
        {"StudyInstanceUID": uid}
        | ({"patient": patient} if patient else {})
        | {f"label:{k}": _text(found.get(k)) for k in labels}
        for (uid, patient), found in studies.items()
    ]


def pub_brain_5(rows: Sequence[Row], joined: str | None, where: str) -> list[Row]:
    """A table whose column `class` names one of the five classes; the other columns are kept."""
    _no_join(joined, "pub_brain_5")
    made = []
    for i, row in enumerate(rows, 2):
        given = _cell(row, "class", where).strip().lower()
        if given not in scores.PUB_BRAIN_5:
            known = ", ".join(scores.PUB_BRAIN_5)
            raise UserError(f"{where}, line {i}, column 'class': {given!r} is not one of {known}")
        labels = {f"label:{c}": str(int(c == given)) for c in scores.PUB_BRAIN_5}
        made.append({k: v for k, v in row.items() if k != "class"} | labels)
    return made


def ct_rate(rows: Sequence[Row], joined: str | None, where: str) -> list[Row]:
    """valid_predicted_labels.csv: VolumeName and a column per finding, two of which are not asked about."""
    _no_join(joined, "ct_rate")
    return [
        {"VolumeName": _cell(row, "VolumeName", where)}
        | {
            f"label:{name}": _text(_number(_cell(row, name, where), f"{where}, line {i}, column {name!r}"))
            for name in _labels("ct_rate")
        }
        for i, row in enumerate(rows, 2)
    ]


TABLES: dict[str, Callable[[Sequence[Row], str | None, str], list[Row]]] = {
    f.__name__: f for f in (ct_rate, rad_chest_ct, pub_brain_5, rsna, cq500)
}


def convert(suite: str, tables: Iterable[str], out: str | os.PathLike, *, split: str, joined: str | None = None) -> int:
    """Writes a manifest for `prep` from published tables; returns its number of rows.

    Args:
      suite: a name of `suites.SUITES`.
      split: of all studies, unless a table has a column `split`.
      joined: a second table, for those that need one.

    Raises:
      UserError: the suite has no published table, or a table is not what the suite says.
    """
    about = suites.get(suite)
    known = next((f for name, f in TABLES.items() if suite == name or suite.startswith(f"{name}_")), None)
    if known is None:
        raise UserError(f"--suite={suite}: it has no published table of labels; give prep {about.table}")
    rows = [new for table in tables for new in known(read(table), joined, str(table))]
    rows = [{**row, "split": row.get("split") or split} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out, text.getvalue().encode())
    return len(rows)


def read(path: str | os.PathLike, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a CSV (or, by its name, TSV) file.

    Raises:
      UserError: it cannot be read, is empty, or lacks one of `columns`.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f, delimiter="\t" if Path(path).suffix == ".tsv" else ",", restval=""))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read as a CSV table ({type(e).__name__})") from None
    if not rows:
        raise UserError(f"{path}: it has no rows")
    for column in columns:
        _cell(rows[0], column, str(path))
    return rows


def _labels(suite: str) -> list[str]:
    known = suites.get(suite)
    gone = {name for _, pair in known.merge for name in pair}
    return [name for name in known.classes if name not in gone] + [label for label, _ in known.merge]


def _headers(place: str) -> list[Row]:
    if not os.path.isdir(place):
        return read(place, ("SOPInstanceUID", "StudyInstanceUID"))
    tags = ["SOPInstanceUID", "StudyInstanceUID", "PatientID"]
    rows = []
    for path in sorted(p for p in Path(place).rglob("*") if p.is_file()):
        with pydicom.config.disable_value_validation():  # their identifiers, such as ID_12cadc6af, are no UIDs
            try:
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            except (pydicom.errors.InvalidDicomError, OSError):
                continue
            rows.append({t: str(header.get(t, "")) for t in tags})
    if not rows:
        raise UserError(f"--join={place}: there is no DICOM file")
    return rows


def _no_join(joined: str | None, suite: str) -> None:
    if joined is not None:
        raise UserError(f"--join={joined}: the labels of {suite} need no second table")


def _cell(row: Mapping[str, str], column: str, where: str) -> str:
    if column not in row:
        have = ", ".join(map(str, list(row)[:8]))
        raise UserError(f"{where}: it has no column {column!r}; it begins with {have}")
    return row[column]


def _number(text: str, where: str) -> float | None:
    if not text.strip() or text.strip().lower() == "nan":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{where}: {text!r} is no label; labels are 0, 1 or empty")
    return value


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
