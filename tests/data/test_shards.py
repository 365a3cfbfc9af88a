import concurrent.futures
import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.data import record, shards
from tests.data.studies import study, write


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    recipe = {"name": "tiny", "value_range": [0, 255]}
    return write(tmp_path_factory.mktemp("shards") / "tiny", map(study, range(20)), recipe=recipe)


@pytest.fixture
def copy(dataset_dir, tmp_path):
    return shutil.copytree(dataset_dir, tmp_path / "copy")


def test_index_and_reading(dataset_dir):
    assert not [p for p in dataset_dir.iterdir() if p.name.startswith(".")]
    dataset = shards.open_dataset(dataset_dir, verify="full")
    index, manifest = dataset.index, dataset.manifest
    assert len(dataset) == 20 and manifest["splits"] == {"train": 16, "val": 4}
    assert manifest["classes"] == ["odd", "third"] and manifest["codec"] == "lz4"
    assert manifest["recipe"]["value_range"] == [0, 255]
    for i in range(20):
        original = study(i)
        depths = [len(s["voxels"]) for s in original["scans"]]
        assert index["key"][i] == original["key"] and index["patient"][i] == original["patient"]
        assert (index["scans"][i], index["depth"][i], index["slices"][i]) == (len(depths), max(depths), sum(depths))
        assert (index["height"][i], index["width"][i], index["dtype"][i]) == (6, 5, "uint8")
        assert index["text_chars"][i] == len(" ".join(original["sentences"]))
        assert index["label/odd"][i] == i % 2
        np.testing.assert_equal(index["label/third"][i], 1.0 if i % 3 == 0 else np.nan)
        assert (index["shard"][i], index["row"][i]) == divmod(i, 8)
    [a, b] = dataset.read([13, 2], scans=[0])
    assert (a["key"], b["key"], len(a["scans"])) == ("study013", "study002", 1)
    np.testing.assert_array_equal(a["scans"][0]["voxels"], study(13)["scans"][0]["voxels"])
    np.testing.assert_array_equal(shards.split_ids(dataset, "val"), [4, 9, 14, 19])
    with pytest.raises(UserError, match=r"input.split='test'.* it has 'train' \(16 studies\), 'val' \(4 studies\)"):
        shards.split_ids(dataset, "test")
    dataset.close()
    assert dataset.read([0])[0]["key"] == "study000", "closing must not end reading"


def test_many_threads_read_what_one_reads(dataset_dir):
    dataset = pickle.loads(pickle.dumps(shards.open_dataset(dataset_dir)))
    ids = np.random.default_rng(0).integers(0, 20, 600)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: dataset.record(i).key, ids))
    assert keys == [f"study{i:03d}" for i in ids]


def test_finish_again_keeps_shards_and_bytes(copy):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    shards.finish(copy, "tiny", json.loads(before["dataset.json"])["recipe"])
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    with shards.ShardWriter(copy, 3) as writer:
        writer.add(record.encode(study(50)))
    assert len(shards.open_dataset(copy)) == 20, "a shard counts when the manifest says so"
    shards.finish(copy, "tiny", classes=["third", "odd"])
    dataset = shards.open_dataset(copy)
    assert len(dataset) == 21 and dataset.index["key"][20] == "study050"
    assert dataset.manifest["classes"] == ["third", "odd"]


def test_what_finish_refuses(tmp_path):
    with pytest.raises(UserError, match="has no whole shard"):
        shards.finish(tmp_path, "x")
    for number, codec in enumerate(("lz4", "b2nd")):
        with shards.ShardWriter(tmp_path, number, codec) as writer:
            writer.add(study(0))
    with pytest.raises(UserError, match=r"study000 is in shard-00000.array_record and in shard-00001.array_record"):
        shards.finish(tmp_path, "x")
    with shards.ShardWriter(tmp_path, 1, "b2nd") as writer:
        writer.add(study(1))
    with pytest.raises(UserError, match="codecs b2nd and lz4"):
        shards.finish(tmp_path, "x")
    with shards.ShardWriter(tmp_path, 1) as writer:
        writer.add(study(1))
    with pytest.raises(UserError, match=r"labels third occur .* but not in classes"):
        shards.finish(tmp_path, "x", classes=["odd"])
    assert not (tmp_path / "dataset.json").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def edit(field, value):
    def change(path):
        manifest = json.loads(path.read_text())
        manifest[field] = value
        path.write_text(json.dumps(manifest))

    return change


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("dataset.json", lambda p: p.unlink(), "has no dataset.json: prep has not finished"),
        ("dataset.json", cut, "dataset.json is not a dataset manifest"),
        ("dataset.json", edit("schema", 2), "schema version 2, this jaxmed reads version 1; make them again"),
        (
            "dataset.json",
            lambda p: p.write_text('{"schema": 1, "name": "x"}'),
            "dataset.json lacks classes, index, shards",
        ),
        ("index.npz", cut, "index.npz is missing or is not the index of these shards"),
        ("index.npz", lambda p: p.unlink(), "index.npz is missing"),
        ("shard-00001.array_record", cut, r"shard-00001.array_record has \d+ bytes instead of \d+: truncated\?"),
        ("shard-00001.array_record", lambda p: p.unlink(), "shard-00001.array_record is missing"),
        ("shard-00001.array_record", flip, "shard-00001.array_record: its sha256 differs from dataset.json"),
    ],
)
def test_damage_is_named(copy, name, damage, message):
    damage(copy / name)
    with pytest.raises(UserError, match=message) as e:
        shards.open_dataset(copy, verify="full")
    assert "again" in str(e.value), "the message must say what to do"


def test_an_index_of_other_shards(copy, tmp_path):
    """Checksums alone do not help if someone rewrites the manifest: counts must agree too."""
    other = write(tmp_path / "other", map(study, range(19)))
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["index"] = json.loads((other / "dataset.json").read_text())["index"]
    (copy / "dataset.json").write_text(json.dumps(manifest))
    shutil.copy(other / "index.npz", copy)
    with pytest.raises(UserError, match=r"index.npz does not list the 4 records of shard-00002"):
        shards.open_dataset(copy)


def test_damage_that_fast_verification_cannot_see_stops_reading(copy):
    flip(copy / "shard-00001.array_record")
    dataset = shards.open_dataset(copy)
    with pytest.raises(UserError, match=r"shard-00001.array_record"):
        dataset.read(range(8, 16))
    garbage = copy / "shard-00000.array_record"
    garbage.write_bytes(bytes(garbage.stat().st_size))  # opens without an error and holds 0 records
    with pytest.raises(UserError, match=r"shard-00000.array_record does not hold the 8 records"):
        dataset.read([0])


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist; make it with"):
        shards.open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="verify='maybe'"):
        shards.open_dataset(tmp_path, verify="maybe")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        shards.ShardWriter(tmp_path / "file" / "sub", 0)


def test_an_exception_leaves_nothing_and_an_empty_shard_is_none(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), shards.ShardWriter(tmp_path, 0) as writer:
        writer.add(study(0))
        raise RuntimeError("stop")
    with shards.ShardWriter(tmp_path, 1):
        pass
    with pytest.raises(UserError, match="no scans"), shards.ShardWriter(tmp_path, 2) as writer:
        writer.add(study(0))
        writer.add(study(1, scans=0))
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from jaxmed.core.errors import UserError
from jaxmed.data import shards
from tests.data.studies import study
dir, limit, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with shards.ShardWriter(dir, 0) as writer:
    writer.add(study(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if last:
        with shards.ShardWriter(dir, 1) as writer:
            writer.add(study(1, scans=4, depth=64, hw=(64, 64)))
    shards.finish(dir, "x")
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize(
    "limit, file",
    [(100_000, "shard-00001.array_record"), (10_000, "shard-00001.array_record"), (1_000, "index.npz")],
)
def test_full_disk(tmp_path, limit, file):
    """A limit on file sizes fails as a full disk does: in the middle of a write."""
    last = str(int(file != "index.npz"))
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path, str(limit), last], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {tmp_path / file}: " in done.stdout and "free space" in done.stdout, done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"shard-00000.array_record", "shard-00000.json"}


KILLED = """
import os, signal, sys
from jaxmed.data import shards
from tests.data.studies import study
with shards.ShardWriter(sys.argv[1], 0) as writer:
    writer.add(study(0))
with shards.ShardWriter(sys.argv[1], 1) as writer:
    writer.add(study(1))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_writing(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    assert done.returncode == -signal.SIGKILL
    assert [s["file"] for s in shards.sidecars(tmp_path)] == ["shard-00000.array_record"]
    with shards.ShardWriter(tmp_path, 1) as writer:
        writer.add(study(1))
    shards.finish(tmp_path, "x")
    assert len(shards.open_dataset(tmp_path)) == 2
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"], "what the killed run left is gone"
