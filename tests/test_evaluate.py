"""The command: what it measures, what it caches, and that the labels it reports on choose nothing."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmed import evaluate, evaluate_tasks, predict_model, predict_prompts
from jaxmed.core import tree
from jaxmed.core.errors import UserError
from jaxmed.data import shards
from jaxmed.evals import classification, features, retrieval, scores, suites
from tests.test_predict import config_of

LESIONS = ("bright", "left")
BRAIN = tuple(suites.get("pub_brain_5").classes)
CHEST = tuple(suites.get("ct_rate").classes)
COUNTS = {"train": 32, "val": 16, "test": 24}


def write(dir, seed=0):
    """Studies of 1-2 scans, two per patient: bright ones, and ones with something on the left; five classes of which
    one is right; findings at random, some unknown."""
    rng = np.random.default_rng(seed)
    number = 0
    with shards.ShardWriter(dir, 0) as writer:
        for split, count in COUNTS.items():
            for i in range(count):
                bright, left = rng.integers(0, 2, 2)
                scans = []
                for _ in range(1 + i % 2):
                    x = rng.integers(0, 90, (8, 32, 32)).astype(np.uint8) + np.uint8(120 * bright)
                    x[:, :, :16] += np.uint8(45 * left)
                    scans.append({"voxels": x, "affine": np.eye(4), "name": "t1w", "meta": {}})
                labels = {"bright": float(bright), "left": float(left), "never": 0.0}
                labels |= {c: float(j == i % 5) for j, c in enumerate(BRAIN)}
                labels |= {c: float(rng.integers(0, 2)) for c in CHEST if rng.uniform() < 0.8}
                text = f"{'bright' if bright else 'dark'} study number {i % 12}."
                study = {"key": f"k{seed}{number:03d}", "patient": f"{split}{i // 2}", "scans": scans, "labels": labels}
                writer.add({**study, "sentences": [text] if i else [], "split": split})
                number += 1
    shards.finish(dir, "toy", {"name": "hlip_brain_mri", "value_range": [0, 255]})
    return dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


def port(folder, seed=0, loss="clip", **image):
    """Random weights, as python -m jaxmed.port leaves them."""
    folder.mkdir(exist_ok=True)
    config = config_of(loss, **image) | {"recipe": "hlip_brain_mri"}
    rng = np.random.default_rng(seed)
    _, _, shapes = predict_model._build(config, None, None, "test")
    params = {k: rng.normal(0, 0.2, x.shape) for k, x in tree.flatten(shapes).items()}
    (folder / "model.json").write_text(json.dumps(config))
    save_file({k: np.asarray(x, np.float32) for k, x in params.items()}, folder / "params.safetensors")
    return folder


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return port(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all tests: only the first of them looks at images."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ask(ckpt, data, cache, tmp_path):
    def call(task, **options):
        given = dict(ckpt=str(ckpt), data=str(data), cache=str(cache), out=tmp_path / "out", bootstrap=50)
        return evaluate.evaluate(task=task, **{**given, **options})

    return call


PROMPTS = {"classes": {"bright": "bright study", "left": "left side"}, "negatives": {"bright": "dark", "left": "right"}}


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return str(path)


def test_the_command(ckpt, data, cache, asked, tmp_path, capsys, monkeypatch):
    """Table, files; a second call with other prompts reads no image; other weights and other data do."""
    out, looked = tmp_path / "out", []
    real = features.embed_tokens
    monkeypatch.setattr(features, "embed_tokens", lambda *a, **k: (looked.append(1), real(*a, **k))[1])

    def run(*more, ckpt=ckpt, data=data, out=out):
        flags = [f"--ckpt={ckpt}", f"--data={data}", f"--out={out}", f"--cache={cache}", "--bootstrap=40"]
        code = evaluate.main(["--task=zeroshot", *flags, *more])
        assert code == 0, capsys.readouterr().err
        return json.loads((out / "results.json").read_text()), capsys.readouterr().out

    results, printed = run(f"--prompts={asked}")
    assert len(looked) == 1 and results["features"]["computed"] == ["images of test"]
    assert results["kind"] == "multi-label" and results["thresholds"] == "fixed: 0.5"
    assert results["studies"] == 24 and results["patients"] == 12
    assert "bright" in printed and "95 % intervals over patients" in printed and "calibration: ece" in printed
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert [r["key"] for r in rows] == [f"k0{i:03d}" for i in range(48, 72)] and rows[0]["patient"] == "test0"
    for name in LESIONS:
        y, v = (np.array([float(r[f"{kind}/{name}"]) for r in rows]) for kind in ("label", "score"))
        found = results["metrics"]["classes"][name]["auc"]
        assert found["value"] == pytest.approx(scores.auc(y, v)) and found["low"] <= found["value"] <= found["high"]
        assert results["metrics"]["classes"][name]["recall"]["value"] == pytest.approx((v[y == 1] > 0.5).mean())

    again, _ = run("--suite=ct_rate")
    assert len(looked) == 1 and again["features"] == {"computed": [], "reused": ["images of test"]}
    assert len(again["metrics"]["classes"]) == 16 and "another" not in str(again["notes"])
    assert "of suite ct_rate with 'hlip_chest_ct_published'" in again["notes"][0]
    assert again["metrics"]["classes"]["Emphysema"]["studies"] < 24  # unknown labels do not count
    assert not any("searched" in key for key in json.dumps(again).split('"'))

    other, _ = run(f"--prompts={asked}", ckpt=port(tmp_path / "other", seed=1))
    assert len(looked) == 2 and other["params_sha256"] != results["params_sha256"]
    changed, _ = run(f"--prompts={asked}", data=write(tmp_path / "changed", seed=1))
    assert len(looked) == 3 and changed["data"]["fingerprint"] != results["data"]["fingerprint"]
    (cache / "x").touch()
    repeated, _ = run(f"--prompts={asked}", out=tmp_path / "new")
    assert len(looked) == 3 and repeated["metrics"] == results["metrics"]


def test_published_protocols_say_so(ask):
    chest = ask("zeroshot", suite="ct_rate", protocol="published")
    published = chest["published"]
    assert "searched on the test labels" in published["protocol"] and chest["thresholds"] == "fixed: 0.5"
    assert "searched on the test labels" in evaluate.show(chest)
    at, searched = (published[k]["macro"] for k in ("at_argmax", "at_thresholds_searched_on_test_labels"))
    assert at["balanced_accuracy"] == pytest.approx(chest["metrics"]["macro"]["balanced_accuracy"]["value"])
    assert searched["accuracy"] != at["accuracy"] and searched["auc"] == at["auc"]

    brain = ask("zeroshot", suite="pub_brain_5")
    assert brain["kind"] == "multi-class" and "published" not in brain
    assert brain["tasks"]["auc (pubbrain5_disease)"] == pytest.approx(brain["metrics"]["macro"]["auc"]["value"])
    disease = brain["tasks"]["balanced_acc (pubbrain5_disease)"]
    assert disease == pytest.approx(brain["metrics"]["macro"]["balanced_accuracy"]["value"])
    assert ask("zeroshot", suite="pub_brain_5", classes=("glioma", "stroke"))["kind"] == "multi-label"
    with pytest.raises(UserError, match="needs --suite, without --classes"):
        ask("zeroshot", suite="ct_rate", protocol="published", classes=("Emphysema",))


def test_test_labels_choose_no_threshold(ask, asked, monkeypatch):
    options = dict(prompts=asked, threshold_split="val", calibrate_split="val")
    first = ask("zeroshot", **options)
    assert first["thresholds"] == "split val" and first["calibration_after"]["fitted_on"] == "split val"
    at = {c: m["threshold"] for c, m in first["metrics"]["classes"].items()}
    assert 0.5 not in at.values()

    real = evaluate_tasks.Labelled.of

    def permuted(self, ids, split):
        labels = real(self, ids, split)
        return np.random.default_rng(1).permutation(labels) if split == "test" else labels

    monkeypatch.setattr(evaluate_tasks.Labelled, "of", permuted)
    second = ask("zeroshot", **options)
    assert {c: m["threshold"] for c, m in second["metrics"]["classes"].items()} == at
    assert second["calibration_after"]["temperature"] == first["calibration_after"]["temperature"]
    assert second["metrics"] != first["metrics"]


def test_probe_and_neighbours(ask, tmp_path):
    found = ask("probe", classes=LESIONS, shots=(1, 4), seeds=3)
    assert found["metrics"]["classes"]["bright"]["auc"]["value"] > 0.95
    assert set(found["strengths"]) == set(LESIONS) and found["train_studies"] == 32
    assert found["few_shot"]["4"]["auc"]["mean"] > 0.6 and len(found["few_shot"]["1"]["auc"]["seeds"]) == 3
    assert "4 per class: auc" in evaluate.show(found)
    assert ask("probe", suite="pub_brain_5")["kind"] == "multi-class"  # noise, but it runs
    votes = ask("knn", classes=("bright",), k=(5, 3))
    assert votes["by_k"]["5"] == votes["metrics"]["macro"] and votes["by_k"]["3"]["auc"]["value"] > 0.9
    with_missing = ask("knn", suite="ct_rate", k=(3,))
    assert with_missing["kind"] == "multi-label" and 0 < with_missing["metrics"]["macro"]["auc"]["value"] < 1


def test_retrieval(ask, tmp_path):
    found = ask("retrieval")
    assert found["studies"] == 23 and found["without_report"] == 1
    values = found["metrics"]["macro"]
    assert values["image_to_text_R@5"]["low"] <= values["image_to_text_R@5"]["value"]
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    ranks = np.array([int(r["rank/image_to_text"]) for r in rows])
    assert values["image_to_text_mean_rank"]["value"] == pytest.approx(ranks.mean())
    assert values["image_to_text_R@5"]["value"] == pytest.approx((ranks <= 5).mean())
    reports = len({r["report"] for r in rows})
    assert values["reports"]["value"] == reports < 23
    assert values["image_to_text_R@1_chance"]["value"] == pytest.approx(1 / reports)
    assert set(retrieval.AT) == {1, 5, 10}


def test_two_tokens(data, cache, asked, tmp_path):
    """The embeddings of all tokens are kept, so another token needs no image; the loss says which is compared."""
    weights = port(tmp_path / "dual", loss="dual", pool="dinotxt", reg_tokens=1, keep_token_axis=True)
    about = dict(ckpt=str(weights), data=str(data), cache=str(cache), out=tmp_path / "out", bootstrap=0, prompts=asked)
    first = evaluate.evaluate(task="zeroshot", **about)
    second = evaluate.evaluate(task="zeroshot", **about, token=-1)
    assert (first["token"], second["token"]) == (0, -1)
    assert first["features"]["computed"] == second["features"]["reused"] == ["images of test"]
    assert first["metrics"] != second["metrics"]


def test_suites_reach_predict():
    asked = predict_prompts.find(None, "pub_brain_5", None)
    assert asked.names == BRAIN
    with pytest.raises(UserError, match="not both"):
        predict_prompts.find("x.json", "pub_brain_5", None)
    with pytest.raises(UserError, match="there is no suite 'x'"):
        predict_prompts.find(None, "x", None)


def test_lists_and_manifests(tmp_path, capsys):
    assert evaluate.main(["suites"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(suites.SUITES)
    assert evaluate.main(["suites", "rad_chest_ct"]) == 0
    shown = capsys.readouterr().out
    assert "become Calcification" in shown and "The volume shows: Not atelectatic." in shown and "jaxmed.prep" in shown
    table, out = tmp_path / "t.csv", tmp_path / "labels.csv"
    table.write_text("path,class\na,glioma\nb,normal\n")
    assert evaluate.main(["labels", str(table), "--suite=pub_brain_5", f"--out={out}", "--split=val"]) == 0
    assert f"--manifest={out}" in capsys.readouterr().out
    assert out.read_text().splitlines()[1].startswith("a,0,0,1,0,0")


def test_errors_are_one_line(ask, asked, data, tmp_path, capsys):
    def error(task="zeroshot", **options):
        with pytest.raises(UserError) as e:
            ask(task, **options)
        return str(e.value)

    assert "there is no suite 'ct_rat'; did you mean 'ct_rate'" in error(suite="ct_rat")
    assert "toy has no label 'ICH', 'IPH'" in error(suite="cq500")
    assert "--prompts is missing" in error()
    assert "--task=segment: choose one of" in error("segment")
    assert "--protocol=best: choose one of" in error(suite="ct_rate", protocol="best")
    assert "--k does not go with --task=zeroshot" in error(suite="ct_rate", k=(3,))
    assert "class 'never': 0 training studies have it" in error("probe", classes=("bright", "never"))
    assert "'never' there are the same" in error("knn", classes=("never", "left"), k=(3,), threshold_split="val")
    assert "none of the classes never has studies with and without it" in error("knn", classes=("never",), k=(3,))
    assert "the split that is reported on" in error("probe", train_split="test")
    assert "the split that is reported on" in error(prompts=asked, threshold_split="test")
    assert "no such split; it has" in error(prompts=asked, split="holdout")
    assert "exclude each other" in error(suite="pub_brain_5", threshold_split="val")
    assert "only 32 training studies have a label" in error("knn", classes=("left",), k=(99,))
    assert "give numbers of 1 or more" in error("knn", k=(0,))
    assert not (tmp_path / "out" / "results.json").exists()
    assert evaluate.main([f"--data={data}", "--task=probe", "--out=x"]) == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required: --ckpt")
    assert classification.exclusive(np.array([[1.0, 0], [0, 1]]))
    assert not classification.exclusive(np.array([[1.0, np.nan], [0, 1]]))
