"""Contrastive losses against their definitions; masks, chunks, devices and accumulation change nothing."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmed.core import accumulate, flops, sharding, tree
from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from jaxmed.models import two_towers
from jaxmed.objectives import clip


def features(b, z=8, seed=0):
    image, text = np.random.default_rng(seed).normal(size=(2, b, z)).astype(np.float32)
    return two_towers.l2_normalize(jnp.asarray(image)), two_towers.l2_normalize(jnp.asarray(text))


def naive_clip(image, text, scale, negative=None):
    """By the definition, in float64; `negative (b, b)`: which pairs off the diagonal count."""
    logits = scale * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T
    b = len(logits)
    keep = np.eye(b, dtype=bool) | (np.ones((b, b), bool) if negative is None else negative)
    e = np.where(keep, np.exp(logits), 0.0)
    right = np.diag(logits)
    return np.mean([np.log(e.sum(1)) - right, np.log(e.sum(0)) - right])


def naive_siglip(image, text, scale, bias, negative=None):
    logits = scale * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T + bias
    b = len(logits)
    y = 2 * np.eye(b) - 1
    keep = np.eye(b, dtype=bool) | (np.ones((b, b), bool) if negative is None else negative)
    return np.where(keep, np.log1p(np.exp(-y * logits)), 0.0).sum() / b


LOSSES = {
    "clip": (clip.clip_loss, naive_clip, (jnp.float32(9.0),)),
    "siglip": (clip.siglip_loss, naive_siglip, (jnp.float32(5.0), jnp.float32(-3.0))),
}
REPORTS = jnp.array([0, 1, 2, 0, 3, 2, 4, 5, 6, 6, 7, 8], jnp.uint32)[:, None]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_definition_masked_chunked(name):
    loss, naive, scales = LOSSES[name]
    image, text = features(12)
    mask = jnp.ones(12).at[jnp.array([1, 6, 11])].set(0.0)
    rows = np.flatnonzero(mask)
    same = np.asarray(REPORTS) == np.asarray(REPORTS).T
    np.testing.assert_allclose(loss(image, text, *scales), naive(image, text, *scales), rtol=1e-5)
    np.testing.assert_allclose(
        loss(image, text, *scales, reports=REPORTS), naive(image, text, *scales, ~same), rtol=1e-5
    )
    expected = naive(image[rows], text[rows], *scales, ~same[np.ix_(rows, rows)])

    @jax.jit
    def run(image, text, scales):
        def of_chunks(chunk_rows):
            def f(*arguments):
                return loss(*arguments, mask=mask, reports=REPORTS, chunk_rows=chunk_rows)

            return jax.value_and_grad(f, argnums=tuple(range(2 + len(scales))))(image, text, *scales)

        return [of_chunks(n) for n in (0, 1, 4)]

    # Whatever stands in rows that the mask leaves out.
    junk = image.at[jnp.array([1, 6, 11])].set(0.7)
    whole, *chunked = run(junk, text, scales)
    np.testing.assert_allclose(whole[0], expected, rtol=1e-5)
    assert not np.asarray(whole[1][0])[[1, 6, 11]].any() and not np.asarray(whole[1][1])[[1, 6, 11]].any()
    for one in chunked:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(whole)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    nothing = loss(image, text, *scales, mask=jnp.zeros(12))
    assert float(nothing) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_chunked_logits_never_exist_whole(name):
    loss, _, scales = LOSSES[name]
    image, text = features(64)

    def shapes(**options):
        f = jax.value_and_grad(lambda *x: loss(*x, *scales, **options), argnums=(0, 1))
        return str(jax.make_jaxpr(f)(image, text))

    assert "64,64]" in shapes() and "64,64]" not in shapes(chunk_rows=16)
    with pytest.raises(UserError, match="chunk_rows: 24 does not divide the batch of 64"):
        shapes(chunk_rows=24)


def test_loss_of_a_mesh_is_the_loss_of_one_device():
    image, text = features(16)
    mesh = sharding.make_mesh({"data": 8})
    rows = NamedSharding(mesh, P(sharding.BATCH_AXES))

    def run(image, text):
        total = lambda i, t: clip.clip_loss(i, t, 9.0, chunk_rows=8) + clip.siglip_loss(i, t, 5.0, -3.0)  # noqa: E731
        return jax.value_and_grad(total, argnums=(0, 1))(image, text)

    alone = jax.jit(run)(image, text)
    with jax.set_mesh(mesh):
        together = jax.jit(run, out_shardings=(None, rows))(*jax.device_put((image, text), rows))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_same_text_is_the_same_tokens_in_any_order():
    ids = jnp.array([[2, 5, 7, 3], [2, 7, 5, 3], [2, 5, 7, 3], [2, 5, 7, 0], [0, 0, 0, 0], [2, 6, 6, 3]], jnp.int32)
    hashes = np.asarray(clip.same_text(ids))
    equal = (hashes[:, None] == hashes[None]).all(-1)
    tokens = np.sort(np.asarray(ids), 1)
    np.testing.assert_array_equal(equal, (tokens[:, None] == tokens[None]).all(-1))
    many = np.asarray(clip.same_text(jnp.arange(3000)[:, None] * jnp.ones((1, 4), jnp.int32)))
    assert len(np.unique(many, axis=0)) == 3000


def test_measurements():
    image, _ = features(6)
    swapped = image[jnp.array([1, 0, 2, 3, 4, 5])]
    accuracy = clip.diagonal_accuracy(image, swapped, mask=jnp.array([1.0, 1, 1, 1, 0, 0]), chunk_rows=3)
    assert {k: float(v) for k, v in accuracy.items()} == {"image_to_text": 0.5, "text_to_image": 0.5}
    alike = jnp.broadcast_to(image[:1], image.shape)
    assert float(clip.diagonal_accuracy(alike, alike)["image_to_text"]) == 0.0
    assert float(clip.spread(alike)) == pytest.approx(0.0, abs=1e-3)
    ends = jnp.concatenate([image, -image])
    assert float(clip.spread(ends)) == pytest.approx(1.0, rel=1e-5)


# ---- The objective, on towers that compile at once.


class Model(nn.Module):
    """A tower of one matrix for images and for texts, with dropout, found by this module's name."""

    out_dim: int = 8
    tokens: int = 0
    drop: float = 0.0

    @nn.compact
    def __call__(self, x, scan_depths=None, *, train=False, draws=None, inner=True):
        del scan_depths, draws, inner
        x = jnp.asarray(x, jnp.float32).reshape(x.shape[0], -1)
        x = jnp.pad(x, ((0, 0), (0, max(0, 6 - x.shape[1]))))  # texts of any length
        x = nn.Dropout(self.drop, deterministic=not train)(x)
        x = nn.Dense(self.out_dim * max(self.tokens, 1), name="dense")(x)
        return (x.reshape(-1, self.tokens, self.out_dim) if self.tokens else x), {"features": x}


VARIANTS: dict = {"wide": {"out_dim": 16}}
ROWS = 8
SPEC = {
    (2, 3): {
        "image": jax.ShapeDtypeStruct((ROWS, 2, 3, 4, 4), jnp.uint8),
        "text": jax.ShapeDtypeStruct((ROWS, 6), jnp.int32),
        "sentence": jax.ShapeDtypeStruct((ROWS, 4), jnp.int32),
        "_mask": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
    }
}
BIAS = {"clip": None, "sentence": None, "siglip": -10.0, "dual": math.log(1 / 0.07)}


def make(loss, spec=None, image=None, text=None, **options):
    tower = {"name": __name__}
    image = {**tower, "tokens": {"clip": 0, "siglip": 0, "sentence": 1, "dual": 2}[loss], **(image or {})}
    model = {"name": "two_towers", "image": image, "text": {**tower, **(text or {})}, "logit_bias_init": BIAS[loss]}
    config = Config({"objective": {"name": "clip", "loss": loss, **options}, "model": model})
    return clip.make(config, SPEC if spec is None else spec)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    values = {k: rng.integers(0, 9, x.shape).astype(x.dtype) for k, x in SPEC[(2, 3)].items()}
    values["text"][3] = values["text"][0]
    values["_mask"] = np.array([1, 1, 1, 1, 1, 0, 1, 1], np.float32)
    return jax.tree.map(jnp.asarray, values)


class Runs:
    """One compilation for each objective, shared by the tests."""

    cache: ClassVar[dict] = {}

    @classmethod
    def grad(cls, loss, microbatches=1, **options):
        key = (loss, microbatches, repr(sorted(options.items())))
        if key not in cls.cache:
            goal = make(loss, **options)
            run = lambda p, b, r: accumulate.value_and_grad(goal, p, {}, b, r, 0, microbatches=microbatches)  # noqa: E731
            cls.cache[key] = jax.jit(run)
        return cls.cache[key]


@pytest.mark.parametrize("loss", clip.LOSSES)
def test_accumulated_is_the_full_batch(loss, batch):
    params, aux = make(loss).init(jax.random.key(0))
    assert aux == {} and ("logit_bias" in params) == (BIAS[loss] is not None)
    rng = jax.random.key(1)
    (value, (_, measured)), grads = Runs.grad(loss)(params, batch, rng)
    (parts, (_, again)), accumulated = Runs.grad(loss, 4)(params, batch, rng)
    np.testing.assert_allclose(parts, value, rtol=1e-5)
    for name, g in tree.flatten(grads).items():
        np.testing.assert_allclose(tree.flatten(accumulated)[name], g, rtol=1e-4, atol=1e-6, err_msg=name)
        assert np.abs(g).max() > 0, name
    assert measured.keys() == again.keys() and all(np.ndim(x) == 0 for x in measured.values())
    if loss == "dual":
        np.testing.assert_allclose(value, 0.5 * measured["loss_sentence"] + 0.5 * measured["loss_report"], rtol=1e-6)


def test_reference_scale_gradients_by_name_only(batch):
    params, _ = make("siglip").init(jax.random.key(0))
    right = Runs.grad("siglip", 4)(params, batch, jax.random.key(1))
    wrong = Runs.grad("siglip", 4, legacy_scale_grad=4)(params, batch, jax.random.key(1))
    np.testing.assert_array_equal(right[0][0], wrong[0][0])
    for name, g in tree.flatten(right[1]).items():
        times = 4.0 if name.startswith("logit") else 1.0
        np.testing.assert_allclose(tree.flatten(wrong[1])[name], times * g, rtol=1e-5, err_msg=name)


def test_accumulation_draws_the_same_numbers_in_both_passes(batch):
    drop = {"drop": 0.5}
    goal = make("clip", image=drop, text=drop)
    params, _ = goal.init(jax.random.key(0))
    rng = jax.random.key(2)

    @jax.jit
    def both(params):
        accumulated = accumulate.value_and_grad(goal, params, {}, batch, rng, 0, microbatches=2)

        def direct(params):
            parts, keys = accumulate.split_rows(batch, 2), jax.random.split(rng, 2)
            encode = lambda i: goal.features_fn(params, {}, jax.tree.map(lambda x: x[i], parts), keys[i], 0)  # noqa: E731
            joined = accumulate.join_rows(jax.tree.map(lambda *x: jnp.stack(x), encode(0), encode(1)))
            return goal.loss_from_features(params, {}, joined, batch, 0)[0]

        return accumulated, jax.value_and_grad(direct)(params)

    ((value, _), grads), (expected, exact) = both(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_padding_rows_and_equal_reports(batch):
    goal = make("clip")
    params, _ = goal.init(jax.random.key(0))
    rng = jax.random.key(1)
    (value, _), grads = Runs.grad("clip")(params, batch, rng)
    other = {**batch, "image": batch["image"].at[5].set(200), "text": batch["text"].at[5].set(1)}
    (same, _), same_grads = Runs.grad("clip")(params, other, rng)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same_grads)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # Rows 0 and 3 have the same report: it may not be both right and wrong for each of them.
    (ignored, _), _ = Runs.grad("clip", false_negatives="ignore")(params, batch, rng)
    rows = np.flatnonzero(batch["_mask"])
    z = goal.features_fn(params, {}, batch, rng, 0)
    negative = ~np.isin(np.arange(8), [0, 3])[:, None] | ~np.isin(np.arange(8), [0, 3])[None]
    expected = naive_clip(z["image"][rows, 0], z["text"][rows], 1 / 0.07, negative[np.ix_(rows, rows)])
    np.testing.assert_allclose(ignored, expected, rtol=1e-5)
    assert float(ignored) < float(value)


def test_after_update_clamps_log_scales_only():
    def after(loss, scale, bias, **options):
        params = {"logit_scale": jnp.float32(scale), "logit_bias": jnp.float32(bias), "x": jnp.float32(-7.0)}
        params, _ = make(loss, **options).after_update(params, {}, 0)
        return [round(float(params[k]), 4) for k in ("logit_scale", "logit_bias", "x")]

    top = round(math.log(100), 4)
    assert after("siglip", 9.0, -10.0) == [top, -10.0, -7.0]
    assert after("siglip", -1.0, -10.0, clamp_bias=True) == [0.0, 0.0, -7.0]
    assert after("dual", 2.0, 9.0) == [2.0, top, -7.0]
    assert after("dual", 2.0, -9.0) == [2.0, 0.0, -7.0]


def test_predictions(batch):
    goal = make("dual")
    params, _ = goal.init(jax.random.key(0))
    image = goal.predict_fns["embed_image"](params, {}, {"image": batch["image"]})
    assert {k: x.shape for k, x in image.items()} == {"image": (ROWS, 2, 8), "scale": (), "scale_report": ()}
    np.testing.assert_allclose(np.linalg.norm(image["image"], axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose([image["scale"], image["scale_report"]], 1 / 0.07, rtol=1e-5)
    text = goal.predict_fns["embed_text"](params, {}, {"text": batch["text"]})
    assert text["text"].shape == (ROWS, 8)
    assert (
        make("clip").predict_fns["embed_image"](make("clip").init(jax.random.key(0))[0], {}, batch)["image"].ndim == 2
    )


def test_normalisation_of_zero_has_a_gradient():
    grad = jax.grad(lambda x: two_towers.l2_normalize(x)[:, 0].sum())(jnp.zeros((2, 3)))
    assert np.isfinite(grad).all()


def test_flops_are_counted():
    a, b = jnp.ones((4, 5)), jnp.ones((5, 6))

    def loop(a, b):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(a, b) + c, None), jnp.zeros((4, 6)), length=7)[0]

    assert flops.count(jnp.matmul, a, b) == 2 * 4 * 5 * 6
    assert flops.count(loop, a, b) == flops.count(jax.checkpoint(loop), a, b) == 7 * 2 * 4 * 5 * 6
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")  # noqa: E731
    assert flops.count(conv, jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))) == 2 * 2 * 5 * 36 * 27
    choose = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x.T, lambda: x[:, :1] @ x[:, :1].T)  # noqa: E731
    assert flops.count(choose, a) == 2 * 4 * 4 * 5
    # Two matrices: 96 voxels or 6 tokens to 8 features.
    assert make("clip").flops_fn(SPEC[(2, 3)]) == 2 * ROWS * 8 * (96 + 6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss="clap"), "objective.loss: 'clap' is not one of clip, siglip"),
        (dict(losses="clip"), "losses is not an option here; did you mean 'loss'"),
        (dict(false_negatives="drop"), "false_negatives: 'drop' is not keep or ignore"),
        (dict(loss="siglip", model=dict(logit_bias_init=None)), "logit_bias_init is missing; loss 'siglip'"),
        (dict(loss="dual", model=dict(logit_bias_init=2.6)), "needs an image tower with 2 output tokens"),
        (dict(spec=("image", "_mask", "sentence")), "'clip' needs 'text' in the batches"),
        (dict(model=dict(scale=1.0)), "config.model.scale is not an option here"),
        (dict(image=dict(out_dims=8)), "config.model.image.out_dims is not an option; did you mean 'out_dim'"),
        (dict(image=dict(variant="wid")), "config.model.image.variant: 'wid' is not one of wide; did you mean 'wide'"),
        (dict(image=dict(variant="wide")), "the image tower gives 16 features, the text tower 8"),
        (dict(image=dict(name="hlip", width=100)), "config.model.image: hlip: width=100"),
        (dict(text=dict(name="bert", out_dim=8)), "config.model.text.(out_dim|vocab_size)"),
    ],
)
def test_bad_configs(change, message):
    change = dict(change)
    keys = change.pop("spec", tuple(SPEC[(2, 3)]))
    spec = {"b": {k: x for k, x in SPEC[(2, 3)].items() if k in keys}}
    tower = {"name": __name__}
    model = {
        "name": "two_towers",
        "image": {**tower, **change.pop("image", {})},
        "text": {**tower, **change.pop("text", {})},
        **change.pop("model", {}),
    }
    with pytest.raises(UserError, match=message):
        goal = clip.make(Config({"objective": {"name": "clip", **change}, "model": model}), spec)
        params = jax.eval_shape(goal.init, jax.random.key(0))[0]
        jax.eval_shape(goal.features_fn, params, {}, spec["b"], jax.random.key(0), 0)


def test_frozen_tables_and_locked_text_reach_the_optimiser():
    model = {"image": {"name": "hlip", "variant": "tiny"}, "text": {"name": "bert", "variant": "tiny", "out_dim": 96}}
    model["name"] = "two_towers"
    spec = {"b": {"image": jax.ShapeDtypeStruct((2, 2, 16, 64, 64), jnp.float32)}}
    spec["b"] |= {"text": jax.ShapeDtypeStruct((2, 8), jnp.int32), "_mask": jax.ShapeDtypeStruct((2,), jnp.float32)}
    objective = clip.build(model=model, spec=spec, lock_text="all_but_norms", unlocked_text_layers=1)
    names = tree.flatten(jax.eval_shape(objective.init, jax.random.key(0))[0])
    trained = {n for n in names if tree.first_match(objective.groups, n, 1.0)}
    assert "image/spatial_posemb" not in trained
    assert {"image/cls_token", "logit_scale", "text/blocks_0/mlp_norm/scale", "text/blocks_1/fc1/kernel"} <= trained
    assert "text/blocks_0/fc1/kernel" not in trained
    assert "text/word_embeddings" not in trained
