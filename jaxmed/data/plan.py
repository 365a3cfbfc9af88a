"""Which records make which batch: a pure function of (sizes of the records, options, seed, epoch).

Every process computes the same plan, so a batch is a pure function of the step: resuming is starting at a step, and no
worker count, thread count or process count changes what a step sees.

A bucket is a tuple of (axis, size) pairs, such as `(("depth", 32), ("scans", 4))`: the static shape that the records
of one batch are padded to. Sizes are plain columns (one integer per record and axis), so the same code plans studies
by scans and slices, and later systems by whatever they pad.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from jaxmed.core.errors import UserError
from jaxmed.core.rng import np_rng

Bucket = tuple[tuple[str, int], ...]
Sizes = Mapping[str, np.ndarray]

PAD = -1  # the record id of a padding row


class Step(NamedTuple):
    """One global batch: its bucket and its record ids, int64 `(b,)`, `PAD` for padding rows."""

    bucket: Bucket
    ids: Int64[np.ndarray, "b"]


@dataclass(frozen=True)
class Plan:
    """One epoch. `batch_sizes` has the buckets that occur, which are the same in every epoch."""

    steps: list[Step]
    batch_sizes: dict[Bucket, int]


def bucket_name(bucket: Bucket) -> str:
    """`depth32_scans4`, for logs."""
    return "_".join(f"{axis}{size}" for axis, size in bucket)


def grid(buckets: Mapping[str, Sequence[int]]) -> list[Bucket]:
    """All buckets of `{axis: sizes}`, cheapest (smallest product of sizes) first; axes in alphabetical order.

    Raises:
      UserError: an axis has no sizes, or sizes that are not positive.
    """
    for axis, sizes in buckets.items():
        if not len(sizes) or any(int(n) != n or n < 1 for n in sizes):
            raise UserError(
                f"input.buckets.{axis}={tuple(sizes)!r}: give one or more positive sizes, e.g. (1, 2, 4, 8)"
            )
    axes = sorted(buckets)
    cells = product(*[sorted({int(n) for n in buckets[axis]}) for axis in axes])
    return sorted((tuple(zip(axes, cell)) for cell in cells), key=lambda b: (prod(n for _, n in b), b))


def batch_sizes(
    cells: Sequence[Bucket], *, batch_size: int | None = None, budget: int | None = None, multiple_of: int = 1
) -> dict[Bucket, int]:
    """Rows of a global batch for every bucket: constant, or as many as a budget of padded elements holds.

    Args:
      batch_size: the same for every bucket.
      budget: instead, the largest product of batch size and bucket sizes (for scans and depth: slices per batch).
      multiple_of: every batch size is a multiple of this (data axis of the mesh x accumulation).

    Raises:
      UserError: neither or both are given, or the multiple cannot be met; names the field and the numbers.
    """
    if (batch_size is None) == (budget is None):
        raise UserError(f"give either input.batch_size or input.budget, got {batch_size} and {budget}")
    if batch_size is not None:
        if batch_size < 1 or batch_size % multiple_of:
            below, above = batch_size // multiple_of * multiple_of, -(-max(batch_size, 1) // multiple_of) * multiple_of
            fitting = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"input.batch_size={batch_size} is not a positive multiple of {multiple_of} (data shards of the mesh x "
                f"accumulation steps): use {fitting}, or change config.mesh or the accumulation"
            )
        return dict.fromkeys(cells, int(batch_size))
    sizes = {b: budget // prod(n for _, n in b) // multiple_of * multiple_of for b in cells}
    if small := [b for b, n in sizes.items() if n < 1]:
        need = prod(n for _, n in small[-1]) * multiple_of
        raise UserError(
            f"input.budget={budget} does not hold {multiple_of} rows (data shards of the mesh x accumulation steps) of "
            f"bucket {bucket_name(small[-1])}: use at least {need}, smaller buckets, or fewer accumulation steps"
        )
    return sizes


def plan(
    sizes: Sizes,
    ids: Int[np.ndarray, "n"],
    *,
    seed: int,
    epoch: int,
    mode: str = "buckets",
    buckets: Mapping[str, Sequence[int]],
    batch_size: int | None = None,
    budget: int | None = None,
    multiple_of: int = 1,
    shuffle: bool = True,
    drop_remainder: bool = False,
    keys: np.ndarray | None = None,
) -> Plan:
    """Plans one epoch: every record exactly once (but for the remainder, if `drop_remainder`).

    Args:
      sizes: `{axis: (n,) integers}`, the size of every record along every axis of `buckets`.
      ids: (n,) record ids, the order of evaluation.
      seed, epoch: determine the order, if `shuffle`.
      mode: one of `MODES`.
      buckets: `{axis: allowed sizes}`; the buckets are their product.
      batch_size, budget, multiple_of: see `batch_sizes`; no batch has more rows than there are records.
      shuffle: new order of records and of batches in every epoch; else ordered by bucket, then as in `ids`.
      drop_remainder: drop the last incomplete batch instead of padding it with `PAD`.
      keys: (n,) names of the records, for messages.

    Returns:
      A plan with the same number of steps, and the same buckets, in every epoch.

    Raises:
      UserError: an option that cannot be met, a record that no bucket holds, no record, no complete batch.
    """
    if mode not in MODES:
        raise UserError(f"input.mode={mode!r} is not a way to plan batches; use one of {', '.join(MODES)}")
    if missing := [axis for axis in buckets if axis not in sizes]:
        raise UserError(f"input.buckets.{missing[0]}: records have no such size; they have {', '.join(sorted(sizes))}")
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        raise UserError("there is no record to plan batches from: check input.dir, input.split and what was left out")
    cells = grid(buckets)
    for axis, allowed in buckets.items():
        largest = int(np.argmax(sizes[axis]))
        if sizes[axis][largest] > max(allowed):
            name = keys[largest] if keys is not None else f"with id {ids[largest]}"
            raise UserError(
                f"study {name} has {axis} {sizes[axis][largest]}, more than the largest bucket "
                f"(input.buckets.{axis}={tuple(allowed)}): add a bucket that holds it"
            )
    rows = batch_sizes(cells, batch_size=batch_size, budget=budget, multiple_of=multiple_of)
    if not drop_remainder:  # a few studies need no batch of hundreds of rows
        enough = -(-len(ids) // multiple_of) * multiple_of
        rows = {cell: min(n, enough) for cell, n in rows.items()}
    rng = np_rng(seed, epoch) if shuffle else None
    steps = MODES[mode](sizes, ids, cells, rows, rng, drop_remainder)
    if not steps:
        raise UserError(
            f"{len(ids)} records do not fill one batch of {max(rows.values())} and drop_remainder is set: "
            "use a smaller input.batch_size or drop_remainder=False"
        )
    used = {step.bucket for step in steps}
    return Plan(steps, {cell: rows[cell] for cell in cells if cell in used})


def _in_buckets(
    sizes: Sizes,
    ids: np.ndarray,
    cells: list[Bucket],
    rows: dict[Bucket, int],
    rng: np.random.Generator | None,
    drop_remainder: bool,
) -> list[Step]:
    """Every record in the cheapest bucket that holds it; what does not fill a batch moves up to the next bucket.

    Moved records go first in their new bucket, so they move once, and the records left over there are its own. Only
    the largest bucket can end with an incomplete batch. How many batches each bucket gets depends on counts alone,
    hence it is the same in every epoch.
    """
    order = np.arange(len(ids)) if rng is None else rng.permutation(len(ids))
    home = _cheapest(sizes, cells)[order]
    moved: dict[Bucket, list[np.ndarray]] = {cell: [] for cell in cells}
    steps = []
    for i, cell in enumerate(cells):
        waiting = np.concatenate([*moved[cell], order[home == i]])
        full = len(waiting) // rows[cell] * rows[cell]
        steps += [Step(cell, ids[waiting[k : k + rows[cell]]]) for k in range(0, full, rows[cell])]
        rest = waiting[full:]
        if not len(rest):
            continue
        larger = next((c for c in cells[i + 1 :] if all(n >= m for (_, n), (_, m) in zip(c, cell))), None)
        if larger is not None:
            moved[larger].append(rest)
        elif not drop_remainder:
            if rng is None:  # these may all be small; training needs the same buckets in every epoch
                fits = [c for c in cells if all(sizes[axis][rest].max() <= n for axis, n in c) and rows[c] >= len(rest)]
                cell = fits[0]
            steps.append(Step(cell, np.concatenate([ids[rest], np.full(rows[cell] - len(rest), PAD)])))
    return steps if rng is None else [steps[k] for k in rng.permutation(len(steps))]


def _cheapest(sizes: Sizes, cells: list[Bucket]) -> np.ndarray:
    """(n,) index into `cells` (cheapest first) of the first bucket that holds each record."""
    n = len(next(iter(sizes.values())))
    home = np.full(n, -1)
    for i, cell in enumerate(cells):
        home[(home < 0) & np.all([sizes[axis] <= size for axis, size in cell], axis=0)] = i
    return home


# name -> (sizes, ids, cells cheapest first, rows per cell, generator or None, drop_remainder) -> steps
MODES: dict[str, Callable[..., list[Step]]] = {"buckets": _in_buckets}


def plan_hash(sizes: Sizes, ids: np.ndarray, fingerprint: str, rows: Mapping[Bucket, int], **options: Any) -> str:
    """sha256 (hex) of everything that determines the plans of all epochs and what they plan.

    Args:
      sizes, ids: as in `plan`.
      fingerprint: of the dataset's content (`Dataset.fingerprint`).
      rows: batch size of every bucket. What they follow from (the mesh) is not hashed: a run may go on elsewhere.
      options: every other option, plain values.
    """
    digest = hashlib.sha256()
    about = {"fingerprint": fingerprint, "rows": sorted((list(b), n) for b, n in rows.items()), "options": options}
    digest.update(json.dumps(about, sort_keys=True, default=list).encode())
    for name, column in [("ids", ids), *sorted(sizes.items())]:
        digest.update(name.encode() + np.ascontiguousarray(column, "<i8").tobytes())
    return digest.hexdigest()


def padding(step: Step, elements: Mapping[int, float] | np.ndarray) -> dict[str, float]:
    """What one batch wastes: fractions of rows and of padded elements (slices of studies) that carry no data.

    Args:
      elements: indexed by record id: the elements (product of the bucket's axes, real part) of a record.
    """
    real = step.ids[step.ids != PAD]
    total = len(step.ids) * prod(n for _, n in step.bucket)
    used = float(sum(min(float(elements[i]), total / len(step.ids)) for i in real))
    return {"rows_wasted": 1.0 - len(real) / len(step.ids), "tokens_wasted": 1.0 - used / total, "tokens": float(total)}


def padding_report(plan: Plan, elements: Mapping[int, float] | np.ndarray) -> dict[str, Any]:
    """`padding` over an epoch, in total and (under "buckets", by name) for every bucket, with its number of steps."""

    def total(steps: list[Step]) -> dict[str, float]:
        parts = [padding(step, elements) for step in steps]
        tokens, rows = sum(p["tokens"] for p in parts), sum(len(s.ids) for s in steps)
        return {
            "steps": len(steps),
            "tokens": tokens,
            "tokens_wasted": sum(p["tokens_wasted"] * p["tokens"] for p in parts) / tokens,
            "rows_wasted": sum(p["rows_wasted"] * len(s.ids) for p, s in zip(parts, steps)) / rows,
        }

    per_bucket = {b: total([s for s in plan.steps if s.bucket == b]) for b in plan.batch_sizes}
    return {**total(plan.steps), "buckets": {bucket_name(b): v for b, v in per_bucket.items()}}
