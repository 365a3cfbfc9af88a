"""De-identified names: what a series is, as a token of a closed list, never the free text of its header."""

import re
from collections.abc import Sequence

# What `guess` can answer. "t1c" is T1-weighted after contrast agent.
TOKENS = (
    *("t1w", "t1c", "t2w", "t2star", "flair", "pd", "dwi", "adc", "swi", "perf", "bold", "mra", "fieldmap", "phase"),
    *("inplane", "qmap", "ct", "cta", "pt", "nm", "us", "xa", "cr", "dx", "mg", "xr", "unknown"),
)

# Words in descriptions and file names, first match wins. Text is lower case, words separated by single blanks.
_WORDS = (
    ("adc", r"\b(adc|apparent diffusion)\b"),
    ("dwi", r"\b(dwi|dti|dmri|diff|diffusion|trace|tracew|b ?(500|800|1000|2000))\b|\bresolve\b"),
    ("flair", r"flair|\bdark fluid\b"),
    ("swi", r"\b(swi|swan|venobold|suscept\w*)\b"),
    ("perf", r"\b(asl|dsc|dce|perf\w*|pwi|cbf|cbv|mtt)\b"),
    ("bold", r"\b(bold|fmri|rest\w*|task\w*)\b"),
    ("fieldmap", r"\b(field ?map\w*|fmap|b0 ?map|gre field\w*|epi fmap)\b"),
    ("mra", r"\b(mra|mrv|tof|angio\w*)\b"),
    ("t2star", r"\b(t2 ?star\w*|t2s|t2 gre|hemo|heme|ffe t2)\b|t2\*"),
    ("qmap", r"\b(t1|t2|r1|r2) ?map\b|\bqt1\b|\bt1rho\b|\bmp2rage unit1\b"),
    ("t1c", r"\b(t1\w* (\w+ )*(post|gad|gd|ce|c)|t1c|t1ce|t1gd|t1 ?w? c|post ?contrast|gadolinium)\b"),
    ("t1w", r"\b(t1w?|t1 ?weighted|mprage|memprage|spgr|bravo|tfl3d|mp2rage|\w+t1w)\b"),
    ("pd", r"\b(pdw?|pd ?weighted|proton density)\b"),
    ("t2w", r"\b(t2w?|t2 ?weighted|tirm|haste|ssfse|space t2|\w+t2w)\b"),
    ("cta", r"\b(cta|ct angio\w*)\b"),
    ("ct", r"\b(ct|cct|hct|ncct)\b"),
    ("pt", r"\b(pet|pt|suv)\b"),
)
_LOCALIZER = re.compile(
    r"\b(loc|locali[sz]ers?|\w*scout\w*|survey|topogram|scanogram|scano|surview|plan ?scan|3 ?plane|3pl|pilot)\b"
)
_CODES = {"PT": "pt", "NM": "nm", "US": "us", "XA": "xa", "RF": "xa", "CR": "cr", "DX": "dx", "MG": "mg", "RG": "cr"}
_CODES |= {"OT": "xr", "IO": "xr", "PX": "xr"}
_BODY = ("HEAD", "BRAIN", "SKULL", "NECK", "CHEST", "THORAX", "LUNG", "HEART", "BREAST", "ABDOMEN", "LIVER", "PELVIS")
_BODY += ("PROSTATE", "SPINE", "CSPINE", "TSPINE", "LSPINE", "SHOULDER", "KNEE", "HIP", "WHOLEBODY", "EXTREMITY")


def words(*texts: str) -> str:
    """Lower case, everything but letters, digits and '*' turned into single blanks."""
    return " ".join(re.findall(r"[a-z0-9*]+", " ".join(texts).lower()))


def is_localizer(image_type: Sequence[str], description: str) -> bool:
    """Does the image type or the description say scout, localizer, survey or topogram?"""
    kinds = {str(v).strip().upper() for v in image_type}
    return "LOCALIZER" in kinds or bool(_LOCALIZER.search(words(description)))


def body_part(text: str) -> str:
    """A known body part as a token, or ""."""
    text = re.sub(r"[^A-Z]", "", text.upper())
    return next((p.lower() for p in _BODY if text.startswith(p)), "")


def guess(
    modality: str,
    text: str = "",
    *,
    image_type: Sequence[str] = (),
    te: float | None = None,
    tr: float | None = None,
    ti: float | None = None,
    b_value: float | None = None,
    contrast: bool = False,
    gradient_echo: bool = False,
    echo_planar: bool = False,
) -> str:
    """Names a series from its modality, words in its texts, and for MR the sequence timing (ms).

    The timing limits are the usual ones of clinical brain protocols at 1.5 and 3 T; words come first because a
    protocol's name is more reliable than its timing.
    """
    kinds = {str(v).strip().upper() for v in image_type}
    text = words(text)
    if modality in _CODES:
        return _CODES[modality]
    if modality == "CT":
        return "cta" if re.search(dict(_WORDS)["cta"], text) else "ct"
    if modality not in ("MR", ""):
        return "unknown"
    if "ADC" in kinds:
        return "adc"
    if kinds & {"P", "PHASE", "PHASE MAP"}:
        return "fieldmap" if re.search(dict(_WORDS)["fieldmap"], text) else "phase"
    if kinds & {"DIFFUSION", "TRACEW"}:
        return "dwi"
    for token, pattern in _WORDS:
        if (token in ("ct", "cta", "pt") and modality == "MR") or not re.search(pattern, text):
            continue
        return "t1c" if token == "t1w" and contrast else token
    if b_value:
        return "dwi"
    if te is None or tr is None:
        return "unknown"
    if echo_planar:
        return "bold" if te >= 15 else "unknown"
    if gradient_echo:
        if te >= 12:
            return "t2star"
        return "t1c" if contrast else "t1w"
    if ti is not None and ti >= 1400 and te >= 60:
        return "flair"
    if te >= 60 and tr >= 1800:
        return "t2w"
    if te < 60 and tr >= 1500:
        return "pd"
    if te < 35 and tr < 1200:
        return "t1c" if contrast else "t1w"
    return "unknown"
