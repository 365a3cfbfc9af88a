"""The masked autoencoder and the classifier: one image is one image, alone, padded or packed with others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from jaxmed.core.load import load_model
from jaxmed.core.sharding import make_mesh
from jaxmed.models import mae, vit
from jaxmed.models.layers import grid_posemb, token_rows
from jaxmed.objectives import mae as objective

PATCH = 4
SMALL = {"width": 32, "heads": 4, "depth": 2, "mlp_width": 48, "patch": PATCH, "table": (6, 5)}
DECODER = {"decoder_width": 24, "decoder_heads": 3, "decoder_depth": 1, "decoder_mlp_width": 40}
GRIDS = [(3, 5), (6, 5), (1, 2), (4, 1), (7, 3), (1, 1)]


def model(**more):
    return {"name": "mae", **SMALL, **DECODER, **more}


def images(rng, channels: int = 1):
    """One (patch, noise) for every grid of `GRIDS`."""
    p = PATCH * PATCH * channels
    return [
        (rng.integers(0, 65536, (h * w, p)).astype(np.uint16), rng.random(h * w, dtype=np.float32)) for h, w in GRIDS
    ]


def padded(parts, which, n: int, rows: int = 0):
    """Rows of n patches, one image each (and blank ones)."""
    rows = max(rows, len(which))
    patch = np.zeros((rows, n, parts[0][0].shape[1]), np.uint16)
    noise, grid = np.full((rows, n), 0.5, np.float32), np.zeros((rows, 2), np.int32)
    for row, i in enumerate(which):
        x, own = parts[i]
        patch[row, : len(x)], noise[row, : len(x)], grid[row] = x, own, GRIDS[i]
    return {"patch": patch, "noise": noise, "grid": grid, "_mask": (grid.prod(1) > 0).astype(np.float32)}


def packed(parts, which, n: int):
    """Rows of n patches with several images each; a last row of none."""
    k = max(map(len, which)) + 1
    rows = len(which) + 1
    patch = np.zeros((rows, n, parts[0][0].shape[1]), np.uint16)
    noise, grid = np.full((rows, n), 0.5, np.float32), np.zeros((rows, k, 2), np.int32)
    for row, some in enumerate(which):
        at = 0
        for slot, i in enumerate(some):
            x, own = parts[i]
            patch[row, at : at + len(x)], noise[row, at : at + len(x)], grid[row, slot] = x, own, GRIDS[i]
            at += len(x)
    return {"patch": patch, "noise": noise, "grid": grid, "_mask": (grid.prod(2).sum(1) > 0).astype(np.float32)}


ROWS = ((0, 1, 5), (4,), (2, 3))


def goal_of(batch, fields, **options):
    spec = {"only": {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}}
    return objective.make(Config({"objective": {"name": "mae", **options}, "model": fields}), spec)


def weights(fields, batch):
    """Parameters with nothing at its neutral value."""
    params, _ = jax.jit(goal_of(batch, fields).init)(jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def apply_and_keep(seen):
    """A model's `apply` that leaves what it returns in `seen`: one program gives outputs, loss and gradients."""
    plain = mae.Model.apply

    def apply(self, *args, **kw):
        seen["result"] = plain(self, *args, **kw)
        return seen["result"]

    return apply


def run(params, fields, batch, **options):
    """Prediction, other outputs, loss and gradients."""
    goal = goal_of(batch, fields, **options)

    seen = {}

    @jax.jit
    def both(params, batch):
        def loss(params):
            value, _ = goal.loss_fn(params, {}, batch, jax.random.key(0), 0)
            return value, seen["result"]

        (value, (prediction, out)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return prediction, out, value, grads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mae.Model, "apply", apply_and_keep(seen))
        return both(params, batch)


def close(a, b, scale: float = 1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=scale * max(1.0, float(np.abs(y).max())))


@pytest.mark.parametrize(
    "options, more",
    [
        ({"loss": "token_mean", "norm_pix": True}, {}),
        ({"loss": "image_mean"}, {"decoder_pos": "flat1d", "mask_ratio": 0.5}),
        ({"loss": "full"}, {"pos": "bilinear", "channels": 3}),
    ],
)
def test_alone_padded_bucketed_and_packed_agree(options, more):
    parts, fields = images(np.random.default_rng(0)), model(**more)
    every = range(len(GRIDS))
    wide = padded(parts, every, 37, rows=8)
    params = weights(fields, wide)
    prediction, out, loss, grads = run(params, fields, wide, **options)
    assert np.isfinite(loss)

    batch = packed(parts, ROWS, 48)
    in_rows, rows_out, rows_loss, rows_grads = run(params, fields, batch, **options)
    close((rows_loss, rows_grads), (loss, grads))
    for row, some in enumerate(ROWS):
        at = 0
        for slot, i in enumerate(some):
            n = len(parts[i][0])
            close(in_rows[row, at : at + n], prediction[i, :n])
            np.testing.assert_array_equal(rows_out["mask"][row, at : at + n], out["mask"][i, :n])
            np.testing.assert_array_equal(rows_out["image"][row, at : at + n], slot)
            at += n
        assert not rows_out["valid"][row, at:].any() and not rows_out["mask"][row, at:].any()
    kept = token_rows.keep_counts(more.get("mask_ratio", 0.75), 30)
    for i in (2, 4):
        alone = padded(parts, [i], len(parts[i][0]))
        one, one_out, *_ = run(params, fields, alone, **options)
        close(one[0], prediction[i, : one.shape[1]])
        assert one_out["mask"].sum() == one.shape[1] - kept[one.shape[1]]
        close(one_out["latent"][0], out["latent"][i, : one_out["latent"].shape[1]])


def test_features_agree_and_keep_their_order():
    parts, fields = images(np.random.default_rng(3)), model()
    wide, rows = padded(parts, range(len(GRIDS)), 33, rows=7), packed(parts, ROWS, 48)
    params = weights(fields, wide)
    net = load_model("config.model", fields)
    features = jax.jit(lambda p, b: net.apply({"params": p}, b["patch"], b["grid"], method="features"))
    cls, mean, tokens = features(params, wide)
    assert cls.shape == mean.shape == (7, 32) and not np.asarray(cls[6]).any() and not np.asarray(mean[6]).any()
    row_cls, row_mean, row_tokens = features(params, rows)
    assert row_cls.shape == (4, 4, 32)
    for row, some in enumerate(ROWS):
        at = 0
        for slot, i in enumerate(some):
            n = len(parts[i][0])
            close((row_cls[row, slot], row_mean[row, slot]), (cls[i], mean[i]))
            close(row_tokens[row, at : at + n], tokens[i, :n])
            close(mean[i], np.asarray(tokens[i, :n]).mean(0))
            at += n
        assert not np.asarray(row_tokens[row, at:]).any()
    # A classifier of the same encoder sees the same class token, and trains the position table.
    classifier = vit.Model(**SMALL, classes=3)
    shared = {k: v for k, v in params.items() if "decoder" not in k and k != "mask_token"}
    shared["head"] = {"kernel": jnp.ones((32, 3)), "bias": jnp.zeros(3)}

    @jax.jit
    def logits(p, b):
        value, out = classifier.apply({"params": p}, b["patch"], b["grid"])
        return value.sum(), out["classes"]

    (_, classes), grads = jax.value_and_grad(logits, has_aux=True)(shared, wide)
    close(classes, cls)
    assert np.abs(grads["pos_embed"]).max() > 0


def test_frozen_tables_and_their_start():
    batch = padded(images(np.random.default_rng(0)), [0], 16)
    goal = goal_of(batch, model())
    params, _ = jax.jit(goal.init)(jax.random.key(0))
    np.testing.assert_array_equal(params["pos_embed"][0], grid_posemb.initial_table(6, 5, 32))
    assert {p for p, _ in goal.groups} == set(mae.FROZEN)
    grads = run(params, model(), batch)[3]
    assert not np.asarray(grads["pos_embed"]).any() and not np.asarray(grads["decoder_pos_embed"]).any()
    assert 0.015 < float(jnp.std(params["blocks_0"]["mlp"]["fc1"]["kernel"])) < 0.025
    xavier, _ = jax.jit(goal_of(batch, model(initial="xavier")).init)(jax.random.key(0))
    bound = (6 / (32 + 48)) ** 0.5
    assert 0.9 * bound < float(jnp.abs(xavier["blocks_0"]["mlp"]["fc1"]["kernel"]).max()) <= bound
    # The patch kernel is a linear layer's: fan-in 16 values, fan-out 32.
    assert 0.9 < float(jnp.abs(xavier["patch_embed"]["kernel"]).max()) / (6 / 48) ** 0.5 <= 1


@pytest.mark.parametrize("more", [{"remat": "full"}, {"remat": "dots", "scan_blocks": True}])
def test_recomputing_and_looping_change_nothing(more):
    parts = images(np.random.default_rng(5))
    batch = packed(parts, ROWS, 48)
    params = weights(model(), batch)
    close(run(params, model(**more), batch)[2:], run(params, model(), batch)[2:])


def test_half_precision_is_near():
    parts = images(np.random.default_rng(6))
    batch = padded(parts, range(4), 32)
    params = weights(model(), batch)

    @functools.partial(jax.jit, static_argnames="dtype")
    def loss(params, batch, dtype):
        return goal_of(batch, model(dtype=dtype)).loss_fn(params, {}, batch, jax.random.key(0), 0)[0]

    half, full = (loss(params, batch, dtype=d) for d in ("bfloat16", "float32"))
    assert abs(float(half) - float(full)) < 0.03 * float(full)


def test_on_a_mesh():
    """Rows split over devices: the mean is still over the whole batch."""
    parts = images(np.random.default_rng(7))
    batch = packed(parts, ((0, 1), (5,), (2, 3)), 48)
    params = weights(model(), batch)
    loss, grads = run(params, model(), batch)[2:]
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        close(run(params, model(), batch)[2:], (loss, grads))
        close(run(params, model(), padded(parts, (0, 1, 5, 2, 3), 32, rows=8))[2:], (loss, grads))


def test_what_does_not_go():
    for fields, message in (
        ({"heads": 5}, "not divisible by heads=5"),
        ({"decoder_heads": 5}, "decoder_width=24 is not divisible by decoder_heads=5"),
        ({"pos": "nearest"}, "pos='nearest'"),
        ({"decoder_pos": "1d"}, "decoder_pos='1d'"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"initial": "zeros"}, "initial='zeros'"),
        ({"scan_blocks": True}, "remat"),
        ({"widht": 3}, "did you mean 'width'"),
        ({"variant": "thesis"}, "did you mean 'thesis_base'"),
    ):
        with pytest.raises(UserError, match=message):
            load_model("config.model", model(**fields))
    net = mae.Model(**SMALL, **DECODER)
    with pytest.raises(UserError, match="patches have 7 values"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 7)), jnp.ones((1, 2), int))
    with pytest.raises(UserError, match="go together"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 16)), jnp.ones((2, 2), int))


def test_published_sizes():
    """Parameters of the thesis' model and of the published ones, by shapes only."""
    for variant, millions in (("thesis_base", 118.867456), ("mae_base", 111.907840), ("mae_large", 329.541888)):
        net = load_model("config.model", {"name": "mae", "variant": variant})
        values = net.patch * net.patch * net.channels
        rngs = {"params": jax.random.key(0), "mask": jax.random.key(0)}
        shapes = jax.eval_shape(net.init, rngs, jnp.zeros((1, 4, values)), jnp.ones((1, 2), jnp.int32))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == round(millions * 1e6), variant
