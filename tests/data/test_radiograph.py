"""Images of every size through the pipeline, in all plan modes."""

import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.core.rng import np_rng
from jaxmed.data import pipeline
from jaxmed.data.plan import PAD
from tests.data import studies
from tests.data.studies import write
from tests.data.test_pipeline import FakeSharding, assert_equal, take

P = 4
IDENTITY = {"range": (0, 65535), "percentiles": (0.0, 65535.0)}
COST = {"width": 8, "depth": 1, "mlp_width": 8, "decoder_width": 8, "decoder_depth": 1, "decoder_mlp_width": 8}
WAYS = {
    "length": dict(mode="length", budget=480, plan_options={"lengths": 4, "multiple": 8, "cost": COST}),
    "dbb": dict(mode="dbb", batch_size=4, buckets={"height": (13, 24, 40), "width": (16, 30, 44)}),
    "blocks": dict(mode="pack", budget=480, buckets={"tokens": (120,)}),
    "rebucket": dict(
        mode="pack", budget=480, plan_options={"attention": "rebucket", "lengths": 3, "multiple": 8, "cost": COST}
    ),
}


def radiograph(i, **fields):
    rng = np_rng(11, i)
    height, width = (int(n) for n in rng.integers(1, 41, 2))
    voxels = rng.integers(1, 65536, (1, height, width)).astype(np.uint16)
    scan = {"voxels": voxels, "affine": np.eye(4), "name": "cr", "meta": IDENTITY}
    labels = {"left": float(i % 2)} | ({"hand": 1.0} if i % 3 == 0 else {})
    study = {"key": f"image{i:03d}", "patient": f"p{i:03d}", "scans": [scan], "sentences": [], "labels": labels}
    return {**study, "split": "val" if i % 8 == 7 else "train", **fields}


@pytest.fixture(scope="module")
def dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images") / "tiny", map(radiograph, range(90)), per_shard=30)


def make(dir, way, **options):
    defaults = {"dir": str(dir), "split": "train", "collate": "radiograph", "patch": P, "seed": 3, "multiple_of": 2}
    defaults["keys"] = ("patch", "label")
    return pipeline.make(**defaults | WAYS[way] | options)


def slow_patches(image, high, wide):
    """Patch by patch."""
    padded = np.zeros((high * P, wide * P), np.uint16)
    padded[: image.shape[0], : image.shape[1]] = image
    return np.stack([padded[r * P : r * P + P, c * P : c * P + P].ravel() for r in range(high) for c in range(wide)])


@pytest.mark.parametrize("way", WAYS)
def test_every_image_once_patch_by_patch(dir, way):
    options = {"keys": ("patch", "where", "label")} if way == "rebucket" else {}
    stream = make(dir, way, **options)
    for start in (0, stream.steps_per_epoch):
        seen = []
        for bucket, batch in take(stream, start, start + stream.steps_per_epoch):
            sizes, n = dict(bucket), batch["patch"].shape[1]
            for key, spec in stream.spec[bucket].items():
                assert batch[key].shape == spec.shape and batch[key].dtype == spec.dtype
            assert batch["patch"].dtype == np.uint16 and len(batch["patch"]) % 2 == 0
            assert n == sizes["tokens"] if way != "dbb" else n == -(-sizes["height"] // P) * -(-sizes["width"] // P)
            rows = len(batch["patch"])
            ids, grids, labels = (
                batch[k].reshape(rows, -1, *tail) for k, tail in [("_id", ()), ("grid", (2,)), ("label", (2,))]
            )
            np.testing.assert_array_equal(batch["_mask"], (ids != PAD).any(1))
            for row in range(rows):
                at = 0
                for k, i in enumerate(ids[row].tolist()):
                    if i == PAD:
                        assert not grids[row, k].any() and np.isnan(labels[row, k]).all()
                        continue
                    seen.append(i)
                    image = radiograph(i)["scans"][0]["voxels"][0]
                    high, wide = -(-image.shape[0] // P), -(-image.shape[1] // P)
                    if way == "dbb":  # padding of the bin counts as image
                        high, wide = -(-sizes["height"] // P), -(-sizes["width"] // P)
                    assert grids[row, k].tolist() == [high, wide]
                    got = batch["patch"][row, at : at + high * wide]
                    np.testing.assert_array_equal(got, slow_patches(image, high, wide))
                    np.testing.assert_array_equal(labels[row, k], [1.0 if i % 3 == 0 else np.nan, i % 2])
                    if "where" in batch:
                        where = batch["where"][row, k]
                        assert where.tolist() == [*range(at, at + high * wide), *[n] * (len(where) - high * wide)]
                    at += high * wide
                assert not batch["patch"][row, at:].any(), "padding is zero"
        assert sorted(seen) == [i for i in range(90) if i % 8 != 7]
    most = {"length": 4, "dbb": 18, "blocks": 1, "rebucket": 3}
    assert len(stream.spec) <= most[way], "nothing else is ever compiled"


@pytest.mark.parametrize("way", WAYS)
def test_padding_is_counted(dir, way):
    stream = make(dir, way)
    used = total = 0
    for k, (_, batch) in enumerate(take(stream, 0, stream.steps_per_epoch)):
        wasted = stream.padding(k)
        images = [radiograph(int(i))["scans"][0]["voxels"].shape[1:] for i in batch["_id"].ravel() if i != PAD]
        real = sum(-(-h // P) * -(-w // P) for h, w in images)
        size = batch["patch"].shape[0] * batch["patch"].shape[1]
        assert wasted["tokens"] == size and wasted["tokens_wasted"] == pytest.approx(1 - real / size)
        assert wasted["rows_wasted"] == pytest.approx(1 - batch["_mask"].mean())
        assert wasted["records"] == len(images) == len(stream.records(k))
        used, total = used + real, total + size
    assert stream.padding_report()["tokens_wasted"] == pytest.approx(1 - used / total)


@pytest.mark.parametrize("way", WAYS)
def test_same_batches_for_threads_processes_and_restarts(dir, way):
    stream = make(dir, way)
    whole = take(stream, 0, stream.steps_per_epoch + 3)
    for options in ({"threads": 1}, {"threads": 4, "prefetch": 0}):
        assert_equal(take(make(dir, way, **options), 0, len(whole)), whole)
    for start in (1, len(whole) - 2):
        assert_equal(take(make(dir, way), start, len(whole)), whole[start:])
    halves = [take(make(dir, way, sharding=FakeSharding(p, 2)), 0, len(whole)) for p in (0, 1)]
    assert_equal(halves[0], whole)  # two shards over four devices: both processes hold all rows
    four = dict(multiple_of=4) if way != "rebucket" else dict(multiple_of=4, budget=800)
    whole = take(make(dir, way, **four), 0, 6)
    halves = [take(make(dir, way, sharding=FakeSharding(p, 4), **four), 0, 6) for p in (0, 1)]
    joined = [(b, {k: np.concatenate([x[k], y[k]]) for k in x}) for (b, x), (_, y) in zip(*halves)]
    assert_equal(joined, whole)


@pytest.mark.parametrize("way", ["length", "rebucket"])
def test_same_batches_from_worker_processes(dir, way):
    whole = take(make(dir, way), 0, 5)
    assert_equal(take(make(dir, way, workers=1), 2, 5), whole[2:])


def test_the_hash_sees_what_decides_a_batch(dir):
    def digest(way="length", **options):
        return make(dir, way, **options).plan_hash

    options = WAYS["length"]["plan_options"]
    changes = [
        {"patch": 5}, {"intensity": "reference"}, {"keys": ("patch",)}, {"classes": ("left",)}, {"seed": 4},
        {"budget": 960}, {"way": "blocks"}, {"way": "dbb"}, {"plan_options": {**options, "lengths": 3}},
        {"plan_options": {**options, "cost": {**COST, "depth": 2}}},
    ]  # fmt: skip
    assert digest() == digest(threads=3)
    assert len({digest(), *(digest(**change) for change in changes)}) == len(changes) + 1


def test_each_image_is_read_once_per_step_and_labels_alone_read_none(dir):
    stream = make(dir, "blocks", source="tests.data.studies", prefetch=0)
    studies.READ.clear()
    [(_, batch)] = take(stream, 0, 1)
    assert sorted(studies.READ) == sorted(batch["_id"][batch["_id"] != PAD].tolist())
    studies.READ.clear()
    stream = make(dir, "length", source="tests.data.studies", keys=("label",))
    assert set(take(stream, 0, 1)[0][1]) == {"label", "_mask", "_id"} and not studies.READ


def test_intensities_are_those_of_the_image(tmp_path):
    def image(i, meta, dtype=np.uint16):
        scan = {"voxels": np.array([[[10, 20, 30]]], dtype), "affine": np.eye(4), "name": "x", "meta": meta}
        return {"key": f"k{i}", "scans": [scan], "sentences": [], "labels": {}, "split": "train"}

    shown = {"range": (10, 30), "windows": [(20.5, 21)]}
    dir = write(tmp_path, [image(0, shown), image(1, {**shown, "photometric": "MONOCHROME1"})])
    how = dict(keys=("patch",), train=False, multiple_of=1, mode="length", budget=99)
    [(_, batch)] = take(make(dir, "length", **how))
    values = batch["patch"][np.argsort(batch["_id"]), 0, :3]
    np.testing.assert_array_equal(values, [[0, 32768, 65535], [65535, 32768, 0]])
    [(_, batch)] = take(make(dir, "length", intensity="reference", **how))
    values = batch["patch"][np.argsort(batch["_id"]), 0, :3]
    np.testing.assert_array_equal(values, np.rint(np.array([[1, 2, 3], [2, 1, 0]]) / [[3], [2]] * 65535))
    bare = write(tmp_path / "bare", [image(0, {})])
    with pytest.raises(UserError, match=r"study k0: \(1, 1, 3\) uint16 with \[\] instead of .*--recipe=radiograph"):
        take(make(bare, "length", **how))
    signed = write(tmp_path / "signed", [image(0, shown, np.int16)])
    with pytest.raises(UserError, match=r"study k0: \(1, 1, 3\) int16 with"):
        take(make(signed, "length", **how))


@pytest.mark.parametrize(
    "way, options, message",
    [
        ("length", {"patch": 0}, "input.patch=0 must be a whole number of at least 1"),
        ("length", {"keys": ("image",)}, "input.keys='image' is not known; use one of patch, where, label"),
        ("length", {"keys": ("where",)}, "input.keys has 'where', .*: it needs 'patch' too"),
        ("length", {"keys": ("patch", "where")}, "'where': only input.mode='pack' with attention='rebucket'"),
        ("length", {"intensity": "nice"}, "input.intensity='nice' is not known; use one of voi"),
        ("length", {"classes": ("foot",)}, "input.classes: tiny has no label 'foot'; it has hand, left"),
        ("length", {"budget": 20}, "input.budget=20 does not hold 2 rows"),
        ("blocks", {"budget": 200}, "input.budget=200 does not make batches of a multiple of 2 rows"),
        ("dbb", {"plan_options": {"memory_probe": "reference"}}, "loses records in every epoch"),
    ],
)
def test_bad_options_stop_at_the_start(dir, way, options, message):
    with pytest.raises(UserError, match=message):
        make(dir, way, **options)


def test_volumes_are_refused(tmp_path):
    dir = write(tmp_path, [studies.study(0, split="train")])
    with pytest.raises(UserError, match=r"study study000 has \d scans with \d+ slices; .* one image per record"):
        make(dir, "length")
