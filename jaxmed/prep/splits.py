"""One split of patients for all tasks, with every label's part in each split."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from jaxmed.core.errors import UserError
from jaxmed.prep.scan import RawStudy


def stratified(studies: Sequence[RawStudy], split: Sequence[tuple[str, float]], seed: int) -> None:
    """Gives every study its split: whole patients, shared out within groups of equal rarest label.

    The rarest label of a patient is that of its studies' labels which fewest studies have; a study counts for each
    label above 0.5, "none" if it has labels and none of them is, and its body region. Patients stand in the order of
    their groups, the rarest first and those without any last, and inside a group in the order of a hash with `seed`;
    each goes to the split that is furthest behind its share, so that both every group and the whole come out as asked
    for, to within a patient.

    Studies that have a split (from a manifest) keep it; the patient's other studies follow.

    Args:
      studies: changed in place. Those with the same `patient` stay together.
      split: (name, share), see `convert.parse_split`.

    Raises:
      UserError: the manifest puts studies of one patient into two splits.
    """
    names = {s.key: _labels(s) for s in studies}
    frequency = Counter(name for found in names.values() for name in found)
    patients: dict[str, list[RawStudy]] = defaultdict(list)
    for study in studies:
        patients[study.patient].append(study)
    order, counts = [], dict.fromkeys((name for name, _ in split), 0)
    for patient, own in patients.items():
        given = sorted({s.split for s in own if s.split})
        if len(given) > 1:
            raise UserError(
                f"--stratify={seed}: the manifest puts studies of one patient (e.g. study {own[0].key}) into "
                f"{' and '.join(given)}; give each patient one split, or leave the column out"
            )
        if given:
            for study in own:
                study.split = given[0]
            continue
        rarest = min({n for s in own for n in names[s.key]}, key=lambda n: (frequency[n], n), default="")
        order.append((frequency.get(rarest, len(studies) + 1), rarest, _hash(seed, patient), patient))
    for done, (*_, patient) in enumerate(sorted(order), 1):
        target = max(split, key=lambda s: (s[1] * done - counts[s[0]], s[1]))[0]
        counts[target] += 1
        for study in patients[patient]:
            study.split = target


def _labels(study: RawStudy) -> list[str]:
    positive = [f"label {name}" for name, found in study.labels.items() if found > 0.5]
    if study.labels and not positive:
        positive = ["none"]
    return positive + ([f"region {study.region}"] if study.region else [])


def _hash(seed: int, patient: str) -> str:
    return hashlib.sha256(f"split {seed} {patient}".encode()).hexdigest()
