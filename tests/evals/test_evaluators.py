"""Evaluators: exact values from features that are known, padding rows left out, chance and baselines."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.core import sharding
from jaxmed.core.errors import UserError
from jaxmed.data import shards
from jaxmed.data.tokenize import Tokenizer
from jaxmed.evals import baselines, examples, features, prompts, retrieval, scores, zeroshot

CLASSES = ("bright", "dark", "striped")
STUDIES = 13  # no multiple of the batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """13 + 24 studies of three classes; the first voxel of a study is its class, the second its number."""
    dir = tmp_path_factory.mktemp("evals") / "data"
    rng = np.random.default_rng(0)
    with shards.ShardWriter(dir, 0) as writer:
        for i in range(STUDIES + 24):
            kind = i % 3
            scans = []
            for _ in range(1 + i % 2):
                x = rng.integers(100, 140, (4, 8, 8)).astype(np.uint8)
                x[0, 0, :2] = kind, i
                scans.append({"voxels": x, "affine": np.eye(4), "name": "t1w", "meta": {"size": 10.0 * kind}})
            scans[0]["meta"]["mask_runs"] = [64, 3, 189]
            writer.add(
                {
                    "key": f"k{i}",
                    "scans": scans,
                    # The last two test studies have the report of the first one.
                    "sentences": [f"word {CLASSES[kind]} number {i if i not in (11, 12) else 0}."],
                    "labels": {c: float(j == kind) for j, c in enumerate(CLASSES)},
                    "split": "test" if i < STUDIES else "train",
                }
            )
    shards.finish(dir, "toy", {"value_range": [0, 255]}, CLASSES)
    return dir


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def oracle(dataset, noise=0.0, tokens=0):
    """Predict functions whose image features are those of the study's class (and number), with optional noise."""
    tokenizer = Tokenizer()
    words = np.array([tokenizer.ids(c)[1] for c in CLASSES])

    def embed_image(state, batch):
        kind = batch["image"][:, 0, 0, 0, 0].astype(jnp.int32)
        number = batch["image"][:, 0, 0, 0, 1].astype(jnp.int32)
        z = jnp.concatenate([jax.nn.one_hot(kind, 3), 0.5 * jax.nn.one_hot(number % 11, 13)], axis=1)
        z = z + noise * jax.random.normal(jax.random.key(state["step"]), z.shape)
        z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        out = {"image": z, "scale": jnp.float32(10.0)}
        if tokens:  # the last token is the good one
            out = {"image": jnp.stack([jnp.ones_like(z), z], axis=1), "scale": jnp.float32(1.0)}
            out["scale_report"] = jnp.float32(10.0)
        return out

    numbers = np.array([tokenizer.ids(str(i))[1] for i in range(13)])

    def embed_text(state, batch):
        del state
        ids = batch["text"]
        kind = (ids[:, :, None] == words[None, None]).any(1)
        number = (ids[:, :, None] == numbers[None, None]).any(1)
        z = jnp.concatenate([kind.astype(jnp.float32), 0.5 * number.astype(jnp.float32)], axis=1)
        return {"text": z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-6)}

    return {"embed_image": jax.jit(embed_image), "embed_text": jax.jit(embed_text)}


def split(dataset, **more):
    return dict(dir=str(dataset), split="test", batch_size=8, buckets=dict(scans=(1, 2), depth=(4,)), **more)


STATE = {"step": 7}


class TestZeroshot:
    @pytest.mark.parametrize("score", prompts.SCORES)
    def test_oracle_is_perfect_and_writes_its_scores(self, dataset, mesh, tmp_path, score):
        classes = {c: [f"{c} word", c] for c in CLASSES}
        negatives = {c: "nothing" for c in CLASSES} if score == "pair" else None
        evaluator = zeroshot.Evaluator(
            oracle(dataset), mesh=mesh, outdir=tmp_path, input=split(dataset), classes=classes, negatives=negatives,
            templates=("a {}", "{}"), score=score, bootstrap=20, examples=6,
        )  # fmt: skip
        values = dict(evaluator.run(STATE))
        assert values["studies"] == STUDIES
        assert values["auc_macro"] == values["auc_macro_low"] == values["auc_macro_high"] == 1.0
        assert {f"auc/{c}" for c in CLASSES} <= set(values)
        with np.load(tmp_path / "step-00000007.npz") as saved:
            assert sorted(saved["ids"].tolist()) == list(range(STUDIES))
            assert scores.macro_auc(saved["labels"], saved["scores"]) == 1.0
            assert saved["classes"].tolist() == list(CLASSES)
        with np.load(tmp_path / examples.NAME) as saved:
            about = json.loads(str(saved["about"]))
            assert len(about["studies"]) == 6 and saved["image/0/0"].shape == (3, 8, 8)
            assert saved["mask/0/0"].sum() == 3

    def test_noise_is_between_and_the_token_can_be_chosen(self, dataset, mesh):
        classes = {c: c for c in CLASSES}
        good = zeroshot.Evaluator(oracle(dataset, tokens=2), mesh=mesh, input=split(dataset), classes=classes, token=1)
        bad = zeroshot.Evaluator(oracle(dataset, tokens=2), mesh=mesh, input=split(dataset), classes=classes, token=0)
        noisy = zeroshot.Evaluator(oracle(dataset, noise=0.7), mesh=mesh, input=split(dataset), classes=classes)
        assert dict(good.run(STATE))["auc_macro"] == 1.0
        assert dict(bad.run(STATE))["auc_macro"] == 0.5
        values = dict(noisy.run(STATE))
        assert values["auc_macro_low"] < values["auc_macro"] < 1.0

    def test_refuses(self, dataset, mesh):
        classes = {c: c for c in CLASSES}
        for options, message in (
            (dict(classes={"bald": "x", "dark": "y"}), "bald"),
            (dict(classes=classes, score="guess"), "guess"),
            (dict(classes=classes, score="pair"), "negative"),
            (dict(classes=classes, templates=("no place",)), "no place"),
        ):
            with pytest.raises(UserError, match=message):
                zeroshot.Evaluator(oracle(dataset), mesh=mesh, input=split(dataset), **options)


class TestRetrieval:
    def test_same_report_is_one_target(self, dataset, mesh, tmp_path):
        evaluator = retrieval.Evaluator(
            oracle(dataset), mesh=mesh, outdir=tmp_path, input=split(dataset, context=16), examples=3
        )
        values = dict(evaluator.run(STATE))
        assert (values["studies"], values["reports"]) == (13, 12)  # studies 0 and 12 have one report
        assert values["image_to_text_R@1"] >= 12 / 13  # study 12 looks like number 1
        assert values["image_to_text_R@5_chance"] == pytest.approx(5 / 12)
        over = values["image_to_text_R@5"] / values["image_to_text_R@5_chance"]
        assert values["image_to_text_R@5_over_chance"] == pytest.approx(over)
        found = json.loads((tmp_path / "step-00000007.json").read_text())
        assert found["reports"] == 12 and len(found["queries"]) == 3
        assert found["queries"][0]["found"][0]["report"] == found["queries"][0]["report"]

    def test_chance_of_any_is_the_exact_probability(self):
        for n, right, k in ((6, 1, 2), (6, 3, 2), (5, 4, 2), (4, 4, 1)):
            draws = list(itertools.combinations(range(n), k))
            exact = sum(min(d) < right for d in draws) / len(draws)
            assert retrieval.chance_of_any(n, [right], k) == pytest.approx(exact)

    def test_equal_reports(self, tmp_path, mesh):
        """Four studies, two reports: a model that knows the report finds it at rank one."""
        with shards.ShardWriter(tmp_path, 0) as writer:
            for i in range(8):
                x = np.full((2, 8, 8), i % 2, np.uint8)
                scan = {"voxels": x, "affine": np.eye(4), "name": "x", "meta": {}}
                writer.add({"key": f"{i}", "scans": [scan], "sentences": [CLASSES[i % 2]], "split": "test"})
        shards.finish(tmp_path, "twins", {"value_range": [0, 255]})
        values = dict(
            retrieval.Evaluator(
                oracle(tmp_path), mesh=mesh, input=split(tmp_path) | {"buckets": dict(scans=(1,), depth=(2,))}
            ).run(STATE)
        )
        assert (values["studies"], values["reports"]) == (8, 2)
        assert values["image_to_text_R@1"] == values["text_to_image_R@1"] == 1.0
        assert values["image_to_text_R@5_chance"] == 1.0
        assert values["text_to_image_R@1_chance"] == pytest.approx(0.5)


class TestBaselines:
    def test_finds_what_histogram_and_metadata_give_away(self, tmp_path, mesh):
        rng = np.random.default_rng(0)
        with shards.ShardWriter(tmp_path, 0) as writer:
            for i in range(60):
                bright, deep = rng.random(2) < 0.5
                x = rng.integers(0, 100, (3 + deep, 8, 8)).astype(np.uint8) + np.uint8(80 * bright)
                scan = {"voxels": x, "affine": np.eye(4), "name": "x", "meta": {"size": 1.0 + bright}}
                labels = {"bright": float(bright), "deep": float(deep)}
                writer.add({"key": f"{i}", "scans": [scan], "labels": labels, "split": ("train", "test")[i % 2]})
        shards.finish(tmp_path, "leaky", {"value_range": [0, 255]}, ("bright", "deep"))
        out = tmp_path / "out"
        evaluator = baselines.Evaluator({}, mesh=mesh, outdir=out, input={"dir": tmp_path})
        values = dict(evaluator.run(STATE))
        assert (values["fitted"], values["studies"]) == (30, 30)
        assert dict(evaluator.run(STATE)) == values
        written = json.loads((out / "baselines.json").read_text())
        assert written["auc"]["histogram"]["bright"] == 1.0 and written["auc"]["metadata"]["deep"] == 1.0
        assert written["auc"]["histogram"]["deep"] < 0.9 and written["auc"]["metadata"]["bright"] < 0.9
        assert written["meta"]["bright"]["size"] == [2.0, 2.0, 2.0]
        with pytest.raises(UserError, match="dull"):
            baselines.Evaluator({}, mesh=mesh, input={"dir": tmp_path}, classes=("dull",))

    def test_histogram_of_other_dtypes(self):
        x = np.linspace(-1000, 1000, 64).reshape(4, 4, 4).astype(np.int16)
        h = baselines.histogram({"scans": [{"voxels": x}]}, 4, (-1000, 1000))
        np.testing.assert_allclose(h, 0.25)


def test_texts_do_not_depend_on_the_batch(dataset, mesh):
    ids = np.random.default_rng(0).integers(1, 30000, (19, 8)).astype(np.int32)
    a, b = (features.embed_ids(oracle(dataset), mesh, STATE, ids, n) for n in (8, 64))
    assert a.shape == (19, 16)
    np.testing.assert_array_equal(a, b)
