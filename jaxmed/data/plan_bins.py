"""Mode `dbb`: dynamic batch binning as it was published (spec: radiograph MAE, section 3), every record kept.

Height and width go, each for itself, to the next edge; a side above the last edge keeps its own size. Inside each bin
records are shuffled and cut into batches of constant size; what is left makes a smaller one; all batches are shuffled.

Buckets are `(("height", H), ("width", W))` in pixels; that of a smaller batch also says its number of rows,
`(("height", H), ("rows", 5), ("width", W))`, because it is compiled for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxmed.core.errors import UserError
from jaxmed.data.plan import PAD, Bucket, Request, Step, batch_sizes, nothing_left

EDGES = (1152, 1536, 1920, 2304, 2688, 3072)
BATCH_SIZE = 16
PROBES = ("none", "first", "reference")


def assign(size: Int[np.ndarray, "n"], edges: Sequence[int]) -> Int[np.ndarray, "n"]:
    """The smallest edge that is not below each size; the size itself above the last edge."""
    size, ordered = np.asarray(size, np.int64), np.array(sorted(edges), np.int64)
    place = np.searchsorted(ordered, size)
    return np.where(place < len(ordered), np.append(ordered, 0)[place], size)


def fit(
    request: Request,
    *,
    memory_probe: str = "none",
) -> "Bins":
    """See `plan.planner`.

    Args:
      request: `sizes` with "height" and "width" in pixels.
        `buckets`: `{"height": edges, "width": edges}`, by default `EDGES` for both; no edges: every size is its own
        bin. `batch_size`: by default `BATCH_SIZE`. `drop_remainder`: without the smaller batches.
      memory_probe: whether the first batch is one that needs the most memory. "none"; "first": a whole batch of the
        bin with the most pixels; "reference": as published, from the lexicographically largest bin that fills a batch,
        with its defect: the records of that batch are taken from the pool for ever, once before the first epoch
        (never shown) and once in each epoch.

    Raises:
      UserError: an option is not known or cannot be met.
    """
    if memory_probe not in PROBES:
        raise UserError(f"input.plan_options.memory_probe={memory_probe!r}: use one of {', '.join(PROBES)}")
    if request.budget is not None:
        raise UserError(
            f"input.budget={request.budget}: mode 'dbb' has one batch size for all bins; give input.batch_size"
        )
    buckets = {"height": EDGES, "width": EDGES} if request.buckets is None else request.buckets
    if set(buckets) != {"height", "width"} or any(n < 1 for edges in buckets.values() for n in edges):
        raise UserError(f"input.buckets={dict(buckets)!r}: mode 'dbb' needs positive edges for 'height' and 'width'")
    [rows] = batch_sizes(
        [()],
        batch_size=BATCH_SIZE if request.batch_size is None else request.batch_size,
        multiple_of=request.multiple_of,
    ).values()
    bins = np.stack([assign(request.sizes[axis], buckets[axis]) for axis in ("height", "width")], axis=1)
    return Bins(request.ids, bins, rows, request.multiple_of, request.drop_remainder, memory_probe)


@dataclass(frozen=True)
class Bins:
    """See the module; `bins` is (n, 2), height and width of every record's bin."""

    ids: np.ndarray
    bins: np.ndarray
    rows: int
    multiple_of: int
    drop_remainder: bool
    memory_probe: str

    @property
    def steady(self) -> bool:
        return self.memory_probe != "reference"

    def steps(self, rng: np.random.Generator | None, epoch: int) -> list[Step]:
        pools, probe = self._pools(epoch)
        steps = []
        for cell, members in pools.items():
            order = members if rng is None else rng.permutation(members)
            for first in range(0, len(order), self.rows):
                chosen = order[first : first + self.rows]
                if len(chosen) == self.rows or not self.drop_remainder:
                    steps.append(self._step(cell, chosen))
        if not steps and probe is None:
            raise nothing_left(len(self.ids), self.rows)
        if rng is not None:
            steps = [steps[k] for k in rng.permutation(len(steps))]
        if self.memory_probe == "first":
            most = max(range(len(steps)), key=lambda k: (_pixels(steps[k].bucket) * len(steps[k].ids), -k))
            steps.insert(0, steps.pop(most))
        return steps if probe is None else [probe, *steps]

    def _step(self, cell: tuple[int, int], chosen: np.ndarray) -> Step:
        rows = -(-len(chosen) // self.multiple_of) * self.multiple_of
        sides: Bucket = (("height", cell[0]), ("width", cell[1]))
        bucket = sides if rows == self.rows else (sides[0], ("rows", rows), sides[1])
        return Step(bucket, np.concatenate([self.ids[chosen], np.full(rows - len(chosen), PAD)]))

    def _pools(self, epoch: int) -> tuple[dict[tuple[int, int], np.ndarray], Step | None]:
        """The members of every bin, in order of appearance, and with the published defect what they have lost."""
        _, first, inverse = np.unique(self.bins, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
        pools = {tuple(self.bins[first[k]].tolist()): members[k] for k in np.argsort(first, kind="stable")}
        probe = None
        if self.memory_probe == "reference":
            for taken in range(epoch + 2):  # before the first epoch, then at the start of each
                large = [cell for cell, pool in pools.items() if len(pool) >= self.rows]
                if not large:
                    return {cell: pool for cell, pool in pools.items() if len(pool)}, None
                cell = max(large)
                probe = self._step(cell, pools[cell][: self.rows]) if taken == epoch + 1 else None
                pools[cell] = pools[cell][self.rows :]
        return {cell: pool for cell, pool in pools.items() if len(pool)}, probe


def _pixels(bucket: Bucket) -> int:
    return dict(bucket)["height"] * dict(bucket)["width"]
