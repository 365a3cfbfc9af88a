"""`python -m jaxmed.port`: published weights there and back, starts from 2D and BERT, and `init_from`."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmed import port, predict_model, predict_prompts, predict_studies
from jaxmed.core import checkpoint, tree, weights
from jaxmed.core.errors import UserError
from jaxmed.models import two_towers
from jaxmed.ports import hlip, hlip_model, torch_files
from jaxmed.prep import recipes
from tests.ports import command

FILES = Path(__file__).parent / "files"
# What the shapes of these goldens do not show.
UNSEEN = {
    "clip_step_multiscan_h2": "--levels=scan,study --heads=2 --model.text.heads=3",
    "siglip_step_map": "--levels=slice,scan --heads=3 --model.text.heads=3",
    "dual_step": "--levels=scan,scan,study --heads=2 --model.text.heads=3",
    "text_lora": "--model.text.heads=3",
    "visual_dual_dinotxt": "--levels=slice,scan,study --heads=2",
}


golden, run, fails = (partial(f, "hlip") for f in (command.golden, command.run, command.fails))


class TestThereAndBack:
    @pytest.mark.parametrize("name", UNSEEN)
    def test_exact_both_ways(self, name, tmp_path, capsys):
        published, _ = golden(name)
        torch_files.write(tmp_path / "a.pt", {f"module.{k}": x for k, x in published.items()})
        weights.write(tmp_path / "a.safetensors", published)
        for kind in ("pt", "safetensors"):
            printed = run(capsys, f"--src={tmp_path}/a.{kind} --out={tmp_path}/{kind}", UNSEEN[name])
            assert f"matched  {len(published):>7}" in printed and "fresh          0" in printed
        assert (tmp_path / "pt/params.safetensors").read_bytes() == (
            tmp_path / "safetensors/params.safetensors"
        ).read_bytes()
        run(capsys, f"--src={tmp_path}/pt --out={tmp_path}/b.pt --back")
        run(capsys, f"--src={tmp_path}/pt/params.safetensors --out={tmp_path}/b.safetensors --back")
        command.same(published, torch_files.read(tmp_path / "b.pt").tensors | {})
        command.same(published, {k: weights.read(tmp_path / "b.safetensors")[k] for k in published})
        report = json.loads((tmp_path / "pt/port_report.json").read_text())
        assert {r["published"] for r in report["matched"]} == {f"module.{k}" for k in published}
        assert report["sources"]["src"]["file"] == "a.pt" and len(report["sources"]["src"]["sha256"]) == 64

    def test_the_model_gives_the_published_features(self, tmp_path, capsys):
        published, case = golden("dual_step")
        weights.write(tmp_path / "a.safetensors", published)
        run(capsys, f"--src={tmp_path}/a.safetensors --out={tmp_path}/o", UNSEEN["dual_step"])
        about = json.loads((tmp_path / "o/model.json").read_text())
        assert about["objective"] == {"name": "clip", "loss": "dual"}
        fields = {k: v for k, v in about["model"].items() if k != "name"}
        model = two_towers.Model(**fields)
        image, ids = jnp.asarray(case["input/image"])[:, :, 0], jnp.asarray(case["input/report_ids"])
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(model.init, jax.random.key(0), image, ids)["params"]
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
        params, left = checkpoint.start_from(tmp_path / "o", wanted)
        assert left == []
        (zimg, ztxt), _ = jax.jit(model.apply)({"params": params}, image, ids)
        np.testing.assert_allclose(zimg, case["output/image_features"], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(ztxt, case["output/report_features"], rtol=2e-5, atol=2e-5)

    def test_old_names_wrappers_and_half_precision(self, tmp_path, capsys):
        published, _ = golden("clip_step_multiscan_h2")
        half = {k: x.astype(ml_dtypes.bfloat16) for k, x in published.items()}
        old = {f"_orig_mod.model.{k}".replace("sequential", "series"): x for k, x in half.items()}
        old["model.text.transformer.embeddings.position_ids"] = np.arange(20)[None]
        folder = tmp_path / "hub"
        folder.mkdir()
        torch_files.write(folder / "pytorch_model.bin", old)
        printed = run(capsys, f"--src={folder} --out={tmp_path}/o", UNSEEN["clip_step_multiscan_h2"])
        assert "ignored: model.text.transformer.embeddings.position_ids" in printed
        run(capsys, f"--src={tmp_path}/o --out={tmp_path}/b.safetensors --back")
        command.same(half, {k: weights.read(tmp_path / "b.safetensors")[k] for k in half})

    def test_back_from_a_workdir(self, tmp_path, capsys):
        published, _ = golden("dual_step")
        params = jax.tree.map(jnp.asarray, hlip.to_jaxmed(published))
        with checkpoint.Checkpoints(tmp_path / "run/checkpoints") as c:
            c.save(7, {"params": params, "step": jnp.int32(7)}, {})
        for place in ("run", "run/checkpoints/7"):
            run(capsys, f"--src={tmp_path}/{place} --out={tmp_path}/b.pt --back")
            command.same(published, {k: torch_files.read(tmp_path / "b.pt").tensors[k] for k in published})

    def test_misfits_name_tensor_and_shapes(self, tmp_path, capsys):
        published, _ = golden("clip_step_multiscan_h2")
        unseen = UNSEEN["clip_step_multiscan_h2"]
        path, out = tmp_path / "a.safetensors", f"--out={tmp_path}/o"

        def port_of(state):
            weights.write(path, state)
            return f"--src={path}"

        src = port_of(published)
        assert "give --levels=" in fails(capsys, src, out)
        assert "--model.text.heads=N" in fails(capsys, src, out, "--levels=scan,study --heads=2")
        error = fails(capsys, src, out, unseen, "--model.text.vocab_size=99")
        assert (
            "'text.transformer.embeddings.word_embeddings.weight' has shape (61, 24)" in error and "(99, 24)" in error
        )
        assert "--variant" in fails(capsys, src, out, unseen, "--variants=x")
        assert "'nope' is not one of" in fails(capsys, src, out, "--variant=nope --model.text.heads=3")
        assert "matches no" in fails(capsys, src, out, unseen, "--fresh=nothing")
        assert "have neither an image tower" in fails(capsys, port_of({"logit_scale": np.zeros(())}), out)

        bad = {**published, "text.decoder.weight": np.zeros((3, 4), np.float32)}
        error = fails(capsys, port_of(bad), out, unseen)
        assert "'text.decoder.weight' of shape (3, 4) has no place" in error and "--ignore" in error
        assert "ignored: text.decoder.weight" in run(capsys, port_of(bad), out, unseen, r"--ignore=^text\.decoder")
        less = {k: x for k, x in published.items() if k != "visual.trunk.norm.bias"}
        error = fails(capsys, port_of(less), out, unseen)
        assert "no tensor for parameter 'image/norm/bias' of shape (24,)" in error
        assert "fresh: image/norm/bias" in run(capsys, port_of(less), out, unseen, "--fresh=^image/norm/bias$")
        fresh = weights.read(tmp_path / "o/params.safetensors")["image/norm/bias"]
        np.testing.assert_array_equal(fresh, np.zeros(24, np.float32))

    def test_a_config_names_the_model(self, tmp_path, capsys):
        published, _ = golden("clip_step_multiscan_h2")
        weights.write(tmp_path / "a.safetensors", published)
        image = dict(name="hlip", levels=("scan", "study"), depth=4, width=24, heads=2, img_size=(4, 8, 8), out_dim=16)
        image |= dict(patch=(2, 4, 4), max_num_scans=6)
        text = dict(name="bert", vocab_size=61, width=24, depth=2, heads=3, mlp_width=64, max_positions=20, out_dim=16)
        (tmp_path / "c.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"model = dict(name='two_towers', image={image}, text={text})\n"
            "def get_config(arg):\n return ConfigDict(dict(model=model))\n"
        )
        src = f"--src={tmp_path}/a.safetensors --config={tmp_path}/c.py --out={tmp_path}/o"
        assert "matched       95" in run(capsys, src)
        assert json.loads((tmp_path / "o/model.json").read_text())["model"]["image"]["levels"] == ["scan", "study"]
        error = fails(capsys, src, "--model.image.patch=2,8,8")
        assert (
            "'visual.trunk.patch_embed.proj.weight' has shape (24, 1, 2, 4, 4)" in error and "(2, 8, 8, 1, 24)" in error
        )

    def test_the_preparation_is_stored(self, tmp_path, capsys):
        published, _ = golden("clip_step_multiscan_h2")
        weights.write(tmp_path / "a.safetensors", published)
        src = f"--src={tmp_path}/a.safetensors --out={tmp_path}/o {UNSEEN['clip_step_multiscan_h2']}"
        assert "does not show how they were prepared" in run(capsys, src)
        about = json.loads((tmp_path / "o/model.json").read_text())
        assert "recipe" not in about
        run(capsys, src, "--recipe=hlip_head_ct --recipe.slices=4 --recipe.windows.brain=35,90")
        stored = json.loads((tmp_path / "o/model.json").read_text())["recipe"]
        options = [("slices", "4"), ("windows.brain", "35,90")]
        recipe = recipes.get("hlip_head_ct", options)
        assert stored == json.loads(json.dumps(recipe.describe()))
        chosen = predict_studies.choose_recipe(stored, None, (), (4, 8, 8))
        assert json.loads(json.dumps(chosen.describe())) == stored
        assert "there is no such recipe" in fails(capsys, src, "--recipe=brain")
        assert "has no such option" in fails(capsys, src, "--recipe=hlip_head_ct --recipe.slice=4")
        assert "name the recipe" in fails(capsys, src, "--recipe.slices=4")
        assert "--recipe.OPTION=VALUE" in fails(capsys, src, "--recipe=hlip_head_ct --recipe.slices")
        assert "--back takes" in fails(capsys, f"--src=x --out={tmp_path}/b.pt --back --recipe=hlip_head_ct")

    def test_the_vocabulary_comes_along(self, tmp_path, capsys):
        published, _ = golden("clip_step_multiscan_h2")
        hub, out, unseen = tmp_path / "hub", tmp_path / "o", UNSEEN["clip_step_multiscan_h2"]
        hub.mkdir()
        weights.write(hub / "model.safetensors", published)
        (hub / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(57))]))
        run(capsys, f"--src={hub} --out={out} --prefix=Seen:", unseen)
        assert json.loads((out / "model.json").read_text())["text"] == {"vocab": "vocab.txt", "prefix": "Seen:"}
        loaded = predict_model.load_model(out)
        assert loaded.text == {"vocab": str(out / "vocab.txt"), "prefix": "Seen:"}
        assert predict_prompts.tokenizer(loaded.text, None, 61).size == 61
        assert not predict_prompts.doubts(str(out), loaded.text, None)
        run(capsys, f"--src={hub}/model.safetensors --out={tmp_path}/p", unseen)
        (said,) = predict_prompts.doubts(str(tmp_path / "p"), predict_model.load_model(tmp_path / "p").text, None)
        assert "--vocab=FILE" in said
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]")
        error = fails(capsys, f"--src={hub} --out={out} --vocab={tmp_path}/vocab.txt", unseen)
        assert "has 4 entries, the text tower has 61" in error

    def test_wrong_use_is_one_line(self, tmp_path, capsys):
        assert "give either --src" in fails(capsys, f"--out={tmp_path}")
        assert "--out is missing" in fails(capsys, "--src=x")
        assert "name the file" in fails(capsys, f"--src={tmp_path} --out={tmp_path}/o")
        assert "there is no file" in fails(capsys, f"--src={FILES}/zip.pt --out={tmp_path} --config=no.py")
        assert "name the image tower" in fails(capsys, f"--init-image={FILES}/zip.pt --out={tmp_path}")
        assert "no 2D vision transformer" in fails(
            capsys, f"--init-image={FILES}/zip.pt --variant=tiny --out={tmp_path}"
        )
        assert "no BERT is in it" in fails(capsys, f"--init-text={FILES}/zip.pt --variant=tiny --out={tmp_path}")
        assert "no checkpoint in" in fails(capsys, f"--src={tmp_path} --out={tmp_path}/x.pt --back")
        weights.write(tmp_path / "params.safetensors", {"image/head/kernel": np.ones((2, 2), np.float32)})
        assert "ends in .safetensors" in fails(capsys, f"--src={tmp_path} --out={tmp_path}/x.npz --back")
        assert "ported weights already" in fails(capsys, f"--src={tmp_path} --out={tmp_path}/o")
        assert port.main(["--system=nothing", "--src=x"]) == 2 and port.main([]) == 2


class TestPublishedSizes:
    """Shapes only: an array of zero strides takes no memory."""

    def shapes(self, variant: str) -> dict[str, np.ndarray]:
        model = {"image": {"name": "hlip", "variant": variant}}
        abstract = tree.flatten(jax.eval_shape(hlip_model.init(model), jax.random.key(0)))
        return {k: np.broadcast_to(np.float32(0), x.shape) for k, x in abstract.items()}

    def test_base(self):
        flat = self.shapes("clip_vit_base_multiscan_h2_token588")
        published = hlip.to_published(tree.unflatten(flat))
        names = {k.removeprefix("visual.trunk."): x.shape for k, x in published.items()}
        assert round(sum(int(np.prod(s)) for s in names.values()) / 1e6, 2) == 89.08  # HLIP spec, section 3
        assert names["spatial_posemb"] == (1, 3, 14, 14, 768) and names["sequential_posemb"] == (1, 40, 768)
        assert names["patch_embed.proj.weight"] == (768, 1, 16, 16, 16)
        assert names["blocks.11.attn.qkv.weight"] == (2304, 768) and names["visual.head.proj.weight"] == (512, 768)
        back, fate = hlip.convert(published)
        assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in flat.items()} and not fate.unknown
        model, notes = hlip_model.make(back, {})
        assert model["image"] == {"name": "hlip", "variant": "clip_vit_base_multiscan_h2_token588"}
        assert "levels=scan,scan,study, heads=12" in notes[0]
        assert hlip_model.recipe(model)[0] is None and "hlip_head_ct" in hlip_model.recipe(model)[1]

    def test_chest_weights_know_their_preparation(self):
        model, _ = hlip_model.make(self.shapes("siglip_vit_base_singlescan_h2_token2744"), {})
        assert hlip_model.recipe(model)[0] == "hlip_chest_ct_published"

    def test_what_shapes_do_not_tell_is_asked_for(self):
        flat = self.shapes("hlip-2025-10-08")
        with pytest.raises(UserError, match=r"= hlip-2025-10-08 \(levels=scan,scan,study.*rope=False.*ablate_rope"):
            hlip_model.make(flat, {})
        model, _ = hlip_model.make(flat, {"image": {"rope": True}})
        assert model["image"]["variant"] == "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568"
        model, notes = hlip_model.make(flat, {"image": {"levels": ["scan", "study"], "heads": 6}})
        assert "rope=False, keep_token_axis=True; else give" in notes[0]
        assert model["image"]["pool"] == "dinotxt" and model["image"]["img_size"] == (48, 224, 224)
        with pytest.raises(UserError, match=r"none of the published models with heads=7: give --levels"):
            hlip_model.make(flat, {"image": {"heads": 7}})

    def test_text_towers(self):
        words = {"text/word_embeddings": (30_522, 768), "text/position_embeddings": (512, 768)}
        words |= {f"text/blocks_{i}/fc1/kernel": (768, 3072) for i in range(12)} | {"text/proj/kernel": (768, 512)}
        flat = {k: np.broadcast_to(np.float32(0), s) for k, s in words.items()}
        model, notes = hlip_model.make(flat, {})
        assert model["text"] == {"name": "bert", "variant": "bert_base", "out_dim": 512}
        assert "--text=cxr_bert" in notes[1]
        flat["text/word_embeddings"] = np.broadcast_to(np.float32(0), (28_996, 768))
        model, notes = hlip_model.make(flat, {})
        assert model["text"]["vocab_size"] == 28_996 and model["text"]["heads"] == 12 and "28996 words" in notes[0]


TINY = (
    "--variant=tiny --model.image.depth=2 --model.image.levels=scan,study --model.image.width=24 --model.image.heads=2"
)
TINY += " --model.image.img_size=9,42,30 --model.image.patch=3,6,6 --model.image.max_num_scans=4 --text=tiny"
TINY += " --model.text.vocab_size=50"


def vit(rng, mae) -> dict[str, np.ndarray]:
    """The golden's 2D encoder with two blocks."""
    shapes = {"norm1": (24,), "attn.qkv": (72, 24), "attn.proj": (24, 24), "norm2": (24,), "mlp.fc1": (96, 24)}
    shapes["mlp.fc2"] = (24, 96)
    every = {f"blocks.{i}.{k}": s for i in range(2) for k, s in shapes.items()} | {"norm": (24,)}
    tensors = {f"{k}.weight": s for k, s in every.items()} | {f"{k}.bias": s[:1] for k, s in every.items()}
    return mae | {k: rng.standard_normal(s).astype(np.float32) for k, s in tensors.items()}


def hugging_face_vit(state) -> dict[str, np.ndarray]:
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "norm": "layernorm"}
    names |= {"patch_embed.proj": "embeddings.patch_embeddings.projection"}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    inner |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {f"blocks.{i}.{k}": f"encoder.layer.{i}.{v}" for i in range(2) for k, v in inner.items()}
    out = {"decoder.mask_token": np.zeros((1, 1, 8), np.float32)}
    for k, x in state.items():
        stem, _, last = k.rpartition(".")
        if stem.endswith("qkv"):
            for part, rows in zip(("query", "key", "value"), np.split(x, 3)):
                out[f"vit.encoder.layer.{stem.split('.')[1]}.attention.attention.{part}.{last}"] = rows
        else:
            out["vit." + (names[k] if k in names else f"{names[stem]}.{last}")] = x
    return out


def bert(rng, words: int) -> dict[str, np.ndarray]:
    """As the first releases name it, with heads that a text tower does not have."""
    e = "bert.embeddings."
    shapes = {f"{e}word_embeddings.weight": (words, 64), f"{e}position_embeddings.weight": (128, 64)}
    shapes |= {f"{e}token_type_embeddings.weight": (2, 64), f"{e}LayerNorm.gamma": (64,), f"{e}LayerNorm.beta": (64,)}
    for i in range(2):
        b = f"bert.encoder.layer.{i}."
        linears = {f"attention.self.{k}": (64, 64) for k in ("query", "key", "value")}
        linears |= {"attention.output.dense": (64, 64), "intermediate.dense": (256, 64), "output.dense": (64, 256)}
        for k, s in linears.items():
            shapes |= {f"{b}{k}.weight": s, f"{b}{k}.bias": s[:1]}
        for k in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{b}{k}.gamma": (64,), f"{b}{k}.beta": (64,)}
    shapes |= {"bert.pooler.dense.weight": (64, 64), "cls.predictions.bias": (words,)}
    tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return tensors | {"bert.embeddings.position_ids": np.arange(128)[None]}


class TestStart:
    def test_from_mae_and_bert(self, tmp_path, capsys):
        rng = np.random.default_rng(0)
        _, case = golden("init_from_2d_mae")
        encoder = vit(rng, {k.removeprefix("input/mae/"): x for k, x in case.items() if k.startswith("input/mae/")})
        text = bert(rng, 50)
        weights.write(tmp_path / "mae.safetensors", {**encoder, "decoder_pred.bias": np.zeros(3, np.float32)})
        torch_files.write(tmp_path / "hf.bin", hugging_face_vit(encoder))
        weights.write(tmp_path / "bert.safetensors", text)
        torch_files.write(tmp_path / "plain.pt", {k.removeprefix("bert."): x for k, x in text.items()})
        starts = (("mae.safetensors", "bert.safetensors"), ("hf.bin", "plain.pt"))
        for i, (image, words) in enumerate(starts):
            files = f"--init-image={tmp_path}/{image} --init-text={tmp_path}/{words}"
            printed = run(capsys, files, TINY, f"--out={tmp_path}/{i}")
        assert "fresh: image/head/kernel, image/sequential_posemb, logit_scale, text/proj/kernel" in printed
        assert "CC-BY-NC" in printed
        ours, again = (weights.read(tmp_path / f"{i}/params.safetensors") for i in range(2))
        command.same(ours, again)
        expected = {k.removeprefix("output/resized/"): x for k, x in case.items() if k.startswith("output/resized/")}
        state = hlip.to_published(tree.unflatten(ours))
        for k in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "spatial_posemb"):
            np.testing.assert_allclose(state[f"visual.trunk.{k}"], expected[k], rtol=5e-6, atol=5e-6)
        for k in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.bias", "norm.weight"):
            np.testing.assert_array_equal(state[f"visual.trunk.{k}"], encoder[k])
        layer = "encoder.layer.1.output.LayerNorm."
        np.testing.assert_array_equal(state[f"text.transformer.{layer}weight"], text[f"bert.{layer}gamma"])
        assert 0 < np.abs(ours["text/proj/kernel"]).max() <= 64**-0.5
        assert ours["logit_scale"] == np.float32(np.log(1 / 0.07))

        files = f"--init-image={tmp_path}/mae.safetensors --init-text={tmp_path}/bert.safetensors --out={tmp_path}/x"
        error = fails(capsys, files, TINY.replace("vocab_size=50", "vocab_size=60"))
        assert "its BERT has 50 words, the text tower has 60" in error
        error = fails(capsys, files, TINY.replace("depth=2", "depth=4"))
        assert "it has nothing for parameter 'image/blocks_2/attn/proj/bias'" in error
        error = fails(capsys, files, TINY.replace("image.width=24", "image.width=48"))
        assert "has shape (24," in error and "(48,)" in error


def made(seed=0):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    rng = np.random.default_rng(seed)
    tensors = {"image": {"kernel": (8, 3)}, "text": {"kernel": (16,)}, "head": {"kernel": (8, 2)}}
    return jax.tree.map(
        lambda s: jax.device_put(jnp.asarray(rng.standard_normal(s), jnp.float32), rows),
        tensors,
        is_leaf=lambda s: isinstance(s, tuple),
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A workdir, a ported folder and its file with the same weights."""
    root = tmp_path_factory.mktemp("sources")
    params = made(1)
    with checkpoint.Checkpoints(root / "run/checkpoints") as c:
        c.save(3, {"params": params, "opt": {"m": params}, "step": jnp.int32(3)}, {"a": 1})
    (root / "ported").mkdir()
    weights.write(root / "ported/params.safetensors", {k: np.asarray(x) for k, x in tree.flatten(params).items()})
    return [root / "run", root / "run/checkpoints/3", root / "ported", root / "ported/params.safetensors"]


class TestInitFrom:
    def test_all_of_it_or_what_is_not_left(self, sources):
        other, mine = made(1), made(2)
        for source in sources:
            got, left = checkpoint.start_from(source, mine)
            assert left == [] and tree.params_sha256(got) == tree.params_sha256(other)
            assert got["image"]["kernel"].sharding == mine["image"]["kernel"].sharding
            smaller = {k: v for k, v in mine.items() if k != "text"} | {"head": {"kernel": jnp.ones((8, 5))}}
            got, left = checkpoint.start_from(source, smaller, leave=("^head/", "^text/"))
            assert left == ["head/kernel"] and "text" not in got
            np.testing.assert_array_equal(got["head"]["kernel"], np.ones((8, 5), np.float32))
            np.testing.assert_array_equal(got["image"]["kernel"], other["image"]["kernel"])
        command.same({k: np.asarray(x) for k, x in tree.flatten(other).items()}, checkpoint.load_params(sources[0]))

    def test_strict_otherwise(self, sources):
        mine = made(2)
        smaller = {k: v for k, v in mine.items() if k != "text"}
        for source in sources:
            with pytest.raises(UserError, match=r"model has no parameter 'text/kernel'.*config\.init_except"):
                checkpoint.start_from(source, smaller)
            with pytest.raises(UserError, match="has no parameter 'neck/kernel'"):
                checkpoint.start_from(source, mine | {"neck": {"kernel": mine["text"]["kernel"]}})
            with pytest.raises(UserError, match=r"'head/kernel' has shape \(8, 2\), the model wants \(16,\)"):
                checkpoint.start_from(source, mine | {"head": mine["text"]})
            with pytest.raises(UserError, match=r"config\.init_except: 'hed' matches no parameter"):
                checkpoint.start_from(source, mine, leave=("hed",))

    def test_published_names_are_explained(self, tmp_path):
        weights.write(tmp_path / "w.safetensors", {"visual.trunk.norm.bias": np.ones(2, np.float32)})
        with pytest.raises(UserError, match=r"published weights go through python -m jaxmed\.port first"):
            checkpoint.start_from(tmp_path / "w.safetensors", made())
