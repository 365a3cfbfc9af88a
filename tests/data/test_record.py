import struct

import msgpack
import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.data import record
from tests.data.studies import study


def assert_same(got, expected):
    for field in ("key", "patient", "sentences", "labels", "split"):
        assert got[field] == expected[field], field
    assert len(got["scans"]) == len(expected["scans"])
    for a, b in zip(got["scans"], expected["scans"]):
        assert a["voxels"].dtype == b["voxels"].dtype
        np.testing.assert_array_equal(a["voxels"], b["voxels"])
        np.testing.assert_array_equal(a["affine"], b["affine"])
        np.testing.assert_array_equal(a["source_affine"], b.get("source_affine", b["affine"]))
        assert a["source_shape"] == tuple(b.get("source_shape", b["voxels"].shape[:3]))
        assert (a["name"], a["meta"]) == (b["name"], b["meta"])


@pytest.mark.parametrize("codec", record.CODECS)
@pytest.mark.parametrize("dtype", record.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 70, 33), (66, 5, 40), (4, 6, 5, 3)])
def test_round_trip(codec, dtype, shape):
    voxels = (np.random.default_rng(0).normal(size=shape) * 90 + 100).clip(0, 255).astype(dtype)
    scan = {
        "voxels": voxels,
        "affine": np.arange(16.0).reshape(4, 4),
        "source_affine": np.eye(4) * 3,
        "source_shape": (9, 8, 7),
        "name": "flair",
        "meta": {"te": 0.1, "fat_saturated": True, "flip": [1, 2]},
    }
    original = study(3, scans=2, depth=5, dtype=dtype)
    original["scans"].insert(1, scan)
    data = record.encode(original, codec)
    assert_same(record.decode(data), original)
    assert_same(record.decode(data, scans=[1]), {**original, "scans": [scan]})
    assert record.encode(original, codec) == data, "the same study must give the same bytes"
    fortran = {**scan, "voxels": np.asfortranarray(voxels).astype(np.dtype(dtype).newbyteorder(">"))}
    assert_same(record.decode(record.encode({**original, "scans": [fortran]}, codec)), {**original, "scans": [scan]})


@pytest.mark.parametrize("codec", record.CODECS)
def test_crop_and_copy_into(codec):
    whole = study(1, scans=2, depth=40, hw=(50, 70))
    data = record.encode(whole, codec)
    crop = (slice(3, 9), slice(None, 33), slice(-20, None))
    [cropped] = record.decode(data, [1], crop)["scans"]
    original = whole["scans"][1]
    np.testing.assert_array_equal(cropped["voxels"], original["voxels"][crop])
    # The same voxel is at the same place in the patient.
    np.testing.assert_allclose(cropped["affine"] @ [2, 4, 5, 1], original["affine"] @ [5, 4, 55, 1])
    reader = record.Record(data)
    out = np.zeros((2, 4, 50, 70), np.uint8)
    reader.copy_into(1, out[1], first=36)
    np.testing.assert_array_equal(out[1], original["voxels"][36:40])
    assert not out[0].any()
    strided = np.zeros((50, 70, 5), np.uint8).transpose(2, 0, 1)
    reader.copy_into(0, strided, first=1)
    np.testing.assert_array_equal(strided, whole["scans"][0]["voxels"][1:6])
    with pytest.raises(ValueError, match="step"):
        reader.voxels(0, (slice(0, 4, 2),))


def test_b2nd_crop_decodes_only_the_blocks_it_needs_and_raw_skips_other_scans():
    noise = np.random.default_rng(0).integers(
        0, 255, (128, 128, 128), np.uint8
    )  # incompressible: bytes keep their place
    one = {"key": "k", "scans": [{"voxels": noise, "affine": np.eye(4)}]}
    data = bytearray(record.encode(one, "b2nd"))
    reader = record.Record(bytes(data))
    data[len(data) * 3 // 4 : len(data) * 3 // 4 + 4000] = bytes(4000)  # a chunk far from the crop
    damaged = record.Record(bytes(data))
    crop = (slice(0, 32),) * 3
    np.testing.assert_array_equal(damaged.voxels(0, crop), reader.voxels(0, crop))
    with pytest.raises(UserError, match="study k, scan 0 cannot be decoded"):
        assert np.array_equal(damaged.voxels(0), noise), "damage must not pass unseen"
        pytest.fail("damage must not pass unseen")


@pytest.mark.parametrize("codec", record.CODECS)
def test_a_record_that_was_cut(codec):
    data = record.encode(study(2, scans=2, depth=30, hw=(20, 20)), codec)
    cut = record.Record(data[:-200], "shard-00007.array_record, row 3")
    assert cut.key == "study002"
    with pytest.raises(UserError, match=r"shard-00007.array_record, row 3: study study002, scan 1 cannot be decoded"):
        cut.study()
    cut.study(scans=[0])


def test_other_schema_version_and_foreign_bytes():
    data = bytearray(record.encode(study(0)))
    struct.pack_into("<H", data, 4, 9)
    with pytest.raises(UserError, match=r"record schema 9, this jaxmed reads schema 1.*make the shards again"):
        record.decode(bytes(data))
    for bad in (b"", b"PK\x03\x04 something else", msgpack.packb({"a": 1})):
        with pytest.raises(UserError, match="not a jaxmed record"):
            record.decode(bad)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": ""}, "non-empty string as 'key'"),
        ({"scans": []}, "study study000: it has no scans"),
        ({"sentences": "one string"}, "'sentences' must be a list of strings"),
        ({"voxels": np.zeros((2, 3))}, r"study study000, scan 0 .*got shape \(2, 3\)"),
        ({"voxels": np.zeros((2, 3, 4), np.int64)}, "int64; store one of uint8, int16, uint16, float32"),
        ({"voxels": np.zeros((0, 3, 4), np.uint8)}, "not empty"),
        ({"affine": None}, r"'affine' must be a finite \(4, 4\)"),
        ({"affine": np.full((4, 4), np.nan)}, r"'affine' must be a finite \(4, 4\)"),
        ({"source_affine": np.eye(3)}, "'source_affine' must be"),
    ],
)
def test_bad_studies_are_named(change, message):
    bad = study(0, scans=1)
    target = bad if set(change) & set(bad) else bad["scans"][0]
    target.update(change)
    with pytest.raises(UserError, match=message):
        record.encode(bad)


def test_mixed_dtypes_and_unknown_codec():
    mixed = study(0, scans=1)
    mixed["scans"] += study(1, scans=1, dtype="int16")["scans"]
    with pytest.raises(UserError, match=r"scan 1 \(scan0\): voxels are int16, the scans before it"):
        record.encode(mixed)
    with pytest.raises(UserError, match="codec 'zip' is not known; use one of lz4, zstd, raw, b2nd"):
        record.encode(study(0), "zip")
