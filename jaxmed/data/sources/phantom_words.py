"""Report sentences for phantom studies: what a reader would say of a finding, in varied words."""

from collections.abc import Sequence

import numpy as np

_SIDES = {"left": ("left", "left-sided"), "right": ("right", "right-sided")}
_PLACE = {
    "frontal": ("frontal lobe", "frontal region"),
    "parietal": ("parietal lobe", "parietal region"),
    "temporal": ("temporal lobe", "temporal region"),
    "occipital": ("occipital lobe", "occipital region"),
    "deep": ("basal ganglia", "deep grey nuclei"),
    "cerebellar": ("cerebellar hemisphere", "cerebellum"),
}
_SIZE = ("measuring {mm} mm", "about {mm} mm in size", "{mm} mm across")
LESION = {
    "hemorrhage": (
        "There is an acute intracranial hemorrhage in the {side} {place}, {size}.",
        "Intraparenchymal hematoma of the {side} {place}, {size}.",
        "Hemorrhage is seen in the {side} {place}, {size}.",
        "Findings are consistent with a {side} {place} hemorrhage {size}.",
    ),
    "infarct": (
        "There is an acute ischemic infarct in the {side} {place}, {size}.",
        "Acute stroke with infarction of the {side} {place}, {size}.",
        "Ischemic infarct is seen in the {side} {place}, {size}.",
        "Findings are consistent with a {side} {place} infarct {size}.",
    ),
    "mass": (
        "There is a single brain mass with surrounding edema in the {side} {place}, {size}.",
        "Solitary necrotic tumor of the {side} {place}, {size}, with vasogenic edema.",
        "A brain tumor is seen in the {side} {place}, {size}.",
        "Findings are consistent with a {side} {place} mass {size}.",
    ),
    "metastases": (
        "There are multiple brain metastases, {count} in number, the largest {size}.",
        "Multiple metastatic lesions in both hemispheres, {count} in total, the largest {size}.",
        "Brain metastases are seen, {count} lesions, the largest {size}.",
        "Findings are consistent with {count} metastases, the largest {size}.",
    ),
}
NORMAL = (
    "No acute intracranial abnormality.",
    "The brain parenchyma is normal.",
    "No focal brain lesion is seen.",
    "Normal appearance of the brain without focal abnormality.",
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Findings that say nothing about the lesion: (present, absent).
OTHER = {
    "atrophy": (
        (
            "Generalized cerebral atrophy with enlarged ventricles.",
            "There is diffuse volume loss with prominent ventricles and sulci.",
        ),
        ("Ventricles and sulci are normal in size.", "No hydrocephalus or atrophy."),
    ),
    "sinus": (
        ("Opacification of the paranasal sinuses.", "Mucosal thickening fills the paranasal sinuses."),
        ("The paranasal sinuses are clear.",),
    ),
    "spots": (
        (
            "Scattered white matter foci of small vessel disease.",
            "Mild chronic small vessel changes in the white matter.",
        ),
        ("No white matter disease.",),
    ),
    "cyst": (
        ("Incidental {side} middle fossa arachnoid cyst.", "There is an arachnoid cyst of the {side} middle fossa."),
        (),
    ),
    "motion": (
        ("The examination is degraded by motion.", "Motion artifact limits the study."),
        ("Image quality is good.",),
    ),
}


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def lesion_sentence(
    rng: np.random.Generator, kind: str | None, *, side: str = "", region: str = "", mm: float = 0, count: int = 1
) -> str:
    """The sentence of the main finding; sizes are rounded to 5 mm, as nobody measures better. None is no lesion."""
    if kind is None:
        return _pick(rng, NORMAL)
    size = _pick(rng, _SIZE).format(mm=max(5, 5 * round(mm / 5)))
    words = {"side": _pick(rng, _SIDES[side]) if side else "", "place": _pick(rng, _PLACE[region]) if region else ""}
    return _pick(rng, LESION[kind]).format(**words, size=size, count=_NUMBERS[min(count, 9)])


def report(rng: np.random.Generator, main: str, others: dict[str, str | None]) -> list[str]:
    """The sentences of a report, the main finding first.

    Args:
      others: for every name in `OTHER`, None if absent, else its side ("" where it has none). What is present is nearly
        always mentioned, what is absent sometimes.
    """
    sentences = []
    for name, side in others.items():
        present, absent = OTHER[name]
        if side is not None and rng.random() < 0.95:
            sentences.append(_pick(rng, present).format(side=side))
        elif side is None and absent and rng.random() < 0.3:
            sentences.append(_pick(rng, absent))
    return [main, *sentences]
