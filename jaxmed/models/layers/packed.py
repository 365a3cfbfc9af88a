"""Attention inside the images of packed rows, in plain XLA: blocks of keys that no query of a block needs are skipped.

A row's images lie one after the other, so the keys of a block of queries are a stretch of blocks: an inner loop runs
over just these, with an online softmax (Dao et al. 2022, arXiv 2205.14135). How often it runs is known on the device
only; no matrix and no mask of a whole row ever exists. Memory and work are those of the images, not of the row squared.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128
# Finite, so that a query that sees nothing has a gradient (zero) instead of not-a-number.
MASKED = -1e30
# The segment of tokens that are nothing: they see nothing and nobody sees them.
PADDING = jnp.iinfo(jnp.int32).max

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_in_segments(
    q: Float[Array, "r a n k"],
    k: Float[Array, "r a n k"],
    v: Float[Array, "r a n k"],
    segment_ids: Int[Array, "r n"],
    block: int = BLOCK,
) -> Float[Array, "r a n k"]:
    """softmax(q k^T) v within segments; softmax in float32, zeros for padding.

    Args:
      q: divided by the root of a head's width already.
      segment_ids: never decreasing along a row, `PADDING` at its end.
      block: tokens of a block; rows are padded to whole ones.
    """
    n = q.shape[2]
    to = -(-n // block) * block
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, to - n), (0, 0))) for x in (q, k, v))
    ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, to - n)), constant_values=PADDING)
    return _attend(block, q, k, v, ids)[:, :, :n]


def needed_blocks(ids: Int[Array, "r n"], block: int) -> tuple[Int[Array, "r b"], Int[Array, "r b"]]:
    """For every block of tokens, the first block that it needs and the one behind the last; these need it too."""
    blocks = ids.reshape(ids.shape[0], -1, block)
    first = blocks[:, :, 0]
    last = jnp.where(blocks == PADDING, -1, blocks).max(-1)
    find = jax.vmap(lambda a, x, side: jnp.searchsorted(a, x, side=side, method="compare_all"), (0, 0, None))
    low = find(ids, first, "left") // block
    high = -(-find(ids, last, "right") // block)
    return jnp.where(last < 0, 0, low), jnp.where(last < 0, 0, high)


def _cut(x, i, block):
    """Block i of the tokens, which are the last axis but one (or, of ids, the last)."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=max(x.ndim - 2, 0))


def _same(ids, i, j, block):
    rows, columns = _cut(ids, i, block)[:, None], _cut(ids, j, block)[None]
    return (rows == columns) & (rows != PADDING)


def _forward_row(block, q, k, v, ids, low, high):
    """Of one row: values (a, n, k), and the log of the sum of exponentials (a, n, 1)."""
    heads, n, width = q.shape

    def one(i):
        mine = _cut(q, i, block)

        def step(j, carry):
            out, top, total = carry
            same = _same(ids, i, j, block)[None]
            logits = jnp.where(same, _product("aqk,amk->aqm", mine, _cut(k, j, block)), MASKED)
            higher = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights = jnp.where(same, jnp.exp(logits - higher), 0.0)
            scale = jnp.exp(top - higher)
            part = _product("aqm,amk->aqk", weights.astype(v.dtype), _cut(v, j, block))
            return out * scale + part, higher, total * scale + weights.sum(-1, keepdims=True)

        start = jnp.zeros((heads, block, width)), jnp.full((heads, block, 1), MASKED), jnp.zeros((heads, block, 1))
        out, top, total = jax.lax.fori_loop(low[i], high[i], step, start)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return (out / total).astype(v.dtype), jnp.where(some, top + jnp.log(total), 0.0)

    parts = jax.lax.map(one, jnp.arange(n // block))
    return tuple(x.swapaxes(0, 1).reshape(heads, n, -1) for x in parts)


def _backward_row(block, q, k, v, ids, low, high, total, delta, d_out):
    """Of one row; the weights are made again, block by block."""

    def one(i, grads):
        mine, own_total, own_delta, own_d_out = (_cut(x, i, block) for x in (q, total, delta, d_out))

        def step(j, carry):
            d_q, d_k, d_v = carry
            keys, values = _cut(k, j, block), _cut(v, j, block)
            same = _same(ids, i, j, block)[None]
            weights = jnp.where(same, jnp.exp(_product("aqk,amk->aqm", mine, keys) - own_total), 0.0)
            d_weights = _product("aqk,amk->aqm", own_d_out, values)
            d_logits = (weights * (d_weights - own_delta)).astype(q.dtype)
            d_q = d_q + _product("aqm,amk->aqk", d_logits, keys)
            d_k = _add(d_k, _product("aqm,aqk->amk", d_logits, mine), j, block)
            d_v = _add(d_v, _product("aqm,aqk->amk", weights.astype(v.dtype), own_d_out), j, block)
            return d_q, d_k, d_v

        d_q, d_k, d_v = grads
        own, d_k, d_v = jax.lax.fori_loop(low[i], high[i], step, (jnp.zeros(mine.shape, jnp.float32), d_k, d_v))
        return _add(d_q, own, i, block), d_k, d_v

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads = jax.lax.fori_loop(0, q.shape[1] // block, one, zeros)
    return tuple(g.astype(x.dtype) for g, x in zip(grads, (q, k, v)))


def _add(x, part, i, block):
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, i, block) + part, i * block, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q, k, v, ids):
    return _forward(block, q, k, v, ids)[0]


def _forward(block, q, k, v, ids):
    bounds = needed_blocks(ids, block)
    out, total = jax.lax.map(lambda x: _forward_row(block, *x), (q, k, v, ids, *bounds))
    return out, (q, k, v, ids, out, total)


def _backward(block, saved, d_out):
    q, k, v, ids, out, total = saved
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    rows = (q, k, v, ids, *needed_blocks(ids, block), total, delta, d_out)
    return *jax.lax.map(lambda x: _backward_row(block, *x), rows), None


_attend.defvjp(_forward, _backward)
