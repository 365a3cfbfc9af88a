"""Reports as lists of sentences: split, or put together from the columns of a manifest as HLIP does for CT-RATE."""

import re
from collections.abc import Mapping

from jaxmed.core.errors import UserError

FORMS = {
    "sentences": "the report column, one entry per sentence (training joins them in a random order)",
    "ct_rate_raw": "one entry: 'The volume shows: {impression} The volume looks like: {findings}'",
    "ct_rate_organ": "four entries, lung, heart, esophagus, aorta: 'The {organ} shows: {conclusion} The {organ} looks "
    "like: {description}' from columns <organ>_conclusion and <organ>_description",
    "none": "no text",
}
ORGANS = ("lung", "heart", "esophagus", "aorta")
NORMAL = "No significant abnormalities."
REPORT = ("report", "report_text", "text")
IMPRESSION = ("impression", "impressions", "impression_en", "impressions_en")
FINDINGS = ("findings", "finding", "findings_en", "finding_en")

# A full stop after these does not end a sentence.
_SHORT = r"(?:dr|mr|mrs|ms|prof|st|vs|approx|ca|cf|fig|no|nos|al|e\.g|i\.e|incl|resp|max|min|inf|sup|ant|post|lat|med)"
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_NOT_AN_END = re.compile(rf"(?:\b{_SHORT}|\b[A-Z]|(?:^|\s)\d{{1,2}})\.$", re.IGNORECASE)
_ITEM = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.)])\s+")


def split(report: str) -> list[str]:
    """Sentences of a report: at line ends of lists and blank lines, and after . ! ? before a capital or a digit.

    Numbers (`3.5 cm`), initials and the usual abbreviations do not end a sentence; list marks (`1.`, `-`) are dropped;
    a line that goes on in the next one is joined to it. Every sentence ends with a mark.
    """
    found: list[str] = []
    paragraph: list[str] = []
    for line in [*report.replace("\r", "\n").split("\n"), ""]:
        ended = bool(paragraph) and paragraph[-1][-1:] in ".!?:;"
        if paragraph and (not line.strip() or _ITEM.match(line) or ended):
            found += _sentences(" ".join(paragraph))
            paragraph = []
        line = " ".join(_ITEM.sub("", line).split())
        if line:
            paragraph.append(line)
    return found


def _sentences(text: str) -> list[str]:
    found, start = [], 0
    for end in _END.finditer(text):
        piece = text[start : end.start()]
        if _NOT_AN_END.search(piece):
            continue
        found.append(full_stop(text[start : end.end()].strip()))
        start = end.end()
    rest = text[start:].strip()
    return [*found, full_stop(rest)] if rest else found


def full_stop(text: str) -> str:
    """The text with a full stop if it does not end with a mark."""
    return text if not text or text.rstrip("\"')]")[-1:] in ".!?:" else text + "."


def plain(text: str) -> str:
    """As HLIP cleans CT-RATE: quotes and parentheses removed, white space collapsed, a full stop at the end."""
    return full_stop(" ".join(re.sub(r"[\"'()]", "", text).split()))


def compose(columns: Mapping[str, str], form: str, where: str = "manifest") -> list[str]:
    """The entries of a study's text.

    Args:
      columns: of the study's manifest row; names are compared in lower case with `_` for blanks.
      form: one of `FORMS`.
      where: names the manifest in errors.

    Returns:
      List of strings, empty if the row has no text.

    Raises:
      UserError: unknown form, or the manifest lacks every column that the form needs.
    """
    if form not in FORMS:
        raise UserError(f"--report={form}: unknown form; choose one of {', '.join(FORMS)}")
    row = {re.sub(r"\W+", "_", str(k).strip().lower()): _given(v) for k, v in columns.items()}
    if form == "none":
        return []
    if form == "sentences":
        return split(_first(row, REPORT, where, form))
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
