"""What a set of radiographs is like, and what about it looks wrong: the section "sanity" of the report."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data import intensity
from jaxmed.prep.scan import RawStudy
from jaxmed.prep.suspects import SUSPECT

DUPLICATE = "duplicate-pixels"
SHEET = "contact_sheet.png"  # see `contact_sheet`


def of_image(
    study: RawStudy, split: str, scan: Mapping[str, Any], notes: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """What the section needs of one stored image."""
    voxels, meta = np.ascontiguousarray(scan["voxels"]), scan["meta"]
    digest = hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()[:16]
    return {
        "study": study.key,
        "patient": study.patient,
        "split": split,
        "height": int(voxels.shape[1]),
        "width": int(voxels.shape[2]),
        "pixels": digest,
        "modality": meta.get("modality", ""),
        "photometric": meta["photometric"],
        "bits": meta["bits"],
        "region": meta.get("region", ""),
        "shown_by": intensity.how(meta),
        "collimated": meta.get("box_from", ""),
        "spacing": "pixel_mm" in meta,
        "suspect": sorted({n["reason"] for n in notes} & set(SUSPECT)),
    }


def section(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all images, suspicions by study, groups of images with the same pixels.

    `patients_unknown` are images whose patient nobody named; they count as patients of their own, so several of one
    person may lie in different splits.
    """

    def counts(name: str) -> dict[str, int]:
        return {str(k) or "unknown": n for k, n in Counter(i[name] for i in images).most_common()}

    def quartiles(name: str) -> list[int]:
        return [int(v) for v in np.percentile([i[name] for i in images], (0, 25, 50, 75, 100))]

    suspects = {name: [i["study"] for i in images if name in i["suspect"]] for name in SUSPECT}
    patients = defaultdict(set)
    for image in images:
        patients[image["split"]].add(image["patient"])
    return {
        "images": len(images),
        "patients": len({i["patient"] for i in images}),
        "patients_unknown": sum(i["patient"] == i["study"] for i in images),
        "splits": {
            name: {"images": n, "patients": len(patients[name])} for name, n in sorted(Counter(counts("split")).items())
        },
        "sizes": len({(i["height"], i["width"]) for i in images}),
        "height": quartiles("height"),
        "width": quartiles("width"),
        **{name: counts(name) for name in ("modality", "photometric", "bits", "region", "shown_by")},
        "collimated": sum(bool(i["collimated"]) for i in images),
        "spacing_unknown": sum(not i["spacing"] for i in images),
        "suspects": {name: {"images": len(found), "studies": found} for name, found in suspects.items() if found},
        DUPLICATE: _same(images),
        "contact_sheet": SHEET,
    }


def copies(images: Sequence[Mapping[str, Any]]) -> int:
    """Images whose pixels an earlier one has."""
    return sum(len(group) - 1 for group in _same(images))


def _same(images: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for image in images:
        groups[image["pixels"]].append(image["study"])
    return [group for group in groups.values() if len(group) > 1]
