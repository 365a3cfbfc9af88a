import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.data import pipeline, record, shards
from jaxmed.data.sources import tfds as source

BUILDER = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(i, mode):
    file = io.BytesIO()
    Image.new(mode, (7, 6), color=i if mode == "L" else (i, 0, 0)).save(file, "PNG")
    file.seek(0)
    return file


class TinyVolumes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "volume": tfds.features.Tensor(shape=(None, 6, 5), dtype=np.int16),
            "second": tfds.features.Tensor(shape=(6, 5, None), dtype=np.uint8),
            "mask": tfds.features.Tensor(shape=(None, 6, 5), dtype=np.int64),
            "gray": tfds.features.Image(shape=(None, None, 1)),
            "colour": tfds.features.Image(shape=(None, None, 3)),
            "report": tfds.features.Text(),
            "findings": tfds.features.Sequence(tfds.features.Text()),
            "diagnosis": tfds.features.ClassLabel(names=["healthy", "stroke"]),
            "age": np.float32,
            "name": tfds.features.Text(),
            "person": tfds.features.Text(),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._examples(0, 6), "test": self._examples(6, 9)}

    def _generate_examples(self):
        raise NotImplementedError

    def _examples(self, first, last):
        for i in range(first, last):
            rng = np.random.default_rng(i)
            yield i, {
                "volume": rng.integers(-9, 9, (2 + i, 6, 5)).astype(np.int16),
                "second": rng.integers(1, 9, (6, 5, 3)).astype(np.uint8),
                "mask": np.zeros((2, 6, 5), np.int64),
                "gray": png(i, "L"), "colour": png(i, "RGB"),
                "report": f"Case {i}.  Nothing else! Really 1.5 cm?", "findings": ["one. still one", f"two {i}"],
                "diagnosis": -1 if i == 3 else i % 2, "age": 3.5 * i, "name": f"name{i}", "person": "same",
            }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Built by tfds itself, in a process of its own: its code must live in a package."""
    root = tmp_path_factory.mktemp("tfds")
    (root / "tiny_volumes").mkdir()
    (root / "tiny_volumes/__init__.py").write_text(BUILDER)
    (root / "tiny_volumes/README.md").write_text("")
    code = (
        "import sys, tiny_volumes as t\n"
        f"b = t.TinyVolumes(data_dir={str(root / 'data')!r}, file_format='array_record'); b.download_and_prepare()\n"
        "print(b.data_dir); assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


FIELDS = {"image": "volume", "text": "report", "label": ("diagnosis", "age"), "key": "name"}


def volume(i):
    return np.random.default_rng(i).integers(-9, 9, (2 + i, 6, 5)).astype(np.int16)


def test_index_and_studies(folder):
    dataset = source.open_dataset(folder, **FIELDS, spacing=(3, 1, 0.5))
    assert len(dataset) == 9 and dataset.manifest["splits"] == {"train": 6, "test": 3}
    assert dataset.manifest["classes"] == ["healthy", "stroke", "age"] and dataset.name == "tiny_volumes/1.0.0"
    for id, key in enumerate(dataset.index["key"]):
        i = int(key.removeprefix("name"))
        study = dataset.record(id).study()
        [scan] = study["scans"]
        assert (study["key"], study["split"]) == (key, "train" if i < 6 else "test")
        np.testing.assert_array_equal(scan["voxels"], volume(i))
        np.testing.assert_allclose(scan["affine"] @ [1, 0, 0, 0], [0, 0, 3, 0])
        assert study["sentences"] == [f"Case {i}.", "Nothing else!", "Really 1.5 cm?"]
        assert study["labels"]["age"] == 3.5 * i
        assert study["labels"].get("stroke") == (None if i == 3 else float(i % 2))
        assert dataset.index["depth"][id] == dataset.index["slices"][id] == 2 + i
        assert dataset.index["dtype"][id] == "int16" and dataset.index["scans"][id] == 1
    [cropped] = dataset.record(0).study(crop=(slice(1, 2),))["scans"]
    np.testing.assert_allclose(cropped["affine"][:3, 3], [0, 0, 3])
    assert dataset.fingerprint == source.open_dataset(folder, **FIELDS, spacing=(3, 1, 0.5)).fingerprint
    assert dataset.fingerprint != source.open_dataset(folder, **FIELDS).fingerprint
    assert "tensorflow" not in sys.modules


def test_kinds_of_fields(folder):
    """Several images are several scans, 2D images are one slice, sequences of texts are sentences."""
    dataset = source.open_dataset(folder, image=("gray", "colour"), text="findings", patient="person")
    first = dataset.read([0])[0]
    assert [scan["voxels"].shape for scan in first["scans"]] == [(1, 6, 7), (1, 6, 7, 3)]
    assert first["sentences"][0] == "one. still one" and len(first["sentences"]) == 2
    assert first["key"] == "tiny_volumes-test-000000" and first["patient"] == "same"
    assert record.decode(record.encode(first))["scans"][0]["name"] == "gray"
    [hwd] = source.open_dataset(folder, image="second", axes="hwd").read([0])
    assert hwd["scans"][0]["voxels"].shape == (3, 6, 5) and hwd["sentences"] == []


def test_it_feeds_prep(folder, tmp_path):
    options = ["--source=tfds", f"--source.dir={folder}", "--source.image=volume", "--source.text=report"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxmed.prep", *options, f"--out={tmp_path}", "--recipe=native", "--workers=0"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dataset = shards.open_dataset(tmp_path)
    assert sorted(dataset.index["depth"]) == list(range(2, 11)) and (dataset.index["text_chars"] > 0).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_it_feeds_training(folder, workers):
    stream = pipeline.make(
        dir=folder, source="tfds", source_options=FIELDS, split="train", buckets={"scans": (1,), "depth": (4, 8)},
        batch_size=2, context=32, keys=("image", "text", "label"), train=False, workers=workers,
    )  # fmt: skip
    assert stream.steps_per_epoch == 3
    seen = set()
    for k, (bucket, batch) in enumerate(stream.batches()):
        for row, name in enumerate(stream.records(k)):
            i = int(name.removeprefix("name"))
            seen.add(i)
            np.testing.assert_array_equal(batch["image"][row, 0, : 2 + i], volume(i))
            assert batch["image"].dtype == np.int16 and batch["scan_depths"][row] == [2 + i]
            assert dict(bucket)["depth"] >= 2 + i and batch["text"][row, 0] == 101 and batch["label"].shape == (2, 3)
    assert seen == set(range(6))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image": "picture"}, "image='picture' is no field of tiny_volumes/1.0.0; it has age, colour,"),
        ({"image": "volume", "text": "history"}, "text='history' is no field"),
        ({"image": "volume", "label": ("sex",)}, "label='sex' is no field"),
        ({"image": "mask"}, "field 'mask' is int64; records hold uint8"),
        ({"image": "volume", "axes": "hw"}, r"field 'volume' .* has shape \(\d, 6, 5\); set axes"),
        ({"image": "volume", "axes": "dhx"}, r"set axes to the order of its axes"),
        ({"image": "volume", "key": "person"}, "field 'person' is 'same' twice"),
        ({"image": "volume", "label": ("diagnosis", "diagnosis")}, "share class names"),
    ],
)
def test_fields_that_do_not_fit(folder, fields, message):
    with pytest.raises(UserError, match=message):
        source.open_dataset(folder, **fields).index  # noqa: B018


def test_options_are_checked_by_the_pipeline(folder):
    options = {"dir": folder, "source": "tfds", "split": "train", "buckets": {"scans": (1,), "depth": (8,)}}
    with pytest.raises(UserError, match=r"source 'tfds' needs input.source_options.image"):
        pipeline.make(**options, batch_size=2)
    with pytest.raises(
        UserError, match=r"input.source_options.picture is not an option of source 'tfds'; it has axes,"
    ):
        pipeline.make(**options, batch_size=2, source_options={"image": "volume", "picture": 1})


def test_folders_and_installations_that_do_not_fit(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is not a prepared TensorFlow Datasets folder.*my_set/1.0.0"):
        source.open_dataset(str(tmp_path), image="volume")
    for name in ("dataset_info.json", "features.json"):
        text = (Path(folder) / name).read_text()
        (tmp_path / name).write_text(text.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="is stored as tfrecord; prepare the set again with file_format='array_record'"):
        source.open_dataset(str(tmp_path), image="volume")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'jaxmed\[tfds\]'"):
        source.open_dataset(folder, image="volume")
