"""The phantom radiographs: geometry in closed form, records as prep makes them, datasets that repeat."""

import hashlib
import json

import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.core.rng import np_rng
from jaxmed.data import intensity, shards
from jaxmed.data.sources import phantom_bones as bones
from jaxmed.data.sources import phantom_checks, phantom_radiographs
from jaxmed.prep import regions

SMALL = {"sides": (96, 128)}


def plane(step=0.5, reach=60.0):
    at = np.arange(-reach, reach, step, dtype=np.float32)
    y, x = np.meshgrid(at, at, indexing="ij")
    return x, y, step**2


@pytest.mark.parametrize("turn", [0.0, 0.4, np.pi / 2])
def test_what_lies_behind_the_pixels_is_the_volume(turn):
    x, y, area = plane()
    ball = bones.ball((5, -7, 12), (20, 12, 8), shell=0)
    assert bones.thickness(ball, x, y, turn).sum() * area == pytest.approx(4 / 3 * np.pi * 20 * 12 * 8, rel=0.01)
    rod = bones.rod((-4, -30, 3), (6, 30, -3), 5, shell=0)
    length = np.linalg.norm(rod.b - rod.a)
    expected = np.pi * 25 * length + 4 / 3 * np.pi * 125  # with its round ends
    assert bones.thickness(rod, x, y, turn).sum() * area == pytest.approx(expected, rel=0.04)
    for solid in (ball, rod):
        drawn = bones.thickness(solid, x, y, turn) > 0
        x0, y0, x1, y1 = bones.box_of(solid, turn)
        assert x[drawn].min() >= x0 and x[drawn].max() <= x1 and y[drawn].min() >= y0 - 5 and y[drawn].max() <= y1 + 5
    hollow = bones.thickness(bones.rod(rod.a, rod.b, 5, shell=2), x, y, turn)
    assert 0.4 < hollow.sum() / bones.thickness(rod, x, y, turn).sum() < 0.9


def test_heads_keep_their_mass_in_every_view():
    volumes, step = bones.head_volumes(np_rng(3))
    x, y, area = plane(2.0, 180.0)
    total = volumes.sum((1, 2, 3)) * step**3
    for turn in (0.0, 0.15, np.pi / 2, 1.45):
        found = bones.head_thickness(volumes, step, x, y, turn).sum((1, 2)) * area
        np.testing.assert_allclose(found, total, rtol=0.04)


def test_every_region_gives_records_like_those_of_prep():
    config = phantom_radiographs.Config(**SMALL, images=(2, 2))
    seen = set()
    for i in range(24):
        studies = phantom_radiographs.patient((5, i), config)
        assert len(studies) == 2 and len({s["patient"] for s in studies}) == 1 and len({s["key"] for s in studies}) == 2
        for study in studies:
            [scan] = study["scans"]
            voxels, meta = scan["voxels"], scan["meta"]
            assert (
                voxels.dtype == np.uint16 and voxels.shape[0] == 1 and voxels.shape[1] <= 128 >= voxels.shape[2] >= 96
            )
            assert [voxels.min(), voxels.max()] == meta["range"] and meta["range"][1] < 1 << meta["bits"]
            json.dumps(meta)
            [region] = [r for r in bones.REGIONS if study["labels"][r]]
            assert meta["region"] == region in regions.REGIONS and set(study["labels"]) == {
                *phantom_radiographs.CLASSES
            }
            seen.add(region)
            top, left, bottom, right = meta.get("box", (0, 0, *voxels.shape[1:]))
            for how in ("voi", "percentiles"):
                field = intensity.unit(meta, intensity=how)[voxels[0, top:bottom, left:right]]
                assert field.std() > 0.03 and 0.02 < field.mean() < 0.98, (how, region, meta)
    assert seen == set(bones.REGIONS)
    again = phantom_radiographs.patient((5, 7), config)
    for a, b in zip(again, phantom_radiographs.patient((5, 7), config)):
        np.testing.assert_array_equal(a["scans"][0]["voxels"], b["scans"][0]["voxels"])
        assert a["labels"] == b["labels"] and a["scans"][0]["meta"] == b["scans"][0]["meta"]


def test_findings_change_the_picture():
    sure = {"turn": 0.0, "noise": (6.0, 6.0), "collimated": 0.0, "sides": (200, 260)}
    for region in bones.PARTS:
        part = bones.PARTS[region](lambda spread: 0.0)
        pictures = {}
        for flag in ("none", *phantom_radiographs.FLAGS):
            share = {name: float(name == flag) for name in phantom_radiographs.FLAGS}
            config = phantom_radiographs.Config(**sure, **share)
            scan, found = phantom_radiographs.picture(np_rng(2), region, part, config)
            assert found == (() if flag == "none" else (flag,))
            pictures[flag] = scan["voxels"].astype(float)
        assert not np.array_equal(pictures["none"], pictures["fracture"])
    # A metal nail is the brightest thing in a knee.
    nail = bones.rod((0, -50, 0), (0, 50, 0), 4, shell=0, material="metal")
    x, y, _ = plane(1.0)
    assert bones.thickness(nail, x, y, 0.0).max() == pytest.approx(8, rel=0.01)


def test_sizes_are_many_and_spread_like_those_of_hospitals():
    sizes = np.array([phantom_radiographs.size(np_rng(1, i)) for i in range(2500)])
    assert len({tuple(s) for s in sizes}) > 2000 and sizes.min() >= 96 and sizes.max() <= 384
    rows, columns = np.percentile(sizes, (25, 50, 75), axis=0).T
    np.testing.assert_allclose(rows, np.array([1543, 2002, 2438]) / 8, rtol=0.08)
    np.testing.assert_allclose(columns, np.array([1117, 1417, 1852]) / 8, rtol=0.08)


def test_datasets_repeat_and_go_on(tmp_path, capsys):
    options = {"train": 40, "test": 14, "shard_records": 16, **SMALL}
    first = phantom_radiographs.make(tmp_path / "a", threads=1, **options)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in first.iterdir()}
    (first / "shard-00001.array_record").unlink()
    (first / "dataset.json").unlink()
    phantom_radiographs.make(tmp_path / "a", threads=2, **options)
    assert files == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in first.iterdir()}
    capsys.readouterr()
    phantom_radiographs.make(tmp_path / "a", **options)
    assert "there already" in capsys.readouterr().out
    dataset = shards.open_dataset(first, verify="full")
    index = dataset.index
    assert len(dataset) == 54 and dataset.manifest["recipe"]["synthetic"] and set(index["dtype"]) == {"uint16"}
    assert dataset.manifest["classes"] == list(phantom_radiographs.CLASSES)
    assert not set(index["patient"][index["split"] == "train"]) & set(index["patient"][index["split"] == "test"])
    assert len(set(index["patient"])) < 40
    for wrong, message in (
        ({"train": 41}, "holds another dataset"),
        ({"zooms": 3}, "source.zooms is not an option"),
        ({"train": -1}, "number of images"),
    ):
        with pytest.raises(UserError, match=message):
            phantom_radiographs.make(tmp_path / "a", **{**options, **wrong})


@pytest.mark.slow
def test_neither_size_nor_grey_values_tell_the_region(tmp_path):
    phantom_radiographs.make(tmp_path, train=1000, test=500)
    dataset = shards.open_dataset(tmp_path)
    found = phantom_checks.baselines(dataset, bones.REGIONS)
    assert found["size"] < found["chance"] + 0.06 and found["mean"] < 0.32 and found["histogram"] < 0.52, found
