"""Mode `buckets`: studies padded to a grid of fixed sizes, left-overs promoted.

`buckets` is `{axis: allowed sizes}` and the buckets are their product; no batch has more rows than there are records.
"""

from dataclasses import dataclass

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.data.plan import PAD, Bucket, Request, Sizes, Step, batch_sizes, check_fits, grid, nothing_left


def fit(
    request: Request,
) -> "Buckets":
    """See `plan.planner`.

    Raises:
      UserError: no buckets, or a record that none of them holds.
    """
    if request.buckets is None:
        raise UserError("input.buckets is missing: mode 'buckets' needs {axis: sizes}, e.g. scans=(1, 2, 4)")
    cells = grid(request.buckets)
    check_fits(request.sizes, request.ids, request.buckets, request.keys)
    rows = batch_sizes(cells, batch_size=request.batch_size, budget=request.budget, multiple_of=request.multiple_of)
    if not request.drop_remainder:  # a few studies need no batch of hundreds of rows
        enough = -(-len(request.ids) // request.multiple_of) * request.multiple_of
        rows = {cell: min(n, enough) for cell, n in rows.items()}
    return Buckets(request.sizes, request.ids, cells, rows, request.drop_remainder)


@dataclass(frozen=True)
class Buckets:
    """Every record in the cheapest bucket that holds it; what does not fill a batch moves up to the next bucket."""

    sizes: Sizes
    ids: np.ndarray
    cells: list[Bucket]  # cheapest first
    rows: dict[Bucket, int]
    drop_remainder: bool
    steady = True

    def steps(self, rng: np.random.Generator | None, epoch: int) -> list[Step]:
        """Moved records go first in their new bucket, so they move once, and the records left over there are its own.
        Only the largest bucket can end with an incomplete batch. How many batches each bucket gets depends on counts
        alone, hence it is the same in every epoch.
        """
        sizes, ids, cells, rows = self.sizes, self.ids, self.cells, self.rows
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
            elif not self.drop_remainder:
                if rng is None:  # these may all be small; training needs the same buckets in every epoch
                    fits = [
                        c for c in cells if all(sizes[axis][rest].max() <= n for axis, n in c) and rows[c] >= len(rest)
                    ]
                    cell = fits[0]
                steps.append(Step(cell, np.concatenate([ids[rest], np.full(rows[cell] - len(rest), PAD)])))
        if not steps:
            raise nothing_left(len(ids), max(rows.values()))
        return steps if rng is None else [steps[k] for k in rng.permutation(len(steps))]


def _cheapest(sizes: Sizes, cells: list[Bucket]) -> np.ndarray:
    """(n,) index into `cells` (cheapest first) of the first bucket that holds each record."""
    n = len(next(iter(sizes.values())))
    home = np.full(n, -1)
    for i, cell in enumerate(cells):
        home[(home < 0) & np.all([sizes[axis] <= size for axis, size in cell], axis=0)] = i
    return home
