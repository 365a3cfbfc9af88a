"""Masked autoencoders and classifiers in every published layout: there and back, and changed to fit other images."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.core import checkpoint, tree, weights
from jaxmed.core.errors import UserError
from jaxmed.core.load import load_model
from jaxmed.models.layers.patch_embed import cut_patches
from jaxmed.ports import radiograph_mae, radiograph_mae_model, torch_files, vit_names
from tests.ports import command

# What the shapes of the goldens do not show.
HEADS = "--heads=4 --decoder-heads=3"
ORIGINAL_HEADS = "--heads=3 --decoder-heads=2"
# One block of the encoder and one of the decoder, as the four layouts call them.
NAMES = {
    "original": {
        "blocks.1.attn.qkv.weight",
        "blocks.1.attn.proj.bias",
        "blocks.1.norm1.weight",
        "blocks.1.mlp.fc2.bias",
        "decoder_blocks.0.attn.qkv.bias",
        "decoder_blocks.0.mlp.fc1.weight",
        "patch_embed.proj.weight",
        "norm.bias",
        "mask_token",
        "decoder_pos_embed",
        "decoder_pred.weight",
    },
    "hf4": {
        "vit.encoder.layer.1.attention.attention.query.weight",
        "vit.encoder.layer.1.attention.output.dense.bias",
        "vit.encoder.layer.1.layernorm_before.weight",
        "vit.encoder.layer.1.output.dense.bias",
        "decoder.decoder_layers.0.attention.attention.key.bias",
        "decoder.decoder_layers.0.intermediate.dense.weight",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.layernorm.bias",
        "decoder.mask_token",
        "decoder.decoder_pos_embed",
        "decoder.decoder_pred.weight",
    },
    "hf5": {
        "vit.layers.1.attention.q_proj.weight",
        "vit.layers.1.attention.o_proj.bias",
        "vit.layers.1.layernorm_before.weight",
        "vit.layers.1.mlp.fc2.bias",
        "decoder.decoder_layers.0.attention.k_proj.bias",
        "decoder.decoder_layers.0.mlp.fc1.weight",
        "decoder.mask_token",
    },
    "hf5_saved": {
        "vit.encoder.layer.1.attention.attention.query.weight",
        "decoder.decoder_encoder.layer.0.attention.attention.key.bias",
        "decoder.decoder_encoder.layer.0.intermediate.dense.weight",
        "decoder.decoder_norm.bias",
    },
}


golden, run, fails = (partial(f, "radiograph_mae") for f in (command.golden, command.run, command.fails))


@pytest.mark.parametrize("wrapper", ["", "net.", "net._orig_mod.", "mae_model.", "module.model."])
@pytest.mark.parametrize("layout", vit_names.LAYOUTS)
def test_every_layout_and_wrapper_is_exact(layout, wrapper):
    published, _ = golden("mae_native_square")
    params = radiograph_mae.to_jaxmed(published)
    there = radiograph_mae.to_published(params, layout=layout, wrapper=wrapper)
    bare = {k.removeprefix(wrapper) for k in there}
    assert len(bare) == len(there) and NAMES[layout] <= bare
    command.same(tree.flatten(params), tree.flatten(radiograph_mae.to_jaxmed(there)))
    flat, names = radiograph_mae.convert(there)
    assert set(names.matched) == set(there) and set(names.matched.values()) == set(flat)
    command.same(published, radiograph_mae.to_published(radiograph_mae.to_jaxmed(there)))


def test_classifier_and_encoder_alone():
    published, _ = golden("vit_classifier_rect")
    flat, names = radiograph_mae.convert({**published, "pooler.dense.weight": np.zeros((2, 2))})
    assert names.ignored == ["pooler.dense.weight"] and flat["head/kernel"].shape == (32, 14)
    command.same(published, radiograph_mae.to_published(tree.unflatten(flat)))
    # Saved without the class around it.
    bare = {k.removeprefix("vit."): x for k, x in published.items()}
    command.same(flat, radiograph_mae.convert(bare)[0])
    for layout in vit_names.LAYOUTS:
        again = radiograph_mae.to_published(tree.unflatten(flat), layout=layout)
        assert ("head.weight" if layout == "original" else "classifier.weight") in again
        command.same(flat, radiograph_mae.convert(again)[0])


def test_command_there_and_back(tmp_path, capsys):
    published, case = golden("original_mae_keys")
    torch_files.write(tmp_path / "mae.pth", published)
    printed = run(capsys, f"--src={tmp_path}/mae.pth --out={tmp_path}/o", ORIGINAL_HEADS)
    assert "norm_eps=1e-06" in printed and "fresh          0" in printed and "CC-BY-NC" in printed
    about = json.loads((tmp_path / "o/model.json").read_text())
    assert about["objective"] == {"name": "mae"} and about["model"]["norm_eps"] == 1e-6
    run(capsys, f"--src={tmp_path}/o --out={tmp_path}/b.safetensors --back --layout=original")
    command.same(published, {k: weights.read(tmp_path / "b.safetensors")[k] for k in published})
    run(capsys, f"--src={tmp_path}/o --out={tmp_path}/l.pt --back --layout=hf5 --wrapper=net.")
    lightning = torch_files.read(tmp_path / "l.pt").tensors
    assert "net.decoder.decoder_layers.0.attention.v_proj.weight" in lightning
    assert "layout: 'hf3'" in fails(capsys, f"--src={tmp_path}/o --out={tmp_path}/b.pt --back --layout=hf3")
    # The model that is written gives what the published one gives.
    net = load_model("config.model", about["model"])
    patch = cut_patches(jnp.asarray(case["input/pixels"]).transpose(0, 2, 3, 1), 8)
    params = tree.unflatten({k: jnp.asarray(x) for k, x in weights.read(tmp_path / "o/params.safetensors").items()})
    grid = jnp.full((2, 2), 4)
    apply = jax.jit(lambda p: net.apply({"params": p}, patch, grid, noise=jnp.asarray(case["input/noise"])))
    np.testing.assert_allclose(apply(params)[0], case["output/logits"], atol=2e-5)

    # A Lightning file, its weights inside.
    state = radiograph_mae.to_published(params, layout="hf5_saved", wrapper="net._orig_mod.")
    torch_files.write(tmp_path / "run.ckpt", {k: np.array(x) for k, x in state.items()})
    printed = run(capsys, f"--src={tmp_path}/run.ckpt --out={tmp_path}/p", ORIGINAL_HEADS)
    assert "norm_eps=1e-12" in printed
    command.same(
        weights.read(tmp_path / "o/params.safetensors") | {}, weights.read(tmp_path / "p/params.safetensors") | {}
    )


def test_encoder_only_becomes_autoencoder_or_classifier(tmp_path, capsys):
    published, _ = golden("original_mae_keys")
    encoder = {k: x for k, x in published.items() if "decoder" not in k and k != "mask_token"}
    weights.write(tmp_path / "e.safetensors", encoder)
    src, out = f"--src={tmp_path}/e.safetensors --heads=3", f"--out={tmp_path}/o"
    assert "'head/bias'" in fails(capsys, src, out, "--classes=5") and not (tmp_path / "o").exists()
    printed = run(capsys, src, out, "--classes=5 --fresh=^head/")
    assert "fresh: head/bias, head/kernel" in printed
    assert json.loads((tmp_path / "o/model.json").read_text())["model"]["classes"] == 5
    more = "--model.name=mae --model.decoder_width=16 --decoder-heads=2 --model.decoder_depth=1"
    printed = run(capsys, src, out, more, "--fresh=decoder|mask_token")
    assert "fresh: decoder_blocks_0/" in printed
    # The whole autoencoder into a classifier: the decoder is left, the head is fresh.
    weights.write(tmp_path / "m.safetensors", published)
    whole = f"--src={tmp_path}/m.safetensors --heads=3 --model.name=vit --classes=5 --fresh=^head/"
    assert "which the model does not have" in fails(capsys, whole, out)
    assert "ignored: " in run(capsys, whole, out, "--ignore=decoder|mask_token")


def test_misfits_name_tensor_and_shapes(tmp_path, capsys):
    published, _ = golden("mae_native_square")
    path, out = tmp_path / "a.safetensors", f"--out={tmp_path}/o"

    def port_of(state):
        weights.write(path, state)
        return f"--src={path}"

    src = port_of(published)
    assert "give --heads=N" in fails(capsys, src, out)
    assert "give --decoder-heads=N" in fails(capsys, src, out, "--heads=4")
    error = fails(capsys, src, out, HEADS, "--model.mlp_width=81")
    assert "'vit.encoder.layer.0.intermediate.dense.bias' has shape (80,)" in error and "has (81,)" in error
    assert "has no place in the model" in fails(capsys, port_of({**published, "fc_norm.bias": np.ones(3)}), out, HEADS)
    less = {k: x for k, x in published.items() if k != "vit.encoder.layer.2.attention.attention.key.bias"}
    assert "blocks.2.attn.key.bias is missing" in fails(capsys, port_of(less), out, HEADS)
    twice = {**published, "cls_token": published["vit.embeddings.cls_token"]}
    assert "are the same parameter" in fails(capsys, port_of(twice), out, HEADS)
    assert "no vision transformer" in fails(capsys, port_of({"cls_token": np.zeros((1, 1, 4))}), out)
    assert "give --src" in fails(capsys, out)
    assert "goes with --back" in fails(capsys, src, out, "--layout=hf4")
    with pytest.raises(UserError, match="different shapes"):
        bad = "vit.encoder.layer.0.attention.attention.key.bias"
        radiograph_mae.convert({**published, bad: np.zeros(3, np.float32)})


def test_changed_to_fit_radiographs(tmp_path, capsys):
    published, _ = golden("mae_rect_norm_pix")  # 3 channels, patch 8, table 8 x 8
    weights.write(tmp_path / "a.safetensors", published)
    src, out = f"--src={tmp_path}/a.safetensors {HEADS}", f"--out={tmp_path}/o"
    assert "--gray=sum or --gray=average" in fails(capsys, src, out, "--channels=1")
    assert "use sum or average" in fails(capsys, src, out, "--channels=1 --gray=mean")
    assert "--channels=1" in fails(capsys, src, out, "--gray=sum")
    printed = run(capsys, src, out, "--channels=1 --gray=sum --patch=20 --table=10,7")
    assert "sum of 3 channels" in printed and "pseudo-inverse resize from 8 to 20" in printed
    assert "pos_embed: resampled from (8, 8) to (10, 7)" in printed
    small = tree.flatten(radiograph_mae.to_jaxmed(published))
    large = weights.read(tmp_path / "o/params.safetensors")
    assert large["decoder_pred/kernel"].shape == (24, 400) and large["pos_embed"].shape == (1, 71, 32)

    # A patch that is larger by resizing, in one channel, gets the vector that it had in three equal ones.
    rng = np.random.default_rng(0)
    patch = rng.random((8, 8))
    matrix = radiograph_mae_model.resize_matrix(8, 20)
    grown = matrix @ patch @ matrix.T
    before = np.einsum("hw,hwce->e", patch, small["patch_embed/kernel"])
    after = np.einsum("hw,hwe->e", grown, large["patch_embed/kernel"][:, :, 0])
    np.testing.assert_allclose(after, before, atol=1e-4)
    # Average is a third of the sum; without other changes the kernel is exact.
    run(capsys, src, out, "--channels=1 --gray=average")
    kernel = weights.read(tmp_path / "o/params.safetensors")["patch_embed/kernel"]
    np.testing.assert_allclose(kernel[:, :, 0] * 3, small["patch_embed/kernel"].sum(2), atol=1e-6)
    # It starts a run.
    about = json.loads((tmp_path / "o/model.json").read_text())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(radiograph_mae_model.init(about["model"]), jax.random.key(0))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    assert checkpoint.start_from(tmp_path / "o", wanted)[1] == []


def test_published_sizes_need_no_heads():
    """Of the published models the heads are known by width."""
    for variant, heads in (("mae_base", 12), ("mae_large", 16), ("mae_huge", 16)):
        shapes = jax.eval_shape(radiograph_mae_model.init({"name": "mae", "variant": variant}), jax.random.key(0))
        flat = {f"{k}": x for k, x in tree.flatten(shapes).items()}
        names = radiograph_mae.Names({"vit.embeddings.cls_token": "cls_token"}, [], [])
        model, _ = radiograph_mae_model.make(flat, {}, names)
        assert model["heads"] == heads and model["decoder_heads"] == 16 and model["norm_eps"] == 1e-12
        full = load_model("config.model", {"name": "mae", "variant": variant})
        assert load_model("config.model", model) == full
