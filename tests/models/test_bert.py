"""The text tower: padding, poolers, dropout, adapters, locks, and the equal forms of the same computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.core import optim, tree
from jaxmed.core.errors import UserError
from jaxmed.models import bert
from jaxmed.models.layers.attention import attend

SIZES = dict(vocab_size=40, width=16, depth=2, heads=2, mlp_width=24, max_positions=12, out_dim=8)
# Full, padded, padded more, and without any token (a padding example of the batch).
IDS = jnp.array([[2, 5, 7, 9, 11, 3], [2, 5, 7, 3, 0, 0], [2, 3, 0, 0, 0, 0], [0] * 6], jnp.int32)


@functools.cache
def params(**changes):
    """Random everywhere, so that no term can hide."""
    weights = bert.Model(**{**SIZES, **changes}).init(jax.random.key(0), IDS)["params"]
    leaves, shape = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(shape, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@functools.cache
def tower(**changes):
    """(weights, ids, key of dropout or None) -> features, compiled."""
    model = bert.Model(**{**SIZES, **changes})

    def run(weights, ids, rng):
        train = rng is not None
        return model.apply({"params": weights}, ids, train=train, rngs={"dropout": rng} if train else None)[0]

    return jax.jit(run)


def features(weights, ids, rng=None, **changes):
    return tower(**changes)(weights, ids, rng)


def test_padding_changes_nothing_and_stays_finite():
    padded = features(params(), IDS)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[1:2], features(params(), IDS[1:2, :4]), atol=1e-5)
    # Nothing depends on what stands behind the padding, and a row without tokens has finite gradients.
    grad = jax.grad(lambda w: (features(w, IDS) * jnp.array([[0.0], [1.0], [1.0], [0.0]])).sum())(params())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
    assert not np.asarray(grad["word_embeddings"][0]).any() and not np.asarray(grad["position_embeddings"][4:]).any()


@pytest.mark.parametrize("pooler", ["cls_last_hidden_state", "mean", "max"])
def test_poolers_see_only_tokens(pooler):
    model, weights = bert.Model(**{**SIZES, "pooler": pooler}), {"params": params()}
    x = jax.random.normal(jax.random.key(0), (*IDS.shape, SIZES["width"]))

    def pool(x, ids):
        return model.apply(weights, x, ids != 0, method="_pool")

    pooled = pool(x, IDS)
    assert pooled.shape == (4, SIZES["width"])
    for row, length in ((0, 6), (1, 4), (2, 2)):
        np.testing.assert_allclose(pooled[row], pool(x[row, :length][None], IDS[row, :length][None])[0], atol=1e-6)
    grad = jax.grad(lambda x: pool(x, IDS).sum())(x)
    assert np.isfinite(pooled).all() and np.isfinite(grad).all() and not np.asarray(grad[1, 4:]).any()


def test_scanned_recomputed_and_looped_blocks_are_equal():
    dropout = dict(hidden_dropout=0.2, attention_dropout=0.2)

    def run(**changes):
        def loss(w):
            return features(w, IDS[:2], jax.random.key(5), **dropout, **changes).sum()

        return jax.value_and_grad(loss)(params())

    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(run(remat="dots", scan_blocks=True))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features(params(), IDS, remat="full"), features(params(), IDS), atol=1e-5)


def test_dropout():
    rates = dict(hidden_dropout=0.5, attention_dropout=0.5)
    still = features(params(), IDS)
    once, again = (features(params(), IDS, jax.random.key(0), **rates) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - still).max() > 0.1
    np.testing.assert_array_equal(features(params(), IDS, **rates), still)
    # The form with dropout is the same attention: exact without it, right in the mean with it.
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 6, 2, 4))
    keep = IDS[:2] != 0
    plain = attend(q, k, v, mask=keep)
    np.testing.assert_allclose(bert._attend_with_dropout(q, k, v, keep, 0.0, jax.random.key(0)), plain, atol=1e-6)

    @jax.jit
    def mean(keys):
        return jax.vmap(lambda key: bert._attend_with_dropout(q, k, v, keep, 0.3, key))(keys).mean(0)

    np.testing.assert_allclose(mean(jax.random.split(jax.random.key(2), 4000)), plain, atol=0.06)


def test_activations_in_bfloat16():
    z = features(params(), IDS, dtype="bfloat16")
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, features(params(), IDS), atol=0.15)


def test_published_sizes():
    shapes = jax.eval_shape(bert.Model(**bert.VARIANTS["bert_base"], out_dim=512).init, jax.random.key(0), IDS)
    encoder = {k: x for k, x in tree.flatten(shapes["params"]).items() if not k.startswith("proj")}
    assert round(tree.num_params(encoder) / 1e6, 2) == 108.89
    assert shapes["params"]["proj"]["kernel"].shape == (768, 512)


def test_adapters_start_as_nothing_and_train_alone():
    lora = dict(lora_rank=2, lora_alpha=3.0, lora_targets=("query", "value", "fc1"))
    weights = bert.Model(**SIZES, **lora).init(jax.random.key(0), IDS)["params"]
    flat = tree.flatten(weights)
    adapters = {k for k in flat if "lora" in k}
    assert adapters == {f"blocks_{i}/{n}/lora_{x}" for i in range(2) for n in ("query", "value", "fc1") for x in "ab"}
    base = tree.unflatten({k: x for k, x in flat.items() if k not in adapters})
    np.testing.assert_array_equal(features(weights, IDS, **lora), features(base, IDS))
    grad = jax.grad(lambda w: features(w, IDS, **lora).sum())(weights)
    tx = optim.make(
        {"text": weights},
        schedule=lambda step: 0.1,
        weight_decay=0.1,
        groups=bert.lock_groups(2, lock="adapters"),
    )
    updates, _ = tx.update({"text": grad}, tx.init({"text": weights}), {"text": weights})
    moved = {k for k, x in tree.flatten(updates["text"]).items() if np.asarray(x).any()}
    b_sides = {k for k in adapters if k.endswith("b")}  # A has no gradient while B is 0, and decays
    assert b_sides <= moved <= adapters | {k for k in flat if "_norm/" in k} | {"proj/kernel"}
    # Adapters are W + (alpha / rank) A B.
    tuned = optax.apply_updates({"text": weights}, updates)["text"]
    merged = dict(tree.flatten(tuned))
    for k in b_sides:
        stem = k.removesuffix("/lora_b")
        merged[f"{stem}/kernel"] = merged[f"{stem}/kernel"] + 1.5 * merged.pop(f"{stem}/lora_a") @ merged.pop(k)
    np.testing.assert_allclose(
        features(tuned, IDS, **lora), features(tree.unflatten(merged), IDS), rtol=1e-4, atol=1e-5
    )


def test_lock_groups():
    names = ["image/norm/scale", *(f"text/{k}" for k in tree.flatten(params(lora_rank=2, pooler="cls")))]

    def free(**kwargs):
        groups = bert.lock_groups(2, **kwargs)
        tree.check_rules([p for p, _ in groups], names, "optim.groups")
        return {n for n in names if tree.first_match(groups, n, 1.0)}

    norms = {n for n in names if "_norm/" in n}
    image, proj = {"image/norm/scale"}, {"text/proj/kernel"}
    last = {n for n in names if n.startswith(("text/blocks_1/", "text/pooler/"))}
    assert free() == set(names) == free(lock="all", unlocked_layers=2) | {n for n in names if "embeddings" in n}
    assert free(projection=False) == set(names) - proj
    assert free(lock="all_but_norms") == image | proj | norms == free(lock="lora_as_published")
    assert free(lock="all") == image | proj
    assert free(lock="all", projection=False) == image
    assert free(lock="adapters") == image | proj | norms | {n for n in names if "lora_" in n}
    assert free(lock="all_but_norms", unlocked_layers=1, projection=False) == image | norms | last
    with pytest.raises(UserError, match="lock: 'some' is not one of none, all_but_norms"):
        free(lock="some")
    with pytest.raises(UserError, match="unlocked_layers: 3 is not within the 2 blocks"):
        free(unlocked_layers=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pooler="first"), "pooler='first' is not one of cls_last_hidden_state"),
        (dict(projection="none"), "out_dim=8, but projection='none' gives the width, 16"),
        (dict(heads=3), "width=16 is not divisible by heads=3"),
        (dict(lora_targets=["dense"]), "lora_targets="),
        (dict(scan_blocks=True), "set remat to full or dots"),
        (dict(remat="all"), "remat='all' is not one of"),
        (dict(attn_impl="fast"), "attn_impl='fast'"),
        (dict(max_positions=4), "texts of 6 tokens are longer than model.text.max_positions=4"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(bert.Model(**{**SIZES, **changes}).init, jax.random.key(0), IDS)
