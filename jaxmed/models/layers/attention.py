"""Attention: one function, several implementations, chosen by name.

Slices, scans and studies (or windows) are reshaped into the batch axis by the caller; masks are only for padding.
Every implementation gives the same values: masked keys have weight zero exactly, and a query that may look at nothing
gives zeros.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.core.errors import UserError
from jaxmed.core.sharding import BATCH_AXES
from jaxmed.models.layers import packed
from jaxmed.models.layers.lean import on_one_device

IMPLS = ("auto", "xla", "chunked", "cudnn", "flash_tpu", "segments")
# Finite, so that a fully masked row has a gradient (zero) instead of not-a-number.
MASKED = -1e30
# Below this many tokens the flash kernel's padding costs more than the matrix of weights.
FLASH_MIN_TOKENS = 512
TPU_LANES = 128
CUDNN_MULTIPLE = 64
CUDNN_BYTES = (2,)  # per number: it has no float32
# Weights that "chunked" makes at once: what a core's cache holds.
CHUNK_BYTES = 8 << 20


def pick(impl: str, tokens: int, dtype, segments: bool = False) -> str:
    """What "auto" means here: flash kernels where the backend has them and they pay, "chunked" on CPUs, else XLA.

    With `segments` (rows of several images, one after the other): what skips other images, or at least makes no mask.
    """
    if impl not in IMPLS:
        raise UserError(f"attn_impl: {impl!r} is not one of {', '.join(IMPLS)}")
    if impl != "auto":
        return impl
    backend = jax.default_backend()
    if segments:
        return "flash_tpu" if backend == "tpu" else "segments"
    if backend == "tpu" and tokens >= FLASH_MIN_TOKENS:
        return "flash_tpu"
    if backend == "gpu" and jnp.dtype(dtype).itemsize in CUDNN_BYTES:
        return "cudnn"
    return "chunked" if backend == "cpu" else "xla"


def attend(
    q: Float[Array, "b n a k"],
    k: Float[Array, "b m a k"],
    v: Float[Array, "b m a k"],
    *,
    mask: Bool[Array, "b m"] | Bool[Array, "b n m"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_ids: Int[Array, "b n"] | None = None,
    impl: str = "xla",
) -> Float[Array, "b n a k"]:
    """softmax(q k^T / sqrt(width of a head)) v; softmax in float32, the result in the dtype of `v`.

    Args:
      mask: 1 = this key may be seen; by key (b m), or by query and key (b n m; not with "flash_tpu").
      lengths: keys from this one on are padding.
      segment_ids: queries see only keys of their own segment (self-attention: n = m). With "flash_tpu" and "segments"
        (one of which "auto" picks) what `mask` leaves out gives zeros as a query too; "segments" needs ids in ascending
        order and what is left out at the end of the row.
      impl: "xla" and "chunked" (no matrix of weights is kept; slower where it would fit) everywhere; "cudnn" on NVIDIA
        GPUs in 16 bit; "flash_tpu" on TPUs; "segments" everywhere, for packed rows (see `layers.packed`); "auto" picks.

    Raises:
      UserError: an unknown `impl`, or one that cannot do what is asked.
    """
    b, n, m = q.shape[0], q.shape[1], k.shape[1]
    impl = pick(impl, n, v.dtype, segments=segment_ids is not None)
    by_key = mask if mask is not None and mask.ndim == 2 else None
    if lengths is not None:
        inside = jnp.arange(m)[None, :] < lengths[:, None]
        by_key = inside if by_key is None else by_key & inside
    pairs = mask if mask is not None and mask.ndim == 3 else None
    if impl in ("flash_tpu", "segments") and pairs is not None:
        raise UserError(f"attn_impl: {impl!r} takes masks by key, lengths and segment ids; use 'xla' or 'cudnn'")
    if impl == "segments":
        if segment_ids is None:
            raise UserError("attn_impl: 'segments' is for packed rows (segment_ids); use 'auto' or 'chunked'")
        return _segments(q, k, v, by_key, segment_ids)
    if impl == "flash_tpu":
        out = _flash_tpu(q, k, v, by_key, segment_ids)
        if segment_ids is not None:  # what is there sees itself: no mask of pairs is needed to tell
            return out if by_key is None else jnp.where(by_key[:, :, None, None], out, jnp.zeros((), out.dtype))
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        pairs = same if pairs is None else pairs & same
    keep = None if by_key is None else by_key[:, None, :]
    if pairs is not None:
        keep = pairs if keep is None else keep & pairs
    if impl == "chunked" and pairs is None:
        out = _chunked(q, k, v, by_key)
    elif impl in ("xla", "chunked"):
        out = _xla(q, k, v, keep)[0]
    elif impl == "cudnn":
        out = _cudnn(q, k, v, keep)
    if keep is None:
        return out
    sees = jnp.broadcast_to(keep.any(-1), (b, n))
    return jnp.where(sees[:, :, None, None], out, jnp.zeros((), out.dtype))


def attend_with_weights(
    q: Float[Array, "b n a k"],
    k: Float[Array, "b m a k"],
    v: Float[Array, "b m a k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
    add: Float[Array, "b a n m"] | None = None,
) -> tuple[Float[Array, "b n a k"], Float[Array, "b a n m"]]:
    """As `attend`, also giving the weights; `add` is added to them (its gradient is theirs: for heat maps)."""
    return _xla(q, k, v, None if mask is None else mask[:, None, :], add)


def _xla(q, k, v, keep, add=None):
    """Heads folded into the batch axis: three plain batched matrix products."""
    b, n, a, width = q.shape
    m = k.shape[1]
    logits = jnp.einsum("gnk,gmk->gnm", _fold(q * width**-0.5), _fold(k), preferred_element_type=jnp.float32)
    if keep is not None:
        logits = jnp.where(keep[:, None], logits.reshape(b, a, n, m), MASKED).reshape(b * a, n, m)
    weights = jax.nn.softmax(logits, axis=-1)
    if add is not None:
        weights = weights + add.reshape(b * a, n, m)
    out = jnp.einsum("gnm,gmk->gnk", weights.astype(v.dtype), _fold(v))
    return out.reshape(b, a, n, width).transpose(0, 2, 1, 3), weights.reshape(b, a, n, m)


def _fold(x):
    """(b, n, a, k) -> (b a, n, k)"""
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _chunked(q, k, v, by_key):
    """As `_xla`, some heads after the other, and the backward pass makes the weights again (as flash attention does):
    they stay in the cache, and memory is linear in the tokens."""
    b, n, a, width = q.shape
    bias = None
    if by_key is not None:
        bias = jnp.repeat(jnp.where(by_key, 0.0, MASKED).astype(jnp.float32), a, axis=0)[:, None]
    out = _chunked_heads(_fold(q * width**-0.5), _fold(k), _fold(v), bias)
    return out.reshape(b, a, n, width).transpose(0, 2, 1, 3)


def _heads_at_once(g: int, n: int, m: int) -> int:
    """How many of the `g` heads (a divisor of g); all of them on a mesh, where chunks would cut across devices."""
    if not on_one_device() or g * n * m * 4 <= 4 * CHUNK_BYTES:
        return g
    return max(c for c in range(1, g + 1) if g % c == 0 and (c == 1 or c * n * m * 4 <= CHUNK_BYTES))


def _over_heads(f, q, k, *rest):
    g, chunk = q.shape[0], _heads_at_once(q.shape[0], q.shape[1], k.shape[1])
    if chunk == g:
        return f(q, k, *rest)
    split = jax.tree.map(lambda x: x.reshape(g // chunk, chunk, *x.shape[1:]), (q, k, *rest))
    return jax.tree.map(lambda y: y.reshape(g, *y.shape[2:]), jax.lax.map(lambda x: f(*x), split))


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(q, k, bias):
    logits = _product("gnk,gmk->gnm", q, k)
    return logits if bias is None else logits + bias


def _heads_forward(q, k, v, bias):
    """Values, and the log of the sum of exponentials of every row."""

    def some(q, k, v, bias):
        logits = _logits(q, k, bias)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("gnm,gmk->gnk", weights.astype(v.dtype), v) / total
        return out.astype(v.dtype), top + jnp.log(total)

    return _over_heads(some, q, k, v, bias)


@jax.custom_vjp
def _chunked_heads(q, k, v, bias):
    return _heads_forward(q, k, v, bias)[0]


def _chunked_forward(q, k, v, bias):
    out, total = _heads_forward(q, k, v, bias)
    return out, (q, k, v, bias, out, total)


def _chunked_backward(saved, d_out):
    q, k, v, bias, out, total = saved

    def some(q, k, v, bias, total, delta, d_out):
        weights = jnp.exp(_logits(q, k, bias) - total)
        d_weights = _product("gnk,gmk->gnm", d_out, v)
        d_logits = (weights * (d_weights - delta)).astype(q.dtype)
        d_q = _product("gnm,gmk->gnk", d_logits, k).astype(q.dtype)
        d_k = _product("gnm,gnk->gmk", d_logits, q).astype(k.dtype)
        return d_q, d_k, _product("gnm,gnk->gmk", weights.astype(v.dtype), d_out).astype(v.dtype)

    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    return *_over_heads(some, q, k, v, bias, total, delta, d_out), None


_chunked_heads.defvjp(_chunked_forward, _chunked_backward)


def _pad_tokens(x, to: int, axis: int):
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, to - x.shape[axis])
    return jnp.pad(x, pads) if to > x.shape[axis] else x


def _cudnn(q, k, v, keep):
    """Token counts padded to a multiple of 64 (odd ones are refused with a mask); the true lengths go along."""
    if jnp.dtype(v.dtype).itemsize not in CUDNN_BYTES:
        raise UserError(f"attn_impl: 'cudnn' needs bfloat16 or float16 activations, not {v.dtype}; set dtype or 'xla'")
    b, n, m = q.shape[0], q.shape[1], k.shape[1]
    to_n, to_m = (-(-x // CUDNN_MULTIPLE) * CUDNN_MULTIPLE for x in (n, m))
    q = _pad_tokens(q, to_n, 1)
    k, v = (_pad_tokens(x, to_m, 1) for x in (k, v))
    if keep is not None:
        keep = _pad_tokens(_pad_tokens(jnp.broadcast_to(keep, (b, n, m)), to_m, 2), to_n, 1)[:, None]
    lengths = [jnp.full((b,), x, jnp.int32) for x in (n, m)] if (to_n, to_m) != (n, m) else [None, None]
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=keep,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        implementation="cudnn",
    )
    return out[:, :n]


def _tpu_block(tokens: int) -> tuple[int, int]:
    """Tokens after padding and the kernel's block: large blocks are fast, but not for much more padding."""
    least = -(-tokens // TPU_LANES) * TPU_LANES
    sizes = [(-(-tokens // block) * block, block) for block in range(TPU_LANES, 513, TPU_LANES)]
    return max((s for s in sizes if s[0] <= 1.125 * least), key=lambda s: (s[1], -s[0]))


def _flash_tpu(q, k, v, by_key, segment_ids):
    """The Pallas flash kernel; padding and masked keys are a segment that no query is in."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, n, a, width = q.shape
    m = k.shape[1]
    (to_n, block_n), (to_m, block_m) = _tpu_block(n), _tpu_block(m)
    q_ids = jnp.ones((b, n), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32) + 1
    k_ids = jnp.ones((b, m), jnp.int32) if segment_ids is None else q_ids
    if by_key is not None:
        k_ids = jnp.where(by_key, k_ids, 0)
    masked = by_key is not None or segment_ids is not None or to_m > m
    q_ids, k_ids = _pad_tokens(q_ids, to_n, 1), _pad_tokens(k_ids, to_m, 1)
    q = _pad_tokens(q.transpose(0, 2, 1, 3), to_n, 2)
    k, v = (_pad_tokens(x.transpose(0, 2, 1, 3), to_m, 2) for x in (k, v))
    blocks = flash.BlockSizes(
        block_b=1,
        **dict.fromkeys(("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq"), block_n),
        **dict.fromkeys(("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv"), block_m),
        **dict.fromkeys(("block_k_major_dq", "block_k_dq"), block_m),
    )

    def kernel(q, k, v, q_ids, k_ids):
        ids = flash.SegmentIds(q=q_ids, kv=k_ids) if masked else None
        return flash.flash_attention(q, k, v, segment_ids=ids, sm_scale=width**-0.5, block_sizes=blocks)

    return _over_mesh(kernel, b, a, ids=2)(q, k, v, q_ids, k_ids)[:, :, :n].transpose(0, 2, 1, 3)


def _over_mesh(kernel, b: int, a: int, ids: int):
    """The compiler cannot split a kernel (nor a loop over rows), so it is told: rows over the batch axes, heads over
    `tensor`. `kernel` takes q, k, v (b, a, ...) and `ids` arrays (b, ...)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    rows = tuple(x for x in BATCH_AXES if mesh.shape.get(x, 1) > 1)
    rows = rows if rows and b % math.prod(mesh.shape[x] for x in rows) == 0 else None
    heads = "tensor" if mesh.shape.get("tensor", 1) > 1 and a % mesh.shape["tensor"] == 0 else None
    spec, by_row = jax.sharding.PartitionSpec(rows, heads), jax.sharding.PartitionSpec(rows)
    return jax.shard_map(kernel, in_specs=(spec,) * 3 + (by_row,) * ids, out_specs=spec, check_vma=False)


def _segments(q, k, v, by_key, segment_ids):
    ids = segment_ids if by_key is None else jnp.where(by_key, segment_ids, packed.PADDING)
    q = q * q.shape[-1] ** -0.5
    kernel = _over_mesh(packed.attend_in_segments, q.shape[0], q.shape[2], ids=1)
    return kernel(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)), ids).transpose(0, 2, 1, 3)
