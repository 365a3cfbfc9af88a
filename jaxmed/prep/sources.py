"""Studies out of `data/sources/<name>.py` instead of files: `--source=tfds --source.dir=... --source.image=...`.

A source module has `open_dataset(dir, **options)`, which gives a `data.shards.Dataset`: an index and, by id, records.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from typing import Any

from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.prep.scan import FileRef, RawScan, RawSeries, RawStudy, salted_hash


@dataclasses.dataclass
class SourceStudy(RawStudy):
    """A study that a source gives; opened again in the worker that reads it."""

    source: str = ""
    options: str = ""  # JSON
    id: int = 0

    def read(self) -> tuple[list[RawScan], dict[str, Any]]:
        """The scans, and what goes with them: `sentences`, `labels`, `split`.

        The name of a scan is the field of the source. Identities of the source go no further.
        """
        study = _open(self.source, self.options).record(self.id).study()
        scans = [RawScan(s["voxels"], s["affine"], "", s["name"], dict(s["meta"])) for s in study["scans"]]
        return scans, {k: study[k] for k in ("sentences", "labels", "split")}


def find(name: str, options: dict[str, Any], salt: str) -> tuple[list[RawStudy], str]:
    """Studies of a source, sorted by key, and a fingerprint of their content.

    Raises:
      UserError: no such source, or an option that it does not take.
    """
    text = json.dumps(options, sort_keys=True)
    dataset = _open(name, text)
    studies: list[RawStudy] = []
    for i, (key, patient) in enumerate(zip(dataset.index["key"], dataset.index["patient"])):
        key, patient = salted_hash(salt, "study", name, str(key)), salted_hash(salt, "patient", str(patient))
        # One series per scan, for the size of shards and for the places in the report.
        series = [RawSeries(name, (FileRef("", "", f"{name}:{key}"),), key)] * int(dataset.index["scans"][i])
        found = {c[6:]: float(v[i]) for c, v in dataset.index.items() if c.startswith("label/")}
        labels = {c: v for c, v in found.items() if not math.isnan(v)}
        split = str(dataset.index["split"][i]) if "split" in dataset.index else ""
        studies.append(SourceStudy(key, patient, series, [], labels, split, source=name, options=text, id=i))
    content = hashlib.sha256(f"{text}{dataset.fingerprint}".encode()).hexdigest()
    return sorted(studies, key=lambda s: s.key), content


def parse(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """`--source.KEY=VALUE`: numbers become numbers, lists with commas become lists, the rest stays text."""

    def value(text: str) -> Any:
        if "," in text:
            return [value(part.strip()) for part in text.split(",") if part.strip()]
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    return {key: text if key == "dir" else value(text) for key, text in pairs}


@functools.lru_cache(maxsize=1)
def _open(name: str, options: str):
    module = load("data.sources", name)
    if not hasattr(module, "open_dataset"):
        raise UserError(f"--source={name}: it has no open_dataset(dir, ...), so prep cannot read it")
    given = json.loads(options)
    try:
        inspect.signature(module.open_dataset).bind(**given)
    except TypeError as e:
        takes = ", ".join(inspect.signature(module.open_dataset).parameters)
        raise UserError(f"--source={name}: {e}; its options are {takes} (--source.dir=...)") from None
    return module.open_dataset(**given)
