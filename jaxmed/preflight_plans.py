"""What plans cost on a list of image sizes, against padding every image to the patch alone (spec: radiograph MAE,
section 3): the table that `python -m jaxmed.preflight --sizes` prints, and its bounds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.data import plan as planning
from jaxmed.data.plan import PAD, Step
from jaxmed.data.plan_cost import Cost
from jaxmed.data.plan_pack import BLOCK

COLUMNS = ("shapes", "tokens", "poster_compute", "attention", "flops", "wasted", "steps", "slowest_device")
BOUNDED = ("tokens", "poster_compute", "attention", "flops")


def rows(
    height: np.ndarray,
    width: np.ndarray,
    *,
    patch: int,
    cost: Cost,
    cost_options: Mapping[str, Any],
    budget: int,
    devices: int,
    multiple: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """One row of the table for each way to plan.

    Args:
      height, width: (n,) pixels.
      patch: edge of a patch.
      cost, cost_options: of the model, as an object and as the option of the plan.
      budget: padded tokens of a global batch (not for dbb, which has batches of `batch_size` per device).
      devices: that share a batch.
      multiple: of fitted lengths.
      seed: of the order of batches (which decides the slowest device of dbb).
    """
    high, wide = -(-height // patch), -(-width // patch)
    sizes = {"height": height, "width": width, "tokens": high * wide}
    fitted = {"multiple": multiple, "cost": cost_options}
    shared = {"budget": budget, "multiple_of": devices}
    ways = (
        ("dbb", "published bins", {"batch_size": batch_size}, {}),
        ("length", "at most 16 shapes", shared, {"lengths": 16, **fitted}),
        ("length", "at most 32 shapes", shared, {"lengths": 32, **fitted}),
        ("pack", "blocks", shared, {"attention": "blocks", "cost": cost_options}),
        ("pack", "rebucket", shared, {"attention": "rebucket", "lengths": 17, **fitted}),
    )
    for mode, name, how, options in ways:
        planner = planning.planner(sizes, np.arange(len(height)), mode=mode, options=options, **how)
        plan = planning.epoch_of(planner, seed=seed, epoch=0)
        yield {"mode": mode, "plan": name, **measure(plan, sizes["tokens"], patch=patch, cost=cost, devices=devices)}


def measure(plan: planning.Plan, tokens: np.ndarray, *, patch: int, cost: Cost, devices: int) -> dict[str, float]:
    """The columns of the table: what the batches of an epoch hold, padding and blanks included.

    Args:
      tokens: (n,) patches of every image.

    Returns:
      shapes: compiled programs. tokens, poster_compute (the square of tokens, as the poster defines it), attention
      (pairs of tokens), flops (of the model, forward): percent of the same for every image alone. wasted: places for
      images that hold none, percent. steps: per epoch. slowest_device: FLOPs of the device that has most to do in a
      step against the average of all devices; in mode dbb every device has a batch of its own.
    """
    totals, work = np.zeros(3), []
    counts = np.append(np.asarray(tokens, np.int64), 0)
    slots = images = 0
    for step in plan.steps:
        by_row = step_cost(step, counts, patch, cost)
        totals += by_row.sum(1)
        slots, images = slots + step.ids.size, images + int((step.ids != PAD).sum())
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
        "wasted": 100 * (1 - images / slots),
        "steps": len(plan.steps),
        "slowest_device": float(sum(w.max() for w in work) / sum(w.mean() for w in work)),
    }


def step_cost(step: Step, counts: np.ndarray, patch: int, cost: Cost) -> np.ndarray:
    """(3, rows): tokens, pairs in attention and FLOPs of every row of a batch; padding costs what it computes.

    Packed rows have static buffers: N patches and K class tokens in the decoder, the visible part of N and K class
    tokens in the encoder.

    Args:
      counts: (n + 1,) patches of every image, then a 0 for `PAD`.
    """
    bucket, (b, *_) = dict(step.bucket), step.ids.shape
    if "images" not in bucket:
        n = bucket["tokens"] if "tokens" in bucket else -(-bucket["height"] // patch) * -(-bucket["width"] // patch)
        return np.repeat(np.array([[n], [float(n) ** 2], [float(cost.image(n))]]), b, axis=1)
    n, k = bucket["tokens"], bucket["images"]
    linear = float(cost.linear(n, cost.visible(n) - 1 + k, n + k))
    if "attention" in bucket:
        a = bucket["attention"]
        return np.repeat(np.array([[n], [k * float(a) ** 2], [linear + k * float(cost.image_attention(a))]]), b, axis=1)
    inside = counts[step.ids]
    real = step.ids != PAD
    pairs = touched(inside)
    flops = linear + cost.attention(touched(np.where(real, cost.visible(inside), 0)), touched(inside + real))
    return np.stack([np.full(b, float(n)), pairs, flops])


def touched(segments: np.ndarray) -> np.ndarray:
    """(rows,) pairs of tokens in the blocks that a block-skipping kernel computes: those where an image meets itself.

    Args:
      segments: (rows, k) tokens of the images that lie one after the other in each row; 0 for none.
    """
    ends = np.cumsum(segments, axis=1).astype(np.int64)
    first, last = (ends - segments.astype(np.int64)) // BLOCK, (ends - 1) // BLOCK
    blocks = np.where(segments > 0, (last - first + 1) ** 2, 0).sum(1)
    # A block on the diagonal that the end of one image and the start of the next share was counted for each.
    reached = np.maximum.accumulate(np.where(segments > 0, last, -1), axis=1)
    before = np.concatenate([np.full((len(segments), 1), -1), reached[:, :-1]], axis=1)
    shared = ((segments > 0) & (before >= first)).sum(1)
    return (blocks - shared) * float(BLOCK) ** 2


def exceeded(table: Sequence[Mapping[str, Any]], bounds: Sequence[Mapping[str, Any]], slack: float) -> list[str]:
    """What breaks a bound, one line each.

    Args:
      table: rows as from `rows`.
      bounds: each `{"mode", "shapes": at most, and any of BOUNDED: percent}`; it holds for every row of its mode with
        so many shapes; with "plan", for that plan only.
      slack: points more.

    Raises:
      UserError: a bound that says nothing known, or that no row is subject to.
    """
    lines = []
    for bound in bounds:
        unknown = sorted(set(bound) - {"mode", "plan", "shapes", *COLUMNS})
        if unknown or "mode" not in bound:
            raise UserError(
                f"config.preflight.bounds: {dict(bound)} needs 'mode' and may have 'plan', {', '.join(COLUMNS)}"
                + (f", not {unknown[0]!r}" if unknown else "")
            )
        about = [r for r in table if r["mode"] == bound["mode"] and r["plan"] == bound.get("plan", r["plan"])]
        if not about:
            raise UserError(f"config.preflight.bounds: no plan is subject to {dict(bound)}")
        for row in about:
            for column in COLUMNS:
                limit = bound.get(column)
                limit = None if limit is None else limit + (slack if column in BOUNDED else 0)
                if limit is not None and row[column] > limit + 1e-9:
                    lines.append(f"{row['mode']} ({row['plan']}): {column} {row[column]:.2f} exceeds {limit:g}")
    return lines
