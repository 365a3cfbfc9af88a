"""Texts of studies put together from the columns of a manifest, as HLIP does for CT-RATE."""

import re
from collections.abc import Iterable, Mapping

from jaxmed.core.errors import UserError

FORMS = {
    "sentences": "the report column, one entry per sentence (see `manifest.split_sentences`)",
    "ct_rate_raw": "one entry: 'The volume shows: {impression} The volume looks like: {findings}'",
    "ct_rate_organ": "four entries, lung, heart, esophagus, aorta: 'The {organ} shows: {conclusion} The {organ} looks "
    "like: {description}' from columns <organ>_conclusion and <organ>_description",
    "none": "no text",
}
ORGANS = ("lung", "heart", "esophagus", "aorta")
NORMAL = "No significant abnormalities."
IMPRESSION = ("impression", "impressions", "impression_en", "impressions_en")
FINDINGS = ("findings", "finding", "findings_en", "finding_en")


def full_stop(text: str) -> str:
    """The text with a full stop if it does not end with a mark."""
    return text if not text or text.rstrip("\"')]")[-1:] in ".!?:" else text + "."


def plain(text: str) -> str:
    """As HLIP cleans CT-RATE: quotes and parentheses removed, white space collapsed, a full stop at the end."""
    return full_stop(" ".join(re.sub(r"[\"'()]", "", text).split()))


def columns_of(header: Iterable[str], form: str) -> list[str]:
    """Those of a table's columns that `form` (not "sentences") reads."""
    organs = {f"{organ}_{part}" for organ in ORGANS for part in ("conclusion", "description")}
    wanted = {"ct_rate_raw": {*IMPRESSION, *FINDINGS}, "ct_rate_organ": organs}.get(form, set())
    return [c for c in header if _name(c) in wanted]


def has(header: Iterable[str], form: str) -> bool:
    """Can `compose` make this form from a table with these columns?"""
    found = {_name(c) for c in columns_of(header, form)}
    return bool(found & {*IMPRESSION} and found & {*FINDINGS}) if form == "ct_rate_raw" else bool(found)


def _name(column: str) -> str:
    return re.sub(r"\W+", "_", str(column).strip().lower())


def compose(columns: Mapping[str, str], form: str, where: str = "manifest") -> list[str]:
    """The text of a study, as a list of entries that training may join in any order.

    Args:
      columns: of the study's manifest row; names are compared in lower case with `_` for blanks.
      form: one of `FORMS` but "sentences", which is the manifest's own.
      where: names the manifest in errors.

    Returns:
      List of strings, empty if the row has no text.

    Raises:
      UserError: unknown form, or the manifest lacks every column that the form needs.
    """
    row = {_name(k): _given(v) for k, v in columns.items()}
    if form == "none":
        return []
    if form == "ct_rate_raw":
        impression, findings = (plain(_first(row, names, where, form)) for names in (IMPRESSION, FINDINGS))
        parts = (("The volume shows: ", impression), ("The volume looks like: ", findings))
        text = " ".join(start + said for start, said in parts if said)
        return [text] if text else []
    wanted = [(f"{organ}_conclusion", f"{organ}_description") for organ in ORGANS]
    if not any(c in row for pair in wanted for c in pair):
        names = ", ".join(c for pair in wanted for c in pair)
        raise UserError(f"{where}: --report={form} needs the columns {names}; it has {', '.join(columns)}")
    return [
        f"The {organ} shows: {plain(row.get(said, '')) or NORMAL} "
        f"The {organ} looks like: {plain(row.get(seen, '')) or NORMAL}"
        for organ, (said, seen) in zip(ORGANS, wanted)
    ]


def _given(value) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in ("", "nan", "none", "not given", "not given.", "n/a") else text


def _first(row: Mapping[str, str], names: tuple[str, ...], where: str, form: str) -> str:
    having = [n for n in names if n in row]
    if not having:
        raise UserError(f"{where}: --report={form} needs a column {' or '.join(names)}; it has {', '.join(row)}")
    return next((row[n] for n in having if row[n]), "")
