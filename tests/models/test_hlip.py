"""The vision tower: locality, padding, repeats, random draws, sizes, sharding, published names."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.core import flops, tree
from jaxmed.core.errors import UserError
from jaxmed.core.sharding import make_mesh
from jaxmed.models import hlip
from jaxmed.models.layers import groups, inflate
from jaxmed.ports import hlip_visual as port

TINY = {"img_size": (6, 8, 8), "patch": (2, 4, 4), "width": 24, "heads": 2, "out_dim": 8}
H3 = ("slice", "scan", "study")


def tiny(levels=H3, **fields):
    return hlip.Model(**{**TINY, "levels": levels, "depth": len(levels), **fields})


def images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@functools.cache
def params(model, seed=1):
    """Every parameter random: zeros and tokens of size 1e-6 would hide mistakes."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, *model.img_size)))["params"]
    rng = np.random.default_rng(seed)
    return tree.map_with_path(lambda _, x: jnp.asarray(0.3 * rng.standard_normal(x.shape, dtype=np.float32)), shapes)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def _run(model, weights, image, depths, **kw):
    return model.apply({"params": weights}, image, depths, **kw)


def run(model, image, depths=None, weights=None, **kw):
    return _run(model, params(model) if weights is None else weights, image, depths, **kw)


def gradient(loss, *args):
    """Of a scalar by its first argument."""
    return jax.jit(jax.grad(loss))(*args)


def assert_close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol)


# What sees what.


def test_each_level_sees_its_own_group_only():
    image = images(2, 2, 6, 8, 8)
    for level, own in (("slice", np.s_[1, 0, 2:4]), ("scan", np.s_[1, 0]), ("study", np.s_[1])):
        model = tiny((level,))

        group = {"slice": 7, "scan": 2, "study": 1}[level]

        def of_that_group(x, weights, model=model, group=group):
            return (model.apply({"params": weights}, x)[1]["block_00"][group] ** 2).sum()

        grad = np.asarray(gradient(of_that_group, image, params(model)))
        inside = np.zeros(image.shape, bool)
        inside[own] = True
        assert (grad[inside] != 0).all() and not grad[~inside].any(), level


def test_padding_gets_no_gradient():
    image, depths = images(2, 3, 6, 8, 8), np.array([[6, 5, 0], [0, 0, 0]], np.int32)
    for model in (tiny(reg_tokens=1, pool="dinotxt", keep_token_axis=True), tiny(("scan", "slice"), pool="map")):

        def loss(x, weights, study, model=model):
            return (model.apply({"params": weights}, x, depths)[0][study] ** 2).sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
        by_image, by_weights = gradients(image, params(model), 0)
        inside = np.zeros(image.shape, bool)
        inside[0, 0], inside[0, 1, :4] = True, True
        assert (np.asarray(by_image)[inside] != 0).all() and not np.asarray(by_image)[~inside].any()
        # Of an empty study (a padding row of the batch) everything is finite.
        by_image, by_weights = gradients(image, params(model), 1)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((by_image, by_weights))) and not by_image.any()


# Ragged studies.

RAGGED = {
    "h3_dual": {"reg_tokens": 1, "pool": "dinotxt", "keep_token_axis": True},
    "map_slice_last": {"levels": ("study", "scan", "slice"), "pool": "map", "max_num_scans": 2},
    "rope": {"levels": ("slice", "study"), "rope": True, "max_num_scans": 8, "width": 48},
}


@pytest.mark.parametrize("name", RAGGED)
def test_masked_bucket_equals_unpadded_studies(name):
    """Scans of one depth: the unpadded study can be run alone. The stored table has 3 slabs, the bucket 5."""
    model = tiny(**RAGGED[name])
    bucket = images(3, 4, 11, 8, 8)
    depths = np.array([[7, 7, 7, 0], [0, 5, 0, 5], [11, 11, 11, 11]], np.int32)
    z, _ = run(model, bucket, depths)
    for i, row in enumerate(depths):
        alone = bucket[i : i + 1, row > 0, : row.max()]
        assert_close(z[i], run(model, alone)[0][0])


def test_masked_bucket_of_mixed_depths():
    """Each scan as if alone, where scans do not meet; and any bucket, any order of padding where they do."""
    bucket, depths = images(1, 3, 10, 8, 8), np.array([[4, 10, 7]], np.int32)
    model = tiny(("slice", "scan"))
    together = run(model, bucket, depths)[1]["block_01"]
    for i, n in enumerate(depths[0]):
        assert_close(together[i, : 1 + n // 2 * 4], run(model, bucket[:, i : i + 1, :n])[1]["block_01"][0])
    model = tiny(max_num_scans=4, reg_tokens=1)
    z = run(model, bucket, depths)[0]
    larger, more = images(1, 5, 14, 8, 8, seed=5), np.zeros((1, 5), np.int32)
    larger[:, [0, 2, 3], :10], more[:, [0, 2, 3]] = bucket, depths
    assert_close(run(model, larger, more)[0], z)


def test_training_draws_mean_the_same_with_padding():
    """Given draws: a padded study keeps the patches and scan positions it would keep alone."""
    model = tiny(("scan", "study"), patch_drop=0.4, max_num_scans=3)
    bucket, depths = images(2, 5, 6, 8, 8), np.array([[4, 4, 0, 0, 0], [6, 6, 6, 6, 6]], np.int32)
    rng = np.random.default_rng(3)
    perm, order = rng.permutation(5), rng.permuted(np.tile(np.arange(12), (10, 1)), axis=1)
    z, _ = run(model, bucket, depths, train=True, draws={"seq_perm": perm, "patch_order": order})
    real = np.stack([o[o < 8] for o in order[:2]])
    one = {"seq_perm": perm[perm < 3], "patch_order": real}
    assert_close(z[0], run(model, bucket[:1, :2, :4], train=True, draws=one)[0][0])
    other = {"seq_perm": perm, "patch_order": order[5:]}
    assert_close(z[1], run(model, bucket[1:], train=True, draws=other)[0][0])
    kept, mask = groups.keep_patches(jnp.asarray(order), jnp.arange(12)[None] < jnp.arange(10)[:, None], 0.4)
    assert kept.shape == (10, 7)
    assert mask.sum(1).tolist() == [0, 1, 1, 1, 2, 3, 3, 4, 4, 5]


# Loop, scan over repeats, remat.


def test_loop_scan_and_remat_are_equal():
    fields = {"rope": True, "patch_drop": 0.3, "drop_path": 0.4, "max_num_scans": 4, "depth": 4, "reg_tokens": 1}
    image, depths = images(2, 3, 6, 8, 8), np.array([[6, 4, 6], [6, 0, 0]], np.int32)
    rngs = {"dropout": jax.random.key(7)}

    def loss(weights, model):
        z, _ = model.apply({"params": weights}, image, depths, train=True, rngs=rngs)
        return (z**2).sum(), z

    def both(**more):
        model = tiny(("slice", "study"), **fields, **more)
        (_, z), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params(model), model)
        return z, grads

    z, grads = both()
    for more in ({"remat": "full"}, {"remat": "dots", "scan_blocks": True}, {"remat": "full", "scan_blocks": True}):
        other, other_grads = both(**more)
        assert_close(other, z, 1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other_grads, grads)
    with pytest.raises(UserError, match="scan_blocks"):
        tiny(scan_blocks=True)


# Random numbers.


@pytest.mark.parametrize(
    "fields", [{}, {"remat": "full"}, {"levels": ("slice", "scan")}, {"rope": True}, {"drop_path": 0.3}], ids=str
)
def test_the_last_block_of_prefix_tokens_alone_gives_the_same(fields):
    model = tiny(**fields)
    weights, image, depths = params(model), images(2, 3, 6, 8, 8), jnp.array([[6, 4, 0], [6, 6, 2]])

    def loss_fn(weights, inner):
        rngs = {"dropout": jax.random.key(5)}
        z, out = model.apply({"params": weights}, image, depths, train="drop_path" in fields, rngs=rngs, inner=inner)
        return (z**2).sum(), (z, out["norm"].shape[1])

    (_, (z, tokens)), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, True)
    (_, (alone, prefix)), its_grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, False)
    assert tokens == 3 * 3 * 4 + 1 and prefix == 1
    np.testing.assert_allclose(alone, z, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(its_grads)):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max() + 1))


def test_drawn_equals_given_and_rates():
    model = tiny(patch_drop=0.5, drop_path=0.5, max_num_scans=4)
    image, rngs = images(2, 3, 6, 16, 16), {"dropout": jax.random.key(3)}
    draws = model.apply({}, hlip.Sizes(2, 3, 3), 16, True, rngs=rngs, method=model._draw)
    assert sorted(draws["seq_perm"].tolist()) == [0, 1, 2, 3]
    assert draws["patch_order"].shape == (18, 16) and draws["drop_path_mask/block_02_1"].shape == (2,)
    assert "drop_path_mask/block_00_1" not in draws
    z, out = run(model, image, train=True, rngs=rngs)
    assert out["keep_count"] == 8
    assert_close(z, run(model, image, train=True, draws=draws)[0])
    assert np.abs(z - run(model, image, train=True, rngs={"dropout": jax.random.key(4)})[0]).max() > 1e-3
    # Without draws, and in evaluation, nothing is random.
    assert_close(run(model, image, train=True, draws={})[0], run(model, image)[0])
    many = tiny(("scan",) * 2, drop_path=0.25)
    many = many.apply({}, hlip.Sizes(500, 4, 1), 4, True, rngs=rngs, method=many._draw)
    assert abs(many["drop_path_mask/block_01_2"].mean() - 0.75) < 0.04
    with pytest.raises(UserError, match="rngs"):
        model.apply({"params": params(model)}, image, train=True)


def test_scan_positions_by_batch_by_study_and_as_published():
    image = np.tile(images(1, 1, 6, 8, 8), (4, 3, 1, 1, 1))
    rngs = {"dropout": jax.random.key(0)}

    def inputs(model, image=image, **kw):
        return run(model, image, rngs=rngs, **kw)[1]["block_00_in"].reshape(len(image), 3, -1)

    batch = inputs(tiny(("scan",), max_num_scans=9), train=True)
    assert_close(batch, np.broadcast_to(batch[:1], batch.shape))
    study = inputs(tiny(("scan",), max_num_scans=9, scan_positions="study"), train=True)
    assert np.abs(study - study[:1]).max() > 0.1
    in_order = inputs(tiny(("scan",), max_num_scans=9))
    assert np.abs(batch - in_order).max() > 0.1
    legacy = tiny(("scan",), max_num_scans=9, legacy_positions=True)
    assert np.abs(inputs(legacy) - in_order).max() > 0.1
    assert_close(inputs(legacy, image[:1], train=True), in_order[:1])


# Sizes.

COUNTS = {  # millions: all, trainable (HLIP spec, section 3)
    "clip_vit_base_singlescan_h2_token2744": (91.10, 88.99),
    "siglip_vit_base_singlescan_h2_token2744": (97.79, 95.68),
    "clip_vit_base_multiscan_h2_token588": (89.08, 88.60),
    "clip_vit_base_multiscan_h2_token1176": (87.96, 87.02),
    "clip_vit_base_multiscan_h3_token1176": (87.96, 87.02),
    "clip_vit_base_multiscan_h2_token1568": (87.87, None),
    "clip_vit_base_multiscan_h2_dinotxt1568": (88.65, None),
    "hlip-2025-10-08": (88.62, 87.42),
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568": (88.62, None),
    "ablate_seqposemb_clip_vit_large_multiscan_h2_dualdinotxt1568": (307.07, 305.46),
    "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568": (88.62, None),
}


@pytest.mark.parametrize("variant", hlip.VARIANTS)
def test_published_sizes(variant):
    model = hlip.Model(**hlip.VARIANTS[variant])
    image = jax.ShapeDtypeStruct((1, 1, *model.img_size), jnp.uint8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    flat = tree.flatten(shapes)
    frozen = sum(math.prod(x.shape) for k, x in flat.items() if tree.first_match([(p, 1) for p in hlip.FROZEN], k))
    total, trainable = COUNTS.get(variant, (None, None))
    if total is not None:
        assert round(tree.num_params(shapes) / 1e6, 2) == total
    if trainable is not None:
        assert round((tree.num_params(shapes) - frozen) / 1e6, 2) == trainable
    # Every parameter has a published name, and comes back from it.
    published = {k: port.to_published(k, np.broadcast_to(np.float32(0), x.shape)) for k, x in flat.items()}
    assert all(published.values()) and len({p[0] for p in published.values()}) == len(flat)
    back = [port.to_ours(*p) for p in published.values()]
    assert {k: x.shape for k, x in back} == {k: x.shape for k, x in flat.items()}


def test_names_are_exact_both_ways():
    x = images(8, 6)
    name, ours = port.to_ours("trunk.blocks.11.mlp.fc1.weight", x)
    assert name == "blocks_11/mlp/fc1/kernel" and (ours == x.T).all()
    assert port.to_ours("trunk.series_posemb", images(1, 4, 6))[0] == "sequential_posemb"
    assert port.to_published("sequential_posemb", x)[0] == "trunk.sequential_posemb"
    assert port.to_ours("trunk.blocks.1.gamma_1", x) is None and port.to_published("blocks_1/ls1", x) is None
    kernel = images(24, 1, 2, 4, 5)
    assert (port.to_published(*port.to_ours("trunk.patch_embed.proj.weight", kernel))[1] == kernel).all()


def test_initial_values():
    model = hlip.Model(
        **{**TINY, "width": 96, "pool": "map", "reg_tokens": 1, "max_num_scans": 5, "levels": ("scan",), "depth": 2}
    )
    flat = tree.flatten(jax.jit(model.init)(jax.random.key(0), images(1, 1, 6, 8, 8))["params"])
    std = {k: float(jnp.std(x)) for k, x in flat.items()}
    assert all(not x.any() for k, x in flat.items() if k.endswith("bias") and "patch_embed" not in k)
    assert std["blocks_1/attn/qkv/kernel"] == pytest.approx(0.02, rel=0.05)
    assert std["attn_pool/kv/kernel"] == pytest.approx(0.02, rel=0.05)
    assert std["cls_token"] == pytest.approx(1e-6, rel=0.4)
    assert jnp.abs(flat["attn_pool/latent"]).max() <= 2 * 96**-0.5
    for name, fan_in in (("head/kernel", 96), ("patch_embed/kernel", 32), ("patch_embed/bias", 32)):
        assert 0.9 < float(jnp.abs(flat[name]).max()) * fan_in**0.5 <= 1
    assert flat["spatial_posemb"].shape == (1, 3, 2, 2, 96) and flat["sequential_posemb"].shape == (1, 5, 96)
    # Published: tables are in the checkpoint and stay as they are.
    image = images(1, 2, 6, 8, 8)
    grads = gradient(lambda w: model.apply({"params": w}, image)[0].sum(), tree.unflatten(flat))
    assert not grads["spatial_posemb"].any() and not grads["sequential_posemb"].any()


def analytic_flops(model, shape, *, train=False):
    """A multiply-add counts two; norms, softmax and other element-wise work are left out."""
    e, hidden = model.width, int(model.width * model.mlp_ratio)
    grid = [n // p for n, p in zip(shape[2:5], model.patch)]
    sizes = hlip.Sizes(shape[0], shape[1], grid[0])
    patches = int(np.prod(grid)) * sizes.groups("scan")
    total = 2.0 * patches * int(np.prod(model.patch)) * model.channels * e
    if train and model.patch_drop:
        first = sizes.groups(model.levels[0])
        patches = first * max(1, int(patches // first * (1.0 - model.patch_drop)))
    for level in model.block_levels:
        groups = sizes.groups(level)
        n = patches / groups + model.prefix_tokens
        total += groups * n * (2.0 * e * (4 * e + 2 * hidden) + 4.0 * n * e)
    if model.pool == "map":
        total += 2.0 * patches * e * 2 * e + sizes.b * 4.0 * e * (e + hidden)
    if model.proj == "linear":
        vectors = model.prefix_tokens if model.pool == "dinotxt" else 1
        total += 2.0 * sizes.b * vectors * model.out_dim * e * (2 if model.pool == "dinotxt" else 1)
    return total


def test_counted_flops_are_those_of_the_formula():
    for fields in ({"pool": "map"}, {"pool": "dinotxt", "reg_tokens": 1, "keep_token_axis": True, "patch_drop": 0.5}):
        model = hlip.Model(**{**TINY, "levels": ("scan", "study"), "depth": 4, **fields})
        weights = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, *model.img_size)))
        apply = functools.partial(model.apply, train=True, rngs={"dropout": jax.random.key(0)})
        counted = flops.count(apply, weights, jax.ShapeDtypeStruct((2, 3, 7, 8, 8), jnp.float32))
        # The counter also sees the resampling of positions.
        assert analytic_flops(model, (2, 3, 7, 8, 8), train=True) == pytest.approx(counted, rel=0.01)


# Input, precision, mesh.


def test_integer_voxels_are_normalised_on_the_device():
    model = tiny(("scan",), pixel_range=(-1150, 350))
    stored = np.random.default_rng(0).integers(-3000, 3000, (1, 1, 6, 8, 8)).astype(np.int16)
    unit = np.clip((stored.astype(np.float32) + 1150) / 1500, 0, 1)
    assert_close(run(model, stored)[0], run(model, (unit - 0.449) / 0.226)[0])
    assert_close(run(model, stored[..., None])[0], run(model, stored)[0])
    with pytest.raises(UserError, match="pixel_range"):
        run(tiny(("scan",)), stored)
    eight = stored.astype(np.uint8)
    assert_close(run(tiny(("scan",)), eight)[0], run(tiny(("scan",)), (eight / np.float32(255) - 0.449) / 0.226)[0])


def test_bfloat16_activations():
    image = images(2, 2, 6, 8, 8)
    z, out = run(tiny(dtype="bfloat16", rope=True), image, weights=params(tiny(rope=True)))
    assert z.dtype == jnp.float32 and out["norm"].dtype == jnp.bfloat16
    ref = np.asarray(run(tiny(rope=True), image)[0])
    assert np.abs(z - ref).max() < 0.05 * np.abs(ref).max()


def test_eight_devices_equal_one():
    fields = {"max_num_scans": 4, "patch_drop": 0.3, "drop_path": 0.3, "heads": 2, "pool": "map"}
    image, depths = images(8, 2, 6, 8, 8), np.tile(np.array([[6, 4], [5, 0]], np.int32), (4, 1))
    model = tiny(("slice", "study"), **fields, remat="full", scan_blocks=True)
    rngs = {"dropout": jax.random.key(5)}

    def loss(weights, image, depths):
        z, _ = model.apply({"params": weights}, image, depths, train=True, rngs=rngs)
        return (z**2).sum()

    one, one_grads = jax.jit(jax.value_and_grad(loss))(params(model), image, depths)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        args = jax.device_put((image, depths), rows)
        all_, all_grads = jax.jit(jax.value_and_grad(loss))(
            jax.device_put(params(model), jax.NamedSharding(mesh, jax.P())), *args
        )
    np.testing.assert_allclose(all_, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), all_grads, one_grads)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ("slice", "volume")}, "levels="),
        ({"depth": 5}, "no multiple"),
        ({"heads": 5}, "divisible by heads"),
        ({"pool": "mean"}, "pool='mean'"),
        ({"proj": "none"}, "out_dim=8"),
        ({"pool": "dinotxt", "reg_tokens": 1}, "keep_token_axis"),
        ({"width": 20}, "posemb_init='3d'"),
        ({"patch": (8, 4, 4)}, "smaller than patch"),
        ({"attn_impl": "fast"}, "attn_impl"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields)


def test_images_that_do_not_fit():
    with pytest.raises(UserError, match=r"\(b, s, d, h, w"):
        run(tiny(), images(2, 6, 8, 8), weights={})
    with pytest.raises(UserError, match="smaller than one patch"):
        run(tiny(), images(1, 1, 6, 8, 2), weights={})
    with pytest.raises(UserError, match="cannot be split"):
        run(
            tiny(("scan", "slice"), patch_drop=0.4),
            images(1, 1, 6, 8, 8),
            train=True,
            draws={"patch_order": np.arange(12)[None]},
        )


def test_inflation_options():
    state = {k: images(*s, seed=i) for i, (k, s) in enumerate({
        "cls_token": (1, 1, 24), "pos_embed": (1, 16, 24),
        "patch_embed.proj.weight": (24, 3, 4, 4), "patch_embed.proj.bias": (24,), "decoder_embed.weight": (3, 3),
    }.items())}  # fmt: skip
    out = inflate.from_2d_mae(state, patch=(2, 8, 8), grid=(3, 4, 4), rescale=True)
    # Without a row of its own in the table, the class token stays as it is.
    assert (out["cls_token"] == state["cls_token"]).all() and "decoder_embed.weight" not in out
    plain = inflate.from_2d_mae(state, patch=(2, 8, 8), grid=(3, 4, 4))["patch_embed.proj.weight"]
    np.testing.assert_allclose(out["patch_embed.proj.weight"] * 4, plain, rtol=1e-5)
    with pytest.raises(UserError, match="lack pos_embed"):
        inflate.from_2d_mae({k: x for k, x in state.items() if k != "pos_embed"}, patch=(2, 8, 8), grid=(3, 4, 4))
    with pytest.raises(UserError, match="inflation='middle'"):
        inflate.from_2d_mae(state, patch=(2, 4, 4), grid=(3, 4, 4), inflation="middle")
