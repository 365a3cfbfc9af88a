"""Mode `length`: images padded to one of a few token counts, which are fitted to the index.

The records, ordered by token count, are cut from the top into whole batches: the largest fill the batches of the
longest bucket, and where its own do not fill the last of them, the largest of the next bucket move up. So no batch but
one has padding rows, and that one has the shortest bucket of all. Where the cuts are depends on token counts alone,
hence every epoch has the same batches of every bucket.

Buckets are `(("tokens", N),)`; all rows of a step have the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmed.core.errors import UserError
from jaxmed.data.plan import PAD, Request, Step, batch_sizes, check_fits, grid, nothing_left
from jaxmed.data.plan_cost import Cost

CANDIDATES = 4096  # the exact search is quadratic in them
MORE_STEPS = 1.05  # as many more steps a bucket may take if its batches are then better filled


class Cut(NamedTuple):
    """The batches of one bucket: `steps` of `rows` images; `records` of them are real, the others padding."""

    length: int
    steps: int
    rows: int
    records: int


def fit(
    request: Request,
    *,
    lengths: int = 16,
    multiple: int = 64,
    cost: Mapping[str, Any] | None = None,
) -> "Lengths":
    """See `plan.planner`.

    Args:
      request: `sizes` with "tokens".
        `buckets`: `{"tokens": lengths}` instead of fitted ones. `batch_size`, `budget`: images, or padded tokens, of a
        global batch at most.
      lengths: the most that may be fitted.
      multiple: fitted lengths are multiples of this, unless there is one for each count that occurs.
      cost: the model's sizes, see `plan_cost.Cost`; lengths are fitted to its FLOPs.

    Raises:
      UserError: an option is not known or cannot be met.
    """
    if "tokens" not in request.sizes or (request.buckets is not None and set(request.buckets) != {"tokens"}):
        raise UserError(
            f"input.mode='length' plans by 'tokens'; records have {', '.join(sorted(request.sizes))}, input.buckets is "
            f"{request.buckets and dict(request.buckets)}"
        )
    model = make_cost(cost)
    counts = np.sort(request.sizes["tokens"])

    def rows(lengths: Sequence[int]) -> dict[int, int]:
        most = batch_sizes(
            [(("tokens", n),) for n in lengths],
            batch_size=request.batch_size,
            budget=request.budget,
            multiple_of=request.multiple_of,
        )
        return {bucket[0][1]: n for bucket, n in most.items()}

    if request.buckets is not None:
        grid(request.buckets)  # checks them
        check_fits(request.sizes, request.ids, request.buckets, request.keys)
        allowed = sorted({int(n) for n in request.buckets["tokens"]})
        cuts = cut(counts, allowed, rows(allowed), request.multiple_of)
    else:
        cuts = fit_cuts(counts, lengths, multiple, model.image, rows, request.multiple_of)
    if request.drop_remainder:
        cuts = drop_incomplete(cuts)
    return Lengths(request.sizes["tokens"], request.ids, tuple(cuts))


def make_cost(cost: Mapping[str, Any] | None) -> Cost:
    """Raises:
    UserError: `Cost` has no such field.
    """
    if unknown := sorted(set(cost or ()) - set(Cost.__dataclass_fields__)):
        raise UserError(
            f"input.plan_options.cost.{unknown[0]} is not a size of the model; it has "
            f"{', '.join(Cost.__dataclass_fields__)}"
        )
    return Cost(**(cost or {}))


def fit_lengths(
    counts: Int[np.ndarray, "n"], most: int, multiple: int, cost: Callable[[np.ndarray], np.ndarray]
) -> list[list[int]]:
    """The best 1, 2, ... `most` lengths for these token counts, exactly: the sum of `cost(length)` is least.

    Dynamic programming over the multiples that occur: the cost of covering everything up to length j with k lengths is
    the least, over i < j, of what i costs with k - 1 lengths plus the images between them at the cost of j.

    Raises:
      UserError: an option is not positive, or there are too many candidates.
    """
    for name, value in (("lengths", most), ("multiple", multiple)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise UserError(f"input.plan_options.{name}={value!r} must be a whole number of at least 1")
    if len(np.unique(counts)) <= most:  # nothing needs to be rounded
        multiple = 1
    candidates, images = np.unique(-(-counts // multiple) * multiple, return_counts=True)
    if len(candidates) > CANDIDATES:
        raise UserError(
            f"input.plan_options.multiple={multiple} leaves {len(candidates)} lengths to choose from, more than "
            f"{CANDIDATES}: use a larger multiple"
        )
    below = np.concatenate([[0], np.cumsum(images)])
    price = np.asarray(cost(candidates), np.float64)
    # [i, j]: candidates i .. j share length j; infinite above the diagonal.
    step = price[None] * (below[None, 1:] - below[:-1, None])
    step[np.tril_indices(len(candidates), -1)] = np.inf
    best, choices, found = step[0], [], [[int(candidates[-1])]]
    for _ in range(1, min(most, len(candidates))):
        through = np.concatenate([[np.inf], best[:-1]])[:, None] + step  # row i: one length fewer ends before i
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
        ends = [len(candidates) - 1]
        for choice in reversed(choices):
            ends.append(int(choice[ends[-1]]) - 1)
        found.append([int(candidates[e]) for e in reversed(ends)])
    return found


def fit_cuts(
    counts: np.ndarray,
    most: int,
    multiple: int,
    cost: Callable[[np.ndarray], np.ndarray],
    rows: Callable[[Sequence[int]], dict[int, int]],
    multiple_of: int,
) -> list[Cut]:
    """The cheapest cuts with at most `most` lengths, padding rows and moved images counted.

    With few images per bucket fewer lengths can be better; and lengths that suit whole groups of `multiple_of` images
    (each as long as its longest) can be better than those that suit single images. All are compared.

    Args:
      counts: ascending.
      rows: most images of a batch, for given lengths.
    """

    def price(lengths: Sequence[int]) -> float:
        cuts = cut(counts, lengths, rows(lengths), multiple_of)
        padded = np.array([(c.length, c.steps * c.rows) for c in cuts])
        return float((cost(padded[:, 0]) * padded[:, 1]).sum())

    groups = counts[::-1][::multiple_of][::-1]  # the longest of every group
    best = min(fit_lengths(counts, most, multiple, cost) + fit_lengths(groups, most, multiple, cost), key=price)
    # What whole batches cost is no sum over lengths: from the best so far, single lengths are moved while it helps.
    found, least = True, price(best)
    while found:
        found = False
        for i, step in product(range(len(best) - 1), (-2, -1, 1, 2)):
            moved = sorted({*best[:i], best[i] + step * multiple, *best[i + 1 :]})
            if moved[0] > 0 and moved[-1] == best[-1] and len(moved) == len(best) and (this := price(moved)) < least:
                best, least, found = moved, this, True
    return cut(counts, best, rows(best), multiple_of)


def cut(counts: np.ndarray, lengths: Sequence[int], most: Mapping[int, int], multiple_of: int) -> list[Cut]:
    """Cuts the ascending `counts` from the top into whole batches.

    Args:
      lengths: ascending, the last holds the largest count.
      most: images of a batch of each length at most, a multiple of `multiple_of`.

    Returns:
      Longest first. Only the last one may have padding rows.
    """
    left, cuts = len(counts), []
    starts = np.searchsorted(counts, [0, *(n + 1 for n in lengths[:-1])])
    for start, length in zip(starts[::-1].tolist(), reversed(list(lengths))):
        own = left - start
        if own <= 0:
            continue
        fewest = -(-own // most[length])
        options = [(n, -(-own // (n * multiple_of)) * multiple_of) for n in range(fewest, int(fewest * MORE_STEPS) + 1)]
        steps, rows = min(options, key=lambda o: (o[0] * o[1], o[0]))
        cuts.append(Cut(int(length), steps, rows, min(steps * rows, left)))
        left -= cuts[-1].records
    return cuts


def drop_incomplete(cuts: Sequence[Cut]) -> list[Cut]:
    """Without the one batch that has padding rows.

    Raises:
      UserError: nothing is left.
    """
    kept = [c._replace(steps=c.records // c.rows, records=c.records // c.rows * c.rows) for c in cuts]
    if not any(c.steps for c in kept):
        raise nothing_left(sum(c.records for c in cuts), max(c.rows for c in cuts))
    return [c for c in kept if c.steps]


@dataclass(frozen=True)
class Lengths:
    """See the module; `tokens` (n,) are aligned with `ids`."""

    tokens: np.ndarray
    ids: np.ndarray
    cuts: tuple[Cut, ...]
    steady = True

    def steps(self, rng: np.random.Generator | None, epoch: int) -> list[Step]:
        ids = by_count(self.tokens, self.ids, rng)
        steps, end = [], len(ids)
        for part in self.cuts:
            members = ids[end - part.records : end]
            end -= part.records
            # Those of equal count that a cut separates are chosen anew in every epoch; so is the order inside.
            order = members if rng is None else rng.permutation(members)
            padded = np.concatenate([order, np.full(part.steps * part.rows - part.records, PAD)])
            steps += [Step((("tokens", part.length),), row) for row in padded.reshape(part.steps, part.rows)]
        return steps if rng is None else [steps[k] for k in rng.permutation(len(steps))]


def by_count(tokens: np.ndarray, ids: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """The ids in ascending order of their token counts; equal ones in random order (without a generator: as given)."""
    order = np.arange(len(ids)) if rng is None else rng.permutation(len(ids))
    return ids[order[np.argsort(tokens[order], kind="stable")]]
