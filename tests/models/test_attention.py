"""Every attention implementation that can run here, against the formula."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from jaxmed.core.errors import UserError
from jaxmed.core.sharding import make_mesh
from jaxmed.models.layers import attention


def naive(q, k, v, keep):
    """The definition; a query that may see nothing gives zeros."""
    logits = np.einsum("bnak,bmak->banm", q, k).astype(np.float64) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * keep[:, None]
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("banm,bmak->bnak", weights, v)


def arguments(case, rng):
    """(q, k, v), keyword arguments of `attend`, and the same as a mask of queries and keys."""
    b, n, m = 3, 37, 37
    if case == "cross":
        n, m = 1, 150
    if case == "blocks":
        n = m = 130
    q, k, v = (rng.standard_normal((b, t, 2, 16), dtype=np.float32) for t in (n, m, m))
    mask = rng.random((b, m)) < 0.6
    mask[1] = False  # a row that sees nothing
    lengths = np.array([1, m, 5], np.int32)
    segments = np.sort(rng.integers(0, 3, (b, n)), axis=1).astype(np.int32)
    inside = np.broadcast_to(np.arange(m) < lengths[:, None, None], (b, n, m))
    full = np.ones((b, n, m), bool)
    return {
        "all": ((q, k, v), {}, full),
        "mask": ((q, k, v), {"mask": mask}, full & mask[:, None]),
        "cross": ((q, k, v), {"mask": mask}, full & mask[:, None]),
        "blocks": ((q, k, v), {"mask": mask}, full & mask[:, None]),
        "lengths": ((q, k, v), {"lengths": lengths}, inside),
        "segments": ((q, k, v), {"segment_ids": segments}, segments[:, :, None] == segments[:, None])
        if n == m
        else None,
        "both": ((q, k, v), {"mask": mask, "lengths": lengths}, inside & mask[:, None]),
        "pairs": ((q, k, v), {"mask": full & mask[:, None] & (np.arange(n)[:, None] > 2)}, None),
    }[case]


@pytest.fixture
def run(monkeypatch):
    """`attend` with kernels interpreted, and cuDNN's call (all but the kernel itself) computed by XLA."""
    plain = jax.nn.dot_product_attention

    def instead(*args, implementation, **kw):
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **kw)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(attention, "CUDNN_BYTES", (2, 4))
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2 * 37 * 37 * 4)  # three chunks of two heads
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    return attention.attend


@pytest.mark.parametrize("impl", ["xla", "chunked", "cudnn", "flash_tpu"])
@pytest.mark.parametrize("case", ["all", "mask", "cross", "lengths", "segments", "both", "pairs", "blocks"])
def test_implementations_agree(case, impl, run):
    (q, k, v), kw, keep = arguments(case, np.random.default_rng(0))
    if case == "pairs":
        keep = kw["mask"]
        if impl == "flash_tpu":
            with pytest.raises(UserError, match="masks by key"):
                run(q, k, v, **kw, impl=impl)
            return
    out = jax.jit(functools.partial(run, impl=impl))(q, k, v, **kw)
    np.testing.assert_allclose(out, naive(q, k, v, keep), atol=3e-6)


@pytest.mark.parametrize("impl", ["chunked", "cudnn", "flash_tpu"])
def test_gradients_agree(impl, run):
    (q, k, v), kw, _ = arguments("mask", np.random.default_rng(1))
    weight = np.random.default_rng(2).standard_normal(q.shape, dtype=np.float32)

    def grad(impl):
        return jax.jit(jax.grad(lambda x: (run(*x, **kw, impl=impl) * weight).sum()))((q, k, v))

    expected = grad("xla")
    assert all(np.isfinite(x).all() for x in expected)
    for got, ref in zip(grad(impl), expected):
        np.testing.assert_allclose(got, ref, atol=1e-5)
    # Masked keys and values get nothing.
    assert not np.asarray(expected[2])[~kw["mask"]].any() and not np.asarray(expected[1])[~kw["mask"]].any()


def test_kernel_on_a_mesh(run):
    """The kernel is told how rows and heads are split: it never sees more than its own."""
    (q, k, v), kw, _ = arguments("mask", np.random.default_rng(3))
    q, k, v, mask = (np.concatenate([x, x, x[:2]])[:8] for x in (q, k, v, kw["mask"]))
    alone = jax.jit(functools.partial(run, impl="flash_tpu"))(q, k, v, mask=mask)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        out = jax.jit(functools.partial(run, impl="flash_tpu"))(q, k, v, mask=mask)
    assert len({str(s.index) for s in out.addressable_shards}) == 8
    np.testing.assert_allclose(out, alone, atol=1e-6)


@pytest.mark.parametrize("tokens", [1177, 11761])
def test_kernel_lowers_for_tpu(tokens):
    """Forward and backward, at the sizes of a published scan and of a study of ten (compiled nowhere here)."""

    def loss(q, k, v, mask):
        return attention.attend(q, k, v, mask=mask, impl="flash_tpu").astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((2, tokens, 12, 64), jnp.bfloat16)
    exported = jax.export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
        platforms=["tpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
    )(x, x, x, jax.ShapeDtypeStruct((2, tokens), jnp.bool_))
    assert exported.mlir_module().count("tpu_custom_call") == 3


def rows_of_images(rng, sizes, n):
    """Segments one after the other, then nothing: ids and what is there."""
    ids = np.concatenate([np.full(m, i) for i, m in enumerate(sizes)] + [np.full(n - sum(sizes), len(sizes))])
    return ids.astype(np.int32), ids < len(sizes)


@pytest.mark.parametrize("block", [4, 16, 64])
def test_packed_rows(block, monkeypatch):
    """Images in a row, whole rows of padding: as the formula says, gradients too, on one device and on a mesh."""
    rng, n = np.random.default_rng(4), 37
    rows = [((5, 12, 1, 9), n), ((37,), n), ((), n), ((1,) * 20, n)]
    ids, there = (np.stack(x) for x in zip(*(rows_of_images(rng, *row) for row in rows)))
    q, k, v, weight = (rng.standard_normal((4, n, 2, 16), dtype=np.float32) for _ in range(4))
    keep = (ids[:, :, None] == ids[:, None]) & there[:, :, None] & there[:, None]
    monkeypatch.setattr(attention.packed.attend_in_segments, "__defaults__", (block,))

    @functools.partial(jax.jit, static_argnames="impl")
    def run(q, k, v, impl):
        def loss(x):
            out = attention.attend(*x, mask=there, segment_ids=ids, impl=impl)
            return (jnp.where(there[..., None, None], out, 0.0) * weight).sum(), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)((q, k, v))
        return out, grads

    out, grads = run(q, k, v, "segments")
    np.testing.assert_allclose(out, naive(q, k, v, keep), atol=3e-6)
    expected = run(q, k, v, "xla")[1]
    for got, ref in zip(grads, expected):
        np.testing.assert_allclose(got, ref, atol=1e-5)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        split = run(q, k, v, "auto")
    for got, ref in zip(jax.tree.leaves(split), jax.tree.leaves((out, grads))):
        np.testing.assert_allclose(got, ref, atol=1e-6)


def test_packed_rows_in_the_kernel(run):
    ids, there = rows_of_images(None, (5, 12, 1, 9), 37)
    q, k, v = (np.random.default_rng(i).standard_normal((1, 37, 2, 16), dtype=np.float32) for i in range(3))
    keep = ((ids[:, None] == ids) & there[:, None] & there)[None]
    out = jax.jit(functools.partial(run, impl="flash_tpu"))(q, k, v, mask=there[None], segment_ids=ids[None])
    np.testing.assert_allclose(out, naive(q, k, v, keep), atol=3e-6)


def test_packed_rows_skip_blocks():
    sizes, n = (100, 60, 300, 20), 640
    ids, there = rows_of_images(None, sizes, n)
    low, high = attention.packed.needed_blocks(jnp.where(there, ids, attention.packed.PADDING)[None], 64)
    ends = np.cumsum(sizes)
    for i, (a, b) in enumerate(zip(low[0], high[0])):
        inside = [j for j, end in enumerate(ends) if end > 64 * i and end - sizes[j] < min(64 * (i + 1), ends[-1])]
        expected = (
            (int(ends[inside[0]] - sizes[inside[0]]) // 64, -(-int(ends[inside[-1]]) // 64)) if inside else (0, 0)
        )
        assert (int(a), int(b)) == expected
    # No array of the program is as large as a row squared.
    x = jax.ShapeDtypeStruct((2, n, 3, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, n), jnp.int32)
    there = jax.ShapeDtypeStruct((2, n), jnp.bool_)

    def loss(q, k, v, ids, there):
        return attention.attend(q, k, v, mask=there, segment_ids=ids, impl="segments").sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids, there).as_text()
    assert f"x{n}x{n}x" not in text


def test_weights_and_their_gradient():
    q, k, v = (np.random.default_rng(i).standard_normal((2, 5, 2, 4), dtype=np.float32) for i in range(3))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    out, weights = attention.attend_with_weights(q, k, v, mask=mask, add=jnp.zeros((2, 2, 5, 5)))
    np.testing.assert_allclose(out, attention.attend(q, k, v, mask=mask), atol=1e-6)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1.0, atol=1e-6)
    assert not np.asarray(weights)[0, :, :, 3:].any()
    grad = jax.grad(lambda a: attention.attend_with_weights(q, k, v, add=a)[0].sum())(jnp.zeros((2, 2, 5, 5)))
    np.testing.assert_allclose(grad[0, 1], np.broadcast_to(v[0, :, 1].sum(-1), (5, 5)), atol=1e-5)


def test_tpu_blocks():
    for tokens in (1, 127, 128, 197, 513, 1177, 1569, 3529, 11770):
        padded, block = attention._tpu_block(tokens)
        assert padded % block == 0 and block % 128 == 0 and tokens <= padded
        assert padded <= 1.125 * -(-tokens // 128) * 128


def test_unknown_or_impossible_implementation():
    q = jnp.zeros((1, 2, 1, 8))
    with pytest.raises(UserError, match="attn_impl: 'flash' is not one of"):
        attention.attend(q, q, q, impl="flash")
    with pytest.raises(UserError, match="bfloat16"):
        attention.attend(q, q, q, impl="cudnn")
    with pytest.raises(UserError, match="packed rows"):
        attention.attend(q, q, q, impl="segments")
    with pytest.raises(UserError, match="masks by key"):
        attention.attend(q, q, q, mask=jnp.ones((1, 2, 2), bool), segment_ids=jnp.zeros((1, 2), int), impl="segments")
    assert attention.pick("auto", 5000, jnp.float32) == "chunked"
    assert attention.pick("auto", 5000, jnp.float32, segments=True) == "segments"
