"""Which records make which batch: a pure function of (sizes of the records, options, seed, epoch).

Every process computes the same plan, so a batch is a pure function of the step: resuming is starting at a step, and no
worker count, thread count or process count changes what a step sees.

A bucket is a tuple of (axis, size) pairs, such as `(("depth", 32), ("scans", 4))`: the static shape that the records
of one batch are padded to. Sizes are plain columns (one integer per record and axis), so the same code plans studies
by scans and slices, and later systems by whatever they pad.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Int64

from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.core.rng import np_rng

Bucket = tuple[tuple[str, int], ...]
Sizes = Mapping[str, np.ndarray]

PAD = -1  # the record id of a padding row
COUNTS = ("images", "rows")  # axes of a bucket that count records or rows; the others are sizes that rows are padded to


class Step(NamedTuple):
    """One global batch: its bucket and its record ids, `PAD` for padding: `(b,)`, or `(b, k)` of rows of k records."""

    bucket: Bucket
    ids: Int64[np.ndarray, "b *k"]


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


class Planner(Protocol):
    """What a mode makes of the records, once for all epochs; picklable.

    A module of `MODES` has `fit(request, *, options of the mode) -> Planner`.

    Attributes:
      steady: every epoch has the same number of steps of every bucket, and every record exactly once.
    """

    steady: bool

    def steps(self, rng: np.random.Generator | None, epoch: int) -> list[Step]:
        """The batches of one epoch; without a generator in an order that follows `ids`."""
        ...


# name -> module of this floor; a name with a dot is a module of your own
MODES = {"buckets": "plan_buckets", "dbb": "plan_bins", "length": "plan_length", "pack": "plan_pack"}


class Request(NamedTuple):
    """What a mode's `fit` gets beside its own options; see `planner`."""

    sizes: Sizes
    ids: Int64[np.ndarray, "n"]
    buckets: Mapping[str, Sequence[int]] | None
    batch_size: int | None
    budget: int | None
    multiple_of: int
    drop_remainder: bool
    keys: np.ndarray | None


def planner(
    sizes: Sizes,
    ids: Int[np.ndarray, "n"],
    *,
    mode: str = "buckets",
    buckets: Mapping[str, Sequence[int]] | None = None,
    batch_size: int | None = None,
    budget: int | None = None,
    multiple_of: int = 1,
    drop_remainder: bool = False,
    keys: np.ndarray | None = None,
    options: Mapping[str, Any] | None = None,
) -> Planner:
    """Fits a mode to the records: every record exactly once per epoch (but for the remainder, if `drop_remainder`).

    Args:
      sizes: `{axis: (n,) integers}`, the size of every record along every axis.
      ids: (n,) record ids, the order of evaluation.
      mode: one of `MODES`.
      buckets: `{axis: allowed sizes}`; what a mode makes of them, and of None, its module says.
      batch_size, budget, multiple_of: see `batch_sizes`.
      drop_remainder: drop the last incomplete batch instead of padding it with `PAD`.
      keys: (n,) names of the records, for messages.
      options: those of the mode (`input.plan_options`).

    Raises:
      UserError: an option that cannot be met, a record that no bucket holds, no record.
    """
    if mode not in MODES and "." not in mode:
        raise UserError(f"input.mode={mode!r} is not a way to plan batches; use one of {', '.join(MODES)}")
    if missing := [axis for axis in buckets or () if axis not in sizes and axis not in COUNTS]:
        raise UserError(f"input.buckets.{missing[0]}: records have no such size; they have {', '.join(sorted(sizes))}")
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        raise UserError("there is no record to plan batches from: check input.dir, input.split and what was left out")
    fit = load("data", MODES.get(mode, mode)).fit
    own = sorted(p.name for p in inspect.signature(fit).parameters.values() if p.kind == p.KEYWORD_ONLY)
    if unknown := sorted(set(options or ()) - set(own)):
        raise UserError(
            f"input.plan_options.{unknown[0]} is not an option of mode {mode!r}; it has {', '.join(own) or 'none'}"
        )
    request = Request(
        sizes={axis: np.asarray(column, np.int64) for axis, column in sizes.items()},
        ids=ids,
        buckets=buckets,
        batch_size=batch_size,
        budget=budget,
        multiple_of=multiple_of,
        drop_remainder=drop_remainder,
        keys=keys,
    )
    return fit(request, **(options or {}))


def epoch_of(planner: Planner, *, seed: int, epoch: int, shuffle: bool = True) -> Plan:
    """One epoch of a planner.

    Args:
      seed, epoch: determine the order, if `shuffle`.
      shuffle: new order of records and of batches in every epoch; else ordered by bucket, then as in `ids`.

    Raises:
      UserError: incomplete batches are dropped and no other is left.
    """
    steps = planner.steps(np_rng(seed, epoch) if shuffle else None, epoch)
    rows = {step.bucket: len(step.ids) for step in steps}
    return Plan(steps, {b: rows[b] for b in sorted(rows, key=lambda b: (prod(n for _, n in b), b))})


def plan(sizes: Sizes, ids: Int[np.ndarray, "n"], *, seed: int, epoch: int, shuffle: bool = True, **how: Any) -> Plan:
    """Plans one epoch: `epoch_of` a `planner`, which takes the other arguments."""
    return epoch_of(planner(sizes, ids, **how), seed=seed, epoch=epoch, shuffle=shuffle)


def nothing_left(records: int, rows: int) -> UserError:
    """The error of a plan whose only batches were dropped."""
    return UserError(
        f"{records} records do not fill one batch of {rows} and drop_remainder is set: "
        "use a smaller input.batch_size or drop_remainder=False"
    )


def check_fits(sizes: Sizes, ids: np.ndarray, buckets: Mapping[str, Sequence[int]], keys: np.ndarray | None) -> None:
    """Raises:
    UserError: a record is larger than the largest bucket; names the record and the axis.
    """
    for axis, allowed in buckets.items():
        largest = int(np.argmax(sizes[axis]))
        if sizes[axis][largest] > max(allowed):
            name = keys[largest] if keys is not None else f"with id {ids[largest]}"
            raise UserError(
                f"study {name} has {axis} {sizes[axis][largest]}, more than the largest bucket "
                f"(input.buckets.{axis}={tuple(allowed)}): add a bucket that holds it"
            )


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


def row_elements(bucket: Bucket) -> int:
    """The padded elements of one row: the product of the bucket's sizes."""
    return prod(n for axis, n in bucket if axis not in COUNTS)


def padding(
    step: Step, elements: Mapping[int, float] | np.ndarray, slots: Callable[[Bucket], int] = row_elements
) -> dict[str, float]:
    """What one batch wastes: fractions of rows and of padded elements (slices, tokens) that carry no data.

    Args:
      elements: indexed by record id: the elements (in the unit of `slots`) of a record.
      slots: the padded elements of one row of a bucket.

    Returns:
      `{"rows_wasted", "tokens_wasted", "tokens": padded elements of the batch, "records": how many it holds}`.
    """
    real, room = step.ids[step.ids != PAD], slots(step.bucket)
    total, rows = len(step.ids) * room, (step.ids != PAD).reshape(len(step.ids), -1).any(1).sum()
    used = float(sum(min(float(elements[i]), room) for i in real))
    wasted = {"rows_wasted": 1.0 - float(rows) / len(step.ids), "tokens_wasted": 1.0 - used / total}
    return {**wasted, "tokens": float(total), "records": float(len(real))}


def padding_report(
    plan: Plan, elements: Mapping[int, float] | np.ndarray, slots: Callable[[Bucket], int] = row_elements
) -> dict[str, Any]:
    """`padding` over an epoch, in total and (under "buckets", by name) for every bucket, with its number of steps."""

    def total(steps: list[Step]) -> dict[str, float]:
        parts = [padding(step, elements, slots) for step in steps]
        tokens, rows = sum(p["tokens"] for p in parts), sum(len(s.ids) for s in steps)
        return {
            "steps": len(steps),
            "tokens": tokens,
            "tokens_wasted": sum(p["tokens_wasted"] * p["tokens"] for p in parts) / tokens,
            "rows_wasted": sum(p["rows_wasted"] * len(s.ids) for p, s in zip(parts, steps)) / rows,
        }

    per_bucket = {b: total([s for s in plan.steps if s.bucket == b]) for b in plan.batch_sizes}
    return {**total(plan.steps), "buckets": {bucket_name(b): v for b, v in per_bucket.items()}}
