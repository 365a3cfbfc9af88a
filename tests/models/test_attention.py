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
    assert attention.pick("auto", 5000, jnp.float32) == "chunked"
