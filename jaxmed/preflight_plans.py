"""What plans cost on a list of image sizes, against padding every image to the patch alone (spec: radiograph MAE,
section 3): the table that `python -m jaxmed.preflight --sizes` prints, and its bounds."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.data import plan as planning
from jaxmed.data.plan import PAD, Step
from jaxmed.data.plan_cost import Cost
from jaxmed.data.plan_length import make_cost
from jaxmed.data.plan_pack import row_attention, row_linear, touched

COLUMNS = ("shapes", "tokens", "poster_compute", "attention", "flops", "wasted", "steps", "slowest_device")
BOUNDED = ("tokens", "poster_compute", "attention", "flops")
RACE = 8  # devices that `slowest_device` is about, if the plan is for fewer

# The promise, in percent, on the published list of sizes; on any other list SLACK points more.
BOUNDS: dict[str, dict[str, float]] = {
    "length16": {"shapes": 16, "tokens": 107, "poster_compute": 115, "attention": 111, "flops": 108},
    "length32": {"shapes": 32, "tokens": 104, "poster_compute": 108, "attention": 106, "flops": 104.5},
    "pack_rebucket": {"shapes": 17, "tokens": 100.5, "poster_compute": 101, "attention": 110, "flops": 103},
}
SLACK = 1.0
PUBLISHED = "19f3ecd760974eb348004b61e25922aca23660f30bca4421803714f70134e06d"


def fingerprint(height: np.ndarray, width: np.ndarray) -> str:
    """sha256 of a list of sizes."""
    return hashlib.sha256(np.stack([height, width], axis=1).astype("<i8").tobytes()).hexdigest()


def table(
    height: np.ndarray,
    width: np.ndarray,
    *,
    patch: int,
    cost: Mapping[str, Any],
    budget: int,
    devices: int,
    multiple: int = 64,
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """One row of the table for each way to plan: `{"mode", "plan": its name in BOUNDS, **COLUMNS}`.

    Args:
      height, width: (n,) pixels.
      patch: edge of a patch.
      cost: the model's sizes, see `plan_cost.Cost`.
      budget: padded tokens of a global batch (dbb: `batch_size` images on every device).
      devices: that share a batch.
      multiple: of fitted lengths.
    """
    high, wide = -(-height // patch), -(-width // patch)
    sizes = {"height": height, "width": width, "tokens": high * wide}
    fitted = {"multiple": multiple, "cost": cost}
    ways = (
        ("dbb", "dbb", {}),
        ("length", "length16", {"lengths": 16, **fitted}),
        ("length", "length32", {"lengths": 32, **fitted}),
        ("pack", "pack_blocks", {"attention": "blocks", "cost": cost}),
        ("pack", "pack_rebucket", {"attention": "rebucket", "lengths": 17, **fitted}),
    )

    def measured(mode, options, devices, budget):
        how = {"batch_size": batch_size} if mode == "dbb" else {"budget": budget, "multiple_of": devices}
        planner = planning.planner(sizes, np.arange(len(height)), mode=mode, options=options, **how)
        plan = planning.epoch_of(planner, seed=0, epoch=0)
        return measure(plan, sizes["tokens"], patch=patch, cost=make_cost(cost), devices=devices)

    for mode, name, options in ways:
        row = measured(mode, options, devices, budget)
        if devices < RACE:
            race = measured(mode, options, RACE, budget * RACE // devices)
            row["slowest_device"] = race["slowest_device"]
        yield {"mode": mode, "plan": name, **row}


def measure(plan: planning.Plan, tokens: np.ndarray, *, patch: int, cost: Cost, devices: int) -> dict[str, float]:
    """The columns of the table: what the batches of an epoch hold, padding and blanks included.

    Args:
      tokens: (n,) patches of every image.

    Returns:
      shapes: compiled programs.
      tokens, poster_compute (the square of tokens, as the poster defines it), attention (pairs of tokens), flops (of
        the model, forward): percent of the same for every image alone.
      wasted: rows (of rebucketed attention: places of images) that hold none, percent.
      steps: batches of an epoch.
      slowest_device: FLOPs of the device that has most to do in a step against the average of all devices; in mode
        dbb every device has a batch of its own.
    """
    totals, work = np.zeros(3), []
    counts = np.append(np.asarray(tokens, np.int64), 0)
    slots = used = 0
    for step in plan.steps:
        by_row = step_cost(step, counts, patch, cost)
        totals += by_row.sum(1)
        held = step.ids != PAD
        if held.ndim == 2 and "attention" not in dict(step.bucket):
            held = held.any(1)
        slots, used = slots + held.size, used + int(held.sum())
        own_batch = len(step.ids) % devices or "height" in dict(step.bucket)
        work.append(by_row[2].sum(keepdims=True) if own_batch else by_row[2].reshape(devices, -1).sum(1))
    if len(work[0]) == 1:  # `devices` batches at a time
        flat = np.concatenate(work)
        work = list(flat[: len(flat) // devices * devices].reshape(-1, devices)) or [flat]
    real = np.asarray(tokens, np.float64)
    ratio = totals / [real.sum(), (real**2).sum(), cost.image(real).sum()]
    return {
        "shapes": len(plan.batch_sizes),
        "tokens": 100 * float(ratio[0]),
        "poster_compute": 100 * float(ratio[0] ** 2),
        "attention": 100 * float(ratio[1]),
        "flops": 100 * float(ratio[2]),
        "wasted": 100 * (1 - used / slots),
        "steps": len(plan.steps),
        "slowest_device": float(sum(w.max() for w in work) / sum(w.mean() for w in work)),
    }


def step_cost(step: Step, counts: np.ndarray, patch: int, cost: Cost) -> np.ndarray:
    """(3, rows): tokens, pairs in attention and FLOPs of every row of a batch; padding costs what it computes.

    Args:
      counts: (n + 1,) patches of every image, then a 0 for `PAD`.
    """
    bucket, (b, *_) = dict(step.bucket), step.ids.shape
    if "images" not in bucket:
        n = bucket["tokens"] if "tokens" in bucket else -(-bucket["height"] // patch) * -(-bucket["width"] // patch)
        return np.repeat(np.array([[n], [float(n) ** 2], [float(cost.image(n))]]), b, axis=1)
    n, k = bucket["tokens"], bucket["images"]
    if "attention" in bucket:
        a = bucket["attention"]
        flops = row_linear(n, k, cost) + k * float(cost.image_attention(a))
        return np.repeat(np.array([[n], [k * float(a) ** 2], [flops]]), b, axis=1)
    inside = counts[step.ids]
    flops = row_linear(n, k, cost) + row_attention(inside, cost)
    return np.stack([np.full(b, float(n)), touched(inside), flops])


def exceeded(
    rows: Sequence[Mapping[str, Any]], bounds: Mapping[str, Mapping[str, float]], slack: float
) -> Iterator[str]:
    """What breaks a bound, one line each.

    Args:
      rows: of `table`.
      bounds: {name of a plan: {column: at most}}.
      slack: points that percentages may be above their bound.

    Raises:
      UserError: a bound is about a plan or a column that does not exist.
    """
    named = {row["plan"]: row for row in rows}
    for name, limits in bounds.items():
        if name not in named:
            raise UserError(f"config.preflight.bounds.{name}: there is no such plan; there are {', '.join(named)}")
        for column, limit in limits.items():
            if column not in COLUMNS:
                raise UserError(f"config.preflight.bounds.{name}.{column}: use one of {', '.join(COLUMNS)}")
            limit += slack if column in BOUNDED else 0
            if named[name][column] > limit + 1e-9:
                yield f"{name}: {column} is {named[name][column]:.2f}, its bound is {limit:g}"
