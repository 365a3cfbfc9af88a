"""What a run of prep says at its end: counts, reasons, and for radiographs a section of sanity."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmed.core.files import write_file
from jaxmed.data import shards
from jaxmed.prep import sanity, scan
from jaxmed.prep.convert import REASONS

NAME = "prep_report.json"


@dataclasses.dataclass
class Summary:
    """What the last table shows."""

    studies_found: int
    studies: int
    scans: int
    shards: int
    bytes: int
    rejected: Counter
    noted: Counter
    reports: int  # studies with a text
    labelled: int  # studies with a label
    unread: dict[str, str]  # {manifest: columns that mean nothing}
    seconds: float
    report: Path | None


def summarise(studies: Sequence[scan.RawStudy], found: Sequence[scan.Reject], parts: list[dict[str, Any]]) -> Summary:
    rejected = Counter(r.reason for r in found if r.reason not in scan.KEPT)
    rejected += Counter(r["reason"] for part in parts for r in part["rejects"])
    noted = Counter(r.reason for r in found if r.reason in scan.KEPT)
    noted += Counter(n["reason"] for part in parts for n in part["notes"])
    noted += Counter({sanity.DUPLICATE: sanity.copies([i for part in parts for i in part["images"]])})
    return Summary(
        studies_found=len(studies),
        studies=sum(p["studies"] for p in parts),
        scans=sum(p["scans"] for p in parts),
        shards=0,
        bytes=0,
        rejected=rejected,
        noted=noted,
        reports=sum(bool(s.sentences) for s in studies),
        labelled=sum(bool(s.labels) for s in studies),
        unread={r.path: r.detail for r in found if r.reason == "unread-columns"},
        seconds=0.0,
        report=None,
    )


def write(
    out: Path,
    arguments: dict[str, Any],
    studies: Sequence[scan.RawStudy],
    found: Sequence[scan.Reject],
    parts: list[dict[str, Any]],
) -> Summary:
    """`prep_report.json`: the same bytes whether the run was straight or resumed."""
    written = shards.sidecars(out)
    summary = dataclasses.replace(
        summarise(studies, found, parts),
        shards=len(written),
        bytes=sum(s["bytes"] for s in written),
        report=out / NAME,
    )
    rejected, noted = summary.rejected, summary.noted
    rejects = [dataclasses.asdict(r) for r in found if r.reason not in scan.KEPT]
    notes = [dataclasses.asdict(r) for r in found if r.reason in scan.KEPT]
    counts = {k: getattr(summary, k) for k in ("studies_found", "studies", "scans", "shards", "bytes")}
    content = {
        "schema": 1,
        "name": arguments["name"],
        "recipe": arguments["recipe"]["name"],
        "counts": {**counts, "rejected": dict(sorted(rejected.items())), "noted": dict(sorted(noted.items()))},
        "reasons": {reason: REASONS.get(reason, "") for reason in sorted({*rejected, *noted})},
        "rejects": rejects + [r for part in parts for r in part["rejects"]],
        "notes": notes + [n for part in parts for n in part["notes"]],
    }
    if images := [i for part in parts for i in part["images"]]:
        content["sanity"] = sanity.section(images)
    write_file(summary.report, (json.dumps(content, indent=1) + "\n").encode())
    return summary
