"""What every phantom source does with what it draws: options, the folder that it goes to, and the shards."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import threadpoolctl
from tqdm import tqdm

from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file
from jaxmed.data import shards
from jaxmed.data.sources import phantom_anatomy as anatomy


def options(cls, given: Mapping[str, Any]):
    """The dataclass `cls` with the fields `given` (lists, where they come from JSON, as tuples).

    Raises:
      UserError: a field is unknown.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - known):
        raise UserError(f"source.{unknown[0]} is not an option of the phantom; it has {', '.join(sorted(known))}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def counts(train: int, val: int, test: int, unit: str) -> dict[str, int]:
    """How many records every split gets.

    Raises:
      UserError: a negative number, or none at all; `unit` says what is counted.
    """
    found = {"train": train, "val": val, "test": test}
    if min(found.values()) < 0 or sum(found.values()) == 0:
        raise UserError(f"source.train/val/test={tuple(found.values())}: give the number of {unit} of each split")
    return found


def begin(dir: Path, recipe: dict[str, Any]) -> bool:
    """False if `dir` already holds the dataset of `recipe`, else True; refuses a folder with anything else in it.

    Raises:
      UserError: `dir` holds another dataset, or cannot be made.
    """
    note = dir / "phantom.json"  # what the shards of an unfinished run are made of
    if (dir / shards.MANIFEST).exists():
        found = shards.open_dataset(dir).manifest["recipe"]
        if found == recipe:
            return False
    elif note.exists():
        found = json.loads(note.read_text())
        if found == recipe:
            return True
    elif not dir.exists() or not any(dir.glob("shard-*")):
        write_file(_made(dir) / note.name, (json.dumps(recipe, indent=1) + "\n").encode())
        return True
    else:
        found = {}
    different = sorted(k for k in {*found, *recipe} if found.get(k) != recipe.get(k))
    raise UserError(
        f"{dir} holds another dataset (its recipe differs in {', '.join(different)}): choose another source.dir, or "
        "delete the folder if nobody needs it"
    )


def _made(dir: Path) -> Path:
    try:
        dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {dir}: {e.strerror}; choose another source.dir") from None
    return dir


def write(
    dir: Path,
    recipe: dict[str, Any],
    parts: Sequence[Sequence[Any]],
    draw: Callable[[Any], list[bytes]],
    *,
    name: str,
    unit: str,
    classes: Sequence[str],
    threads: int | None,
) -> None:
    """Writes the shards that are missing, then index and manifest.

    Args:
      parts: for every shard, what `draw` makes encoded records of; several may be drawn at once.
      name: of the dataset.
      unit: what progress counts (items of `parts`).
      threads: of drawing [the number of cores].
    """
    done = {s["file"] for s in shards.sidecars(dir)}
    todo = [i for i in range(len(parts)) if shards.shard_name(i) not in done]
    total = sum(len(part) for part in parts)
    anatomy.template()  # once, before the threads ask for it
    progress = tqdm(total=total, initial=total - sum(len(parts[i]) for i in todo), unit=unit, mininterval=2)
    progress.set_description(f"making {name}")
    # numpy lets go of the interpreter while it works, so threads are enough; BLAS threads on top would only get in
    # their way.
    with threadpoolctl.threadpool_limits(1), ThreadPoolExecutor(threads or os.cpu_count()) as pool, progress:
        for i in todo:
            with shards.ShardWriter(dir, i) as writer:
                for records in pool.map(draw, parts[i]):
                    for record in records:
                        writer.add(record)
                    progress.update()
    shards.finish(dir, name, recipe, classes=classes)
