"""Mode `pack`: rows of a fixed token budget that hold several images each.

Two forms, by the option `attention`:

  blocks    any images share a row, best fit first; one shape for everything. The attention kernel skips the blocks in
            which no image has both ends. Rows of similar work make a batch, so that no device waits for another.
            Bucket `(("images", K), ("tokens", N))`.
  rebucket  the images of a row have similar token counts (cut as in mode `length`), so that attention can be padded
            again, to A tokens per image, while everything else runs on packed tokens. Images are dealt to rows such
            that all rows of a bucket have nearly the same sum, which is N.
            Bucket `(("attention", A), ("images", K), ("tokens", N))`.

Tokens are patches: class tokens come on top, one per image. Which token counts share a row is fitted once, and which
of the images with a count takes its place is drawn in every epoch: all epochs have the same number of steps.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64, Num

from jaxmed.core.errors import UserError
from jaxmed.data.plan import PAD, Bucket, Request, Step, nothing_left
from jaxmed.data.plan_cost import Cost
from jaxmed.data.plan_length import by_count, drop_incomplete, fit_cuts, make_cost

FORMS = ("blocks", "rebucket")
ALIGN = 16  # fitted row lengths are multiples of this, where that costs less than 0.5 percent
BLOCK = 128  # edge of the blocks that attention skips
SLOWER = 2.0  # attention runs at about half the speed of matrix products


def fit(
    request: Request,
    *,
    attention: str = "blocks",
    lengths: int = 16,
    multiple: int = 64,
    cost: Mapping[str, Any] | None = None,
) -> "Rows":
    """See `plan.planner`.

    Args:
      request: `sizes` with "tokens".
        `buckets`: `{"tokens": (N,)}` and `"images": (K,)`: the most tokens and images of a row. Default of tokens: for
        "blocks" what is cheapest, for "rebucket" what the budget gives every device; of images: no limit.
        `batch_size`, `budget`: rows, or padded tokens, of a global batch at most.
      attention: one of `FORMS`.
      lengths, multiple: of "rebucket": the token counts that attention is padded to, see `plan_length.fit`.
      cost: the model's sizes, see `plan_cost.Cost`.

    Raises:
      UserError: an option is not known or cannot be met, an image does not fit a row.
    """
    if attention not in FORMS:
        raise UserError(f"input.plan_options.attention={attention!r}: use one of {', '.join(FORMS)}")
    if "tokens" not in request.sizes or set(request.buckets or ()) - {"tokens", "images"}:
        raise UserError(
            f"input.mode='pack' plans rows of 'tokens' and 'images'; records have {', '.join(sorted(request.sizes))}, "
            f"input.buckets is {request.buckets and dict(request.buckets)}"
        )
    room, images = (_one(request.buckets or {}, axis) for axis in ("tokens", "images"))
    model = make_cost(cost)
    fixed = room is not None
    if not fixed and request.budget is not None:
        room = request.budget // request.multiple_of
    rows = _rows(room, request.batch_size, request.budget, request.multiple_of)
    longest = int(np.argmax(request.sizes["tokens"]))
    if (need := int(request.sizes["tokens"][longest])) > room:
        name = request.keys[longest] if request.keys is not None else f"with id {request.ids[longest]}"
        raise UserError(
            f"study {name} has {need} tokens, more than a row (input.buckets.tokens={room}): use rows of at least "
            f"{need} tokens, or a larger input.budget"
        )
    counts = np.sort(request.sizes["tokens"])
    if attention == "rebucket":
        parts = _rebucket(
            counts, room, images, rows, request.multiple_of, lengths, multiple, model, request.drop_remainder
        )
    else:
        table, tokens = _cheapest_rows(counts, room, None if fixed else BLOCK, images, model)
        rows = _rows(tokens, request.batch_size, request.budget, request.multiple_of)
        parts = [_batches(table, tokens, counts, rows, request.multiple_of, request.drop_remainder)]
    return Rows(request.sizes["tokens"], request.ids, tuple(parts))


def _one(buckets: Mapping[str, Sequence[int]], axis: str) -> int | None:
    values = buckets.get(axis)
    if values is None:
        return None
    if len(values) != 1 or int(values[0]) != values[0] or values[0] < 1:
        raise UserError(f"input.buckets.{axis}={tuple(values)!r}: mode 'pack' has one kind of row; give one number")
    return int(values[0])


def _rows(room: int | None, batch_size: int | None, budget: int | None, multiple_of: int) -> int:
    """Rows of a global batch at most."""
    if (batch_size is None) == (budget is None):
        raise UserError(f"give either input.batch_size or input.budget, got {batch_size} and {budget}")
    if room is None:
        raise UserError("input.buckets is missing: mode 'pack' with input.batch_size (rows) needs tokens=(N,)")
    rows = batch_size if batch_size is not None else budget // max(room, 1)
    if rows < multiple_of or (batch_size is not None and rows % multiple_of):
        given = f"input.batch_size={batch_size}" if budget is None else f"input.budget={budget}"
        raise UserError(
            f"{given} does not make batches of a multiple of {multiple_of} rows (data shards of the mesh x "
            f"accumulation steps) of {room} tokens: use at least {multiple_of * (1 if budget is None else room)}, or "
            "shorter rows"
        )
    return rows // multiple_of * multiple_of


# --- fitting: which places in the ascending order of token counts share a row ----------------------------------------


def best_fit(counts: Int[np.ndarray, "n"], room: int, images: int) -> list[list[int]]:
    """Rows of at most `room` tokens and `images` images: the largest image first, into the fullest row that holds it.

    Args:
      counts: (n,) ascending, none above `room`.

    Returns:
      For every row the places (indices into `counts`) of its images.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), ascending
    sizes = counts.tolist()
    for place in range(len(sizes) - 1, -1, -1):
        size = sizes[place]
        k = bisect_left(open_rows, (size, -1))
        if k == len(open_rows):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = open_rows.pop(k)
        rows[row].append(place)
        if left - size >= sizes[0] and len(rows[row]) < images:
            insort(open_rows, (left - size, row))
    return rows


def deal(counts: Int[np.ndarray, "n"], rows: int) -> Int64[np.ndarray, "rows k"]:
    """Deals images to rows, the same number to each (but for `PAD` in the last round), with sums as equal as can be.

    Round by round, largest images first: of each round, the largest goes to the row that has least.

    Args:
      counts: (n,) ascending.

    Returns:
      Places (indices into `counts`), `PAD` for none.
    """
    k = -(-len(counts) // rows)
    places = np.concatenate([np.arange(len(counts) - 1, -1, -1), np.full(k * rows - len(counts), PAD)])
    padded = np.append(counts, 0)  # counts of PAD
    sums, dealt = np.zeros(rows, np.int64), np.empty((rows, k), np.int64)
    for i, hand in enumerate(places.reshape(k, rows)):
        poorest = np.argsort(sums, kind="stable")
        dealt[poorest, i] = hand
        sums[poorest] += padded[hand]
    return dealt


@dataclass(frozen=True)
class Part:
    """The batches of one bucket: places `(steps, rows, K)` in the ascending order of counts, `PAD` for none."""

    bucket: Bucket
    places: np.ndarray


def _cheapest_rows(
    counts: np.ndarray, room: int, shorter: int | None, images: int | None, cost: Cost
) -> tuple[np.ndarray, int]:
    """Rows for any images, as places (rows, K), and their tokens N: of what is tried, the cheapest.

    Args:
      shorter: rows may be shorter than `room`, multiples of this.
    """
    rooms, tried = [room], []
    if shorter is not None:
        longest = -(-int(counts[-1]) // shorter) * shorter
        rooms = sorted({min(room, n) for n in (longest + shorter, 2 * longest, 4 * longest)})
    for n in rooms:
        usual = n / counts.mean()
        # More places for images cost a class token each, fewer leave rows of small images half empty.
        limits = [images] if images else sorted({min(len(counts), int(np.ceil(f * usual))) for f in (2, 4)})
        tried += [(n, _as_table(best_fit(counts, n, limit))) for limit in limits]
        # Images of few different sizes can leave a gap in every row; equal numbers of them make a shorter row.
        dealt = deal(counts, -(-len(counts) // min(limits[-1], max(1, int(usual)))))
        fullest = _fullest(counts, dealt)
        if fullest <= n:
            tried.append((fullest, dealt))

    def price(tokens: int, table: np.ndarray) -> float:
        attention = row_attention(np.append(counts, 0)[table], cost).sum()
        return float(len(table) * row_linear(tokens, images or table.shape[1], cost) + SLOWER * attention)

    tokens, table = min(tried, key=lambda t: price(*t))
    blank = np.full((len(table), (images or table.shape[1]) - table.shape[1]), PAD)
    return np.concatenate([table, blank], axis=1), tokens


def _fullest(counts: np.ndarray, table: np.ndarray) -> int:
    """The length that rows (places) need."""
    tokens = int(np.append(counts, 0)[table].sum(1).max())
    aligned = -(-tokens // ALIGN) * ALIGN
    return aligned if aligned <= 1.005 * tokens else tokens


def _as_table(rows: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows))), PAD)
    for line, row in zip(table, rows):
        line[: len(row)] = row
    return table


def _batches(table: np.ndarray, tokens: int, counts: np.ndarray, rows: int, multiple_of: int, drop: bool) -> Part:
    """Batches of rows with similar work, so that no device waits for another; at most `rows` rows each."""
    sizes = np.append(counts, 0)[table]
    table = table[np.lexsort((sizes.sum(1), (sizes**2).sum(1)))[::-1]]
    steps = -(-len(table) // rows)
    rows = -(-len(table) // steps // multiple_of) * multiple_of
    if drop:
        steps = len(table) // rows
        if not steps:
            raise nothing_left(len(counts), rows)
    blank = np.full((max(0, steps * rows - len(table)), table.shape[1]), PAD)
    places = np.concatenate([table, blank])[: steps * rows].reshape(steps, rows, -1)
    return Part((("images", table.shape[1]), ("tokens", tokens)), places)


def _rebucket(counts, room, images, rows, multiple_of, lengths, multiple, cost, drop_remainder) -> list[Part]:
    def most(lengths: Sequence[int]) -> dict[int, int]:
        fitting = {n: min(room // n if n <= room else 1, images or room) for n in lengths}
        return {n: rows * k for n, k in fitting.items()}

    cuts = fit_cuts(counts, lengths, multiple, cost.image_attention, most, rows)
    if drop_remainder:
        cuts = drop_incomplete(cuts)
    parts, end = [], len(counts)
    for part in cuts:
        start = end - part.records
        dealt = deal(counts[start:end], part.steps * rows)
        dealt[dealt != PAD] += start
        end = start
        tokens = _fullest(counts, dealt)
        bucket = (("attention", part.length), ("images", dealt.shape[1]), ("tokens", tokens))
        parts.append(Part(bucket, dealt.reshape(part.steps, rows, -1)))
    return parts


# --- what rows cost --------------------------------------------------------------------------------------------------


def row_linear(tokens: int, images: int, cost: Cost) -> float:
    """FLOPs of everything but attention in one row of N patches and K images.

    Buffers are static: N patches and K class tokens in the decoder, the visible part of N and K class tokens in the
    encoder.
    """
    return float(cost.linear(tokens, cost.visible(tokens) - 1 + images, tokens + images))


def row_attention(inside: Int[np.ndarray, "rows k"], cost: Cost) -> Float[np.ndarray, "rows"]:
    """FLOPs of attention that skips blocks, for the patches of the images in each row (0 for none)."""
    real = inside > 0
    return cost.attention(touched(np.where(real, cost.visible(inside), 0)), touched(inside + real))


def touched(segments: Num[np.ndarray, "rows k"]) -> Float[np.ndarray, "rows"]:
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


@dataclass(frozen=True)
class Rows:
    """See the module; `tokens` (n,) are aligned with `ids`."""

    tokens: np.ndarray
    ids: np.ndarray
    parts: tuple[Part, ...]
    steady = True

    def steps(self, rng: np.random.Generator | None, epoch: int) -> list[Step]:
        ids = np.append(by_count(self.tokens, self.ids, rng), PAD)
        steps = [Step(part.bucket, ids[places]) for part in self.parts for places in part.places]
        return steps if rng is None else [steps[k] for k in rng.permutation(len(steps))]
