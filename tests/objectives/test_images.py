"""Objectives on images of any size: what their means are over, whatever the batch is cut into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.core import accumulate, optim
from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from jaxmed.objectives import classify, mae

ENCODER = {"width": 16, "heads": 2, "depth": 1, "mlp_width": 16, "patch": 2, "table": (3, 3)}
DECODER = {"decoder_width": 8, "decoder_heads": 2, "decoder_depth": 1, "decoder_mlp_width": 8}


def batch_of(grids, n: int = 12, labels=None):
    rng, grid = np.random.default_rng(0), np.array(grids, np.int32)
    patch = rng.random((len(grid), n, 4), dtype=np.float32)
    out = {"patch": patch, "grid": grid, "noise": rng.random((len(grid), n), dtype=np.float32)}
    rows = grid.reshape(len(grid), -1, 2).prod(-1).sum(-1)
    out["_mask"] = (rows > 0).astype(np.float32)
    if labels is not None:
        out["label"] = np.array(labels, np.float32)
    return jax.tree.map(jnp.asarray, out)


def goal_of(module, batch, model, **options):
    spec = {"only": {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}}
    return module.make(Config({"objective": {"name": "x", **options}, "model": model}), spec)


def whole_and_cut(goal, batch, k: int):
    """Loss and gradients of a batch at once, and of k microbatches."""

    @jax.jit
    def run(params, batch):
        args = (goal, params, {}, batch, jax.random.key(0), jnp.int32(0))
        return accumulate.value_and_grad(*args), accumulate.value_and_grad(*args, microbatches=k)

    params, _ = jax.jit(goal.init)(jax.random.key(1))
    whole, cut = run(params, batch)
    return (whole[0][0], whole[1]), (cut[0][0], cut[1])


@pytest.mark.parametrize("loss", mae.LOSSES)
def test_microbatches_weigh_what_they_hold(loss):
    # Microbatches (rows dealt like cards) of many and of few patches, and one of nothing.
    batch = batch_of([(3, 4), (1, 1), (0, 0), (3, 3), (1, 2), (0, 0)])
    goal = goal_of(mae, batch, {"name": "mae", **ENCODER, **DECODER}, loss=loss)
    whole, cut = whole_and_cut(goal, batch, 3)
    assert float(whole[0]) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, cut)


def test_losses_by_hand():
    rng = np.random.default_rng(1)
    errors, image = rng.random((2, 6)), np.array([[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    mask = np.array([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]], np.float32)
    picked = errors[mask > 0]
    np.testing.assert_allclose(mae.token_mean(jnp.asarray(errors), jnp.asarray(mask)), picked.mean(), rtol=1e-6)
    means = [errors[0, [0, 2]].mean(), errors[0, 3], errors[1, 1]]
    got = mae.image_mean(jnp.asarray(errors), jnp.asarray(mask), jnp.asarray(image), 2)
    np.testing.assert_allclose(got, np.mean(means), rtol=1e-6)
    flat = jnp.asarray(np.stack([np.full(4, 7.0), rng.random(4)])[None], jnp.float32)
    normed = np.asarray(mae.normalised(flat))
    assert not normed[0, 0].any()
    np.testing.assert_allclose(normed[0, 1].std(ddof=1), 1.0, rtol=1e-4)


def test_nothing_is_finite_and_what_is_missing_is_said():
    model = {"name": "mae", **ENCODER, **DECODER}
    batch = batch_of([(0, 0), (0, 0)])
    goal = goal_of(mae, batch, model)
    params, _ = jax.jit(goal.init)(jax.random.key(1))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: goal.loss_fn(p, {}, batch, jax.random.key(0), 0)[0]))(params)
    assert float(loss) == 0.0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    shown = jax.jit(lambda p: goal.predict_fns["reconstruct"](p, {}, batch))(params)
    assert set(shown) == {"prediction", "pixels", "mask", "valid"}
    assert goal.flops_fn({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}) > 0
    with pytest.raises(UserError, match="loss: 'masked' is not one of"):
        goal_of(mae, batch, model, loss="masked")
    with pytest.raises(UserError, match="norm_pix"):
        goal_of(mae, batch, model, loss="full", norm_pix=True)
    with pytest.raises(UserError, match="'grid' is needed"):
        goal_of(mae, {k: x for k, x in batch.items() if k != "grid"}, model)
    with pytest.raises(UserError, match="'label' is needed"):
        goal_of(classify, batch, {"name": "vit", **ENCODER})


@pytest.mark.parametrize("packed", [False, True])
def test_classification(packed):
    """One column or one for each class; images without a label, and blank rows, count for nothing."""
    if packed:
        grids = [[(2, 2), (1, 3)], [(2, 3), (0, 0)], [(0, 0), (0, 0)], [(1, 1), (3, 3)]]
        numbers = np.array([[2, np.nan], [0, 1], [1, 1], [1, 2]])[..., None]
    else:
        grids, numbers = [(2, 2), (1, 3), (0, 0), (3, 4)], np.array([2, np.nan, 1, 0])[:, None]
    model = {"name": "vit", **ENCODER, "classes": 3}
    batch = batch_of(grids, labels=numbers)
    columns = {**batch, "label": jnp.asarray(np.where(np.isnan(numbers), np.nan, numbers == np.arange(3)), jnp.float32)}
    results = []
    for one in (batch, columns):
        whole, cut = whole_and_cut(goal_of(classify, one, model), one, 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, cut)
        results.append(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *results)
    goal = goal_of(classify, batch, model)
    params, _ = jax.jit(goal.init)(jax.random.key(1))
    logits = jax.nn.log_softmax(jax.jit(goal.predict_fns["classify"])(params, {}, batch)["logits"])
    there = ~np.isnan(numbers[..., 0]) & (np.array(grids).prod(-1) > 0)
    chosen = np.take_along_axis(np.asarray(logits), np.nan_to_num(numbers).astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(results[0][0], -chosen[there].mean(), rtol=1e-5)
    with pytest.raises(UserError, match="2 label columns"):
        bad = {**batch, "label": batch["label"].repeat(2, -1)}
        jax.eval_shape(lambda p: goal_of(classify, bad, model).loss_fn(p, {}, bad, None, 0), params)


def test_schedules_with_a_floor():
    both = {}
    for name in ("cosine_floor", "cosine_floor_published"):
        fn = optim.schedule(name, lr=1.0, floor=0.1, warmup_steps=4, total_steps=12)
        both[name] = np.asarray(jax.jit(jax.vmap(fn))(jnp.arange(30)))
    fixed, published = both.values()
    np.testing.assert_allclose(fixed[[0, 3, 4, 8, 12, 29]], [0.325, 1.0, 1.0, 0.55, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(published[[0, 3, 4, 8, 12, 16, 20]], [0.35, 1.1, 1.0, 0.55, 0.1, 0.55, 1.0], rtol=1e-6)
    with pytest.raises(UserError, match="'cosine' has none"):
        optim.schedule("cosine", lr=1.0, floor=0.1, total_steps=3)
    with pytest.raises(UserError, match="is above"):
        optim.schedule("cosine_floor", lr=0.01, floor=0.1, total_steps=3)
