"""Readers on small series made here: every rule of stacking, refusing, finding and joining, without downloads."""

import gzip
import io
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from jaxmed.core.errors import UserError
from jaxmed.prep import names
from jaxmed.prep.discover import find_studies
from jaxmed.prep.manifest import read_manifest, split_sentences
from jaxmed.prep.scan import REASONS, FileRef, RawSeries, ReadOptions, Rejected, read_scans
from tests.prep import make_series as make

RNG = np.random.default_rng(7)
VOLUME = RNG.integers(0, 1000, (8, 6, 5)).astype(np.int16)
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"
NIBABEL = Path(nibabel.__file__).parent


def read(paths, kind="dicom", **options):
    """Scans and rejects of one series."""
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    refs = tuple(FileRef(str(p), "", Path(p).name) for p in paths)
    scans, rejects = read_scans(RawSeries(kind, refs, "k"), ReadOptions(**options))
    for found in [r.reason for r in rejects] + [n["reason"] for s in scans for n in s.notes]:
        assert found in REASONS
    for scan in scans:
        assert scan.affine.dtype == np.float64 and scan.name in names.TOKENS
        assert scan.voxels.dtype in (np.uint8, np.int16, np.uint16, np.float32)
    return scans, rejects


def only(found):
    """The single scan of a read that refused nothing."""
    scans, rejects = found
    assert rejects == [] and len(scans) == 1
    return scans[0]


def reasons(found) -> set[str]:
    return {r.reason for r in found}


def notes(scan) -> set[str]:
    return {n["reason"] for n in scan.notes}


# --- stacking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orientation", "plane"),
    [(make.AXIAL, "axial"), (make.CORONAL, "coronal"), (make.SAGITTAL, "sagittal"), (make.OBLIQUE, "axial")],
)
def test_order_is_by_position_never_by_number_or_name(tmp_path, orientation, plane):
    slices = make.series(VOLUME, orientation=orientation, step=2.5)
    slices = make.edited(slices, InstanceNumber=lambda k: 100 - 7 * k)
    scan = only(read(make.save(slices, tmp_path)))
    assert np.array_equal(scan.voxels, VOLUME) and scan.voxels.dtype == np.int16
    np.testing.assert_allclose(scan.affine, make.expected_affine(slices), atol=1e-6)
    assert scan.meta["orientation"] == plane and scan.meta["uniform"] and scan.notes == []
    assert scan.meta["step"] == pytest.approx(2.5) and scan.meta["spacing"] == pytest.approx([2.5, 0.8, 0.6])


def test_slices_given_from_the_far_end_come_out_the_same(tmp_path):
    slices = make.series(VOLUME)
    a = only(read(make.save(slices, tmp_path / "a")))
    b = only(read(make.save(slices[::-1], tmp_path / "b", seed=3)))
    assert np.array_equal(a.voxels, b.voxels) and np.array_equal(a.affine, b.affine)


def test_tilted_gantry_keeps_a_sheared_affine(tmp_path):
    slices = make.series(VOLUME, modality="CT", shift=(0, 0.5, 0), RescaleIntercept=-1024, RescaleSlope=1)
    scan = only(read(make.save(slices, tmp_path)))
    np.testing.assert_allclose(scan.affine, make.expected_affine(slices), atol=1e-6)
    assert scan.affine[1, 0] == pytest.approx(-0.5)
    assert scan.meta["tilt"] == pytest.approx(np.degrees(np.arctan(0.25))) and "gantry-tilt" in notes(scan)
    assert scan.meta["step"] == pytest.approx(2.0)


def test_duplicates_keep_the_first_readable(tmp_path):
    slices = make.series(VOLUME)
    again = make.edited(slices[3:5], InstanceNumber=lambda k: 50 + k, PixelData=bytes(60))
    scan = only(read(make.save([*slices, *again], tmp_path / "a")))
    assert np.array_equal(scan.voxels, VOLUME) and notes(scan) == {"duplicate-slices"}
    # The same file twice, and the first of them is damaged: the copy serves.
    paths = make.save([*slices, slices[2]], tmp_path / "b", names=[f"{k}" for k in range(9)])
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    scans, rejects = read(paths)
    assert np.array_equal(scans[0].voxels, VOLUME) and "duplicate-slices" in notes(scans[0])
    assert [(r.path, r.reason, r.kind) for r in rejects] == [("2", "truncated-pixel-data", "file")]


@pytest.mark.parametrize(
    ("lost", "kept"), [((3,), True), ((2, 5), True), ((3, 4), True), ((2, 5, 8), False), ((2, 3, 4), False)]
)
def test_missing_slices(tmp_path, lost, kept):
    ramp = (np.arange(12, dtype=np.int16) * 10)[:, None, None] + np.zeros((1, 6, 5), np.int16)
    slices = make.series(ramp)
    found = read(make.save([s for k, s in enumerate(slices) if k not in lost], tmp_path))
    if not kept:
        assert found[0] == [] and [(r.reason, r.kind, r.files) for r in found[1]] == [("missing-slices", "series", 9)]
        return
    scan = only(found)
    assert np.array_equal(scan.voxels, ramp)  # a ramp is what linear interpolation restores
    np.testing.assert_allclose(scan.affine, make.expected_affine(slices), atol=1e-6)
    assert scan.meta["filled"] == len(lost) and not scan.meta["uniform"] and notes(scan) == {"missing-slices"}
    assert read(make.save([s for k, s in enumerate(slices) if k not in lost], tmp_path), max_missing=0)[0] == []


def test_unreadable_slice_is_filled_and_listed(tmp_path):
    slices = make.series(VOLUME)
    paths = make.save(slices, tmp_path, names=[f"s{k}" for k in range(8)])
    paths[4].write_bytes(paths[4].read_bytes()[:-30])
    scans, rejects = read(paths)
    assert scans[0].voxels.shape == VOLUME.shape and scans[0].meta["filled"] == 1
    assert np.array_equal(np.delete(scans[0].voxels, 4, 0), np.delete(VOLUME, 4, 0))
    assert [(r.path, r.reason) for r in rejects] == [("s4", "truncated-pixel-data")]


def test_uneven_steps_are_resampled_or_refused(tmp_path):
    places = [0, 2, 4, 6, 8, 10, 15, 20, 25, 30]
    ramp = np.array(places, np.int16)[:, None, None] * 10 + np.zeros((1, 4, 4), np.int16)
    slices = make.series(ramp, places=places)
    scan = only(read(make.save(slices, tmp_path)))
    assert scan.voxels.shape == (16, 4, 4) and notes(scan) == {"non-uniform-spacing"} and not scan.meta["uniform"]
    assert np.array_equal(scan.voxels[:, 0, 0], np.arange(16) * 20)
    np.testing.assert_allclose(scan.affine[:3, 0], [0, 0, 2], atol=1e-6)
    scans, rejects = read(make.save(slices, tmp_path), max_step_ratio=2.0)
    assert scans == [] and reasons(rejects) == {"non-uniform-spacing"}
    # Rounding and breathing of the table are no unevenness.
    wobble = np.arange(8) * 5 + RNG.uniform(-0.2, 0.2, 8)
    assert only(read(make.save(make.series(VOLUME, places=wobble), tmp_path / "b"))).meta["uniform"]


def test_slices_off_the_line_are_refused(tmp_path):
    slices = make.series(VOLUME)
    slices[3].ImagePositionPatient = [5.0, -20.0, 36.0]
    scans, rejects = read(make.save(slices, tmp_path))
    assert scans == [] and reasons(rejects) == {"inconsistent"}


def test_slabs_far_apart_become_scans(tmp_path):
    slices = make.series(VOLUME, places=[0, 2, 4, 6, 100, 102, 104, 106])
    scans, rejects = read(make.save(slices, tmp_path))
    assert rejects == [] and [s.voxels.shape[0] for s in scans] == [4, 4]
    assert all("several-slabs" in notes(s) for s in scans)
    assert scans[1].affine[2, 3] - scans[0].affine[2, 3] == pytest.approx(100)


@pytest.mark.parametrize(
    "change",
    [
        {"ImageOrientationPatient": list(make.OBLIQUE)},
        {"EchoTime": 80.0},
        {"ImageType": ["ORIGINAL", "PRIMARY", "P"]},
        {"PixelSpacing": [0.5, 0.5]},
    ],
)
def test_mixed_series_is_split_in_stacks(tmp_path, change):
    first = make.series(VOLUME, EchoTime=20.0)
    second = make.edited(make.series(VOLUME + 1, EchoTime=20.0), **change)
    if "ImageOrientationPatient" in change:
        second = make.series(VOLUME + 1, orientation=make.OBLIQUE, EchoTime=20.0)
    scans, rejects = read(make.save([*first, *second], tmp_path))
    assert rejects == [] and len(scans) == 2 and all("several-stacks" in notes(s) for s in scans)
    assert {int(s.voxels[0, 0, 0]) - int(VOLUME[0, 0, 0]) for s in scans} == {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        {"AcquisitionNumber": 2},
        {"DiffusionBValue": 1000.0},
        {"TemporalPositionIdentifier": 2},
        {"AcquisitionTime": "101112"},
        {"InstanceNumber": lambda k: 40 + k},
    ],
)
def test_repeated_positions_become_volumes(tmp_path, change):
    base = {
        "AcquisitionNumber": 1,
        "DiffusionBValue": 0.0,
        "TemporalPositionIdentifier": 1,
        "AcquisitionTime": "101010",
    }
    first = make.series(VOLUME, **{k: v for k, v in base.items() if k in change})
    second = make.edited(first, **change)
    for ds, plane in zip(second, VOLUME + 1):
        ds.PixelData = plane.tobytes()
    scans, rejects = read(make.save([*first, *second], tmp_path))
    assert rejects == [] and [s.meta["volume"] for s in scans] == [0, 1]
    assert np.array_equal(scans[0].voxels, VOLUME) and np.array_equal(scans[1].voxels, VOLUME + 1)
    assert all("several-volumes" in notes(s) for s in scans)
    if "DiffusionBValue" in change:
        assert [s.meta["b_value"] for s in scans] == [0.0, 1000.0] and scans[1].name == "dwi"
    assert len(read(make.save([*first, *second], tmp_path), max_volumes=1)[0]) == 1


def test_a_volume_stored_twice_is_one_scan(tmp_path):
    first = make.series(VOLUME)
    scan = only(read(make.save([*first, *make.edited(first, InstanceNumber=lambda k: 70 + k)], tmp_path)))
    assert np.array_equal(scan.voxels, VOLUME) and notes(scan) == {"duplicate-slices"}


def test_too_few_slices(tmp_path):
    scans, rejects = read(make.save(make.series(VOLUME), tmp_path), min_slices=9)
    assert scans == [] and reasons(rejects) == {"too-few-slices"}


# --- values ---------------------------------------------------------------------------------------------------------


def test_rescaling(tmp_path):
    raw = VOLUME.astype(np.uint16)
    ct = make.series(raw, modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    scan = only(read(make.save(ct, tmp_path / "ct")))
    assert scan.voxels.dtype == np.int16 and np.array_equal(scan.voxels, raw.astype(np.int16) - 1024)
    assert scan.meta["units"] == "HU" and scan.name == "ct"
    # Philips MR: a slope of its own for every slice.
    mr = make.edited(make.series(raw), RescaleSlope=lambda k: 0.5 + k / 8, RescaleIntercept=1)
    scan = only(read(make.save(mr, tmp_path / "mr")))
    want = raw * (0.5 + np.arange(8) / 8)[:, None, None] + 1
    assert scan.voxels.dtype == np.float32
    np.testing.assert_allclose(scan.voxels, want, rtol=1e-6)
    big = make.series(raw + 65000 - raw.max(), modality="CT", RescaleSlope=2, RescaleIntercept=0)
    assert only(read(make.save(big, tmp_path / "big"))).voxels.max() == 130000  # does not fit 16 bits: float32


def test_monochrome1_is_inverted_unless_the_numbers_have_a_meaning(tmp_path):
    twelve = {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1"}
    raw = VOLUME.astype(np.uint16)
    scan = only(read(make.save(make.series(raw, **twelve), tmp_path / "mr")))
    assert np.array_equal(scan.voxels, 4095 - raw) and notes(scan) == {"inverted"}
    scan = only(read(make.save(make.series(raw, modality="CT", RescaleSlope=1, **twelve), tmp_path / "ct")))
    assert np.array_equal(scan.voxels, raw) and scan.notes == []


def test_bits_above_the_stored_ones_are_cleared(tmp_path):
    overlay = VOLUME.astype(np.uint16) | np.uint16(0xF000)
    slices = make.series(overlay, BitsStored=12, HighBit=11)
    assert np.array_equal(only(read(make.save(slices, tmp_path))).voxels, VOLUME)
    signed = make.series((VOLUME - 500) & np.int16(0x0FFF), BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert np.array_equal(only(read(make.save(signed, tmp_path / "s"))).voxels, VOLUME - 500)


# --- what is no scan ------------------------------------------------------------------------------------------------


def test_localizers_are_dropped(tmp_path):
    options = [
        make.series(VOLUME, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        make.series(VOLUME, SeriesDescription="AAHead_Scout_32ch"),
        make.series(VOLUME, SeriesDescription="3-plane Loc"),
        [s for o in (make.AXIAL, make.CORONAL, make.SAGITTAL) for s in make.series(VOLUME[:3], orientation=o)],
    ]
    for n, slices in enumerate(options):
        paths = make.save(slices, tmp_path / str(n))
        scans, rejects = read(paths)
        assert scans == [] and [(r.reason, r.kind, r.files) for r in rejects] == [("localizer", "series", len(paths))]
        assert read(paths, localizers=True)[0]
    assert not names.is_localizer(["ORIGINAL"], "T1 local shim brain")


def test_geometry_that_is_absent(tmp_path):
    bare = make.edited(make.series(VOLUME), ImagePositionPatient=None, ImageOrientationPatient=None)
    paths = make.save(bare, tmp_path / "a")
    scans, rejects = read(paths)
    assert scans == [] and reasons(rejects) == {"no-geometry"}
    scan = only(read(paths, require_geometry=False))
    assert np.array_equal(scan.voxels, VOLUME) and notes(scan) == {"order-from-numbers"}
    # Orientation and slice locations are enough for a stack, not for its place in the patient.
    located = make.edited(make.series(VOLUME), ImagePositionPatient=None, SliceLocation=lambda k: 30.0 - 3 * k)
    scan = only(read(make.save(located, tmp_path / "b")))
    assert np.array_equal(scan.voxels, VOLUME[::-1]) and notes(scan) == {"no-orientation"} and scan.meta["step"] == 3
    for change in ({"PixelSpacing": None}, {"PixelSpacing": [0, 0]}, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}):
        paths = make.save(make.edited(make.series(VOLUME), **change), tmp_path / str(change))
        scans, rejects = read(paths)
        assert scans == [] and reasons(rejects) == {"no-geometry"}


def test_projection_images(tmp_path):
    pixels = RNG.integers(0, 4096, (9, 7)).astype(np.uint16)
    common = {"modality": "CR", "BitsStored": 12, "HighBit": 11, "SliceThickness": None}
    a = make.image(
        pixels, PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.1], PhotometricInterpretation="MONOCHROME1", **common
    )
    b = make.image(pixels, PixelSpacing=[0, 0], InstanceNumber=2, PhotometricInterpretation="MONOCHROME1", **common)
    scans, rejects = read(make.save([a, b], tmp_path, names=["a", "b"]))
    assert rejects == [] and [s.voxels.shape for s in scans] == [(1, 9, 7)] * 2
    assert all(np.array_equal(s.voxels[0], 4095 - pixels) and s.meta["planar"] for s in scans)
    assert scans[0].meta["spacing"] == [1.0, 0.2, 0.1] and notes(scans[1]) == {"planar", "inverted", "no-spacing"}
    assert np.linalg.norm(scans[0].affine[:3, :3], axis=0) == pytest.approx([1.0, 0.2, 0.1])
    assert read([tmp_path / "a"], planar=False)[0] == []


def enhanced(volume, *, times=1, slope=None) -> Dataset:
    """An enhanced MR object: frames of all times, last slice first, geometry per frame."""
    frames = [(t, k) for t in range(times) for k in reversed(range(len(volume)))]
    ds = make.image(np.stack([volume[k] + t for t, k in frames]), PixelSpacing=None, SliceThickness=None)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"

    def item(**elements) -> Dataset:
        result = Dataset()
        for key, value in elements.items():
            setattr(result, key, value)
        return result

    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([item(PixelSpacing=[0.8, 0.6], SliceThickness=2.0)])
    shared.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=list(make.CORONAL))])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for t, k in frames:
        group = Dataset()
        position = np.cross(make.CORONAL[:3], make.CORONAL[3:]) * 3.0 * k
        group.PlanePositionSequence = Sequence([item(ImagePositionPatient=[float(v) for v in position])])
        group.FrameContentSequence = Sequence([item(StackID="1", TemporalPositionIndex=t + 1)])
        if slope is not None:
            values = item(RescaleSlope=slope[k], RescaleIntercept=0, RescaleType="US")
            group.PixelValueTransformationSequence = Sequence([values])
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return ds


def test_enhanced_multi_frame(tmp_path):
    slices = make.series(VOLUME, orientation=make.CORONAL, origin=(0, 0, 0), step=3.0)
    scan = only(read(make.save([enhanced(VOLUME)], tmp_path)))
    assert np.array_equal(scan.voxels, VOLUME)
    np.testing.assert_allclose(scan.affine, make.expected_affine(slices), atol=1e-6)
    scans, rejects = read(make.save([enhanced(VOLUME, times=3)], tmp_path))
    assert rejects == [] and [int((s.voxels - VOLUME).max()) for s in scans] == [0, 1, 2]
    slope = [0.25 * (k + 1) for k in range(8)]
    scan = only(read(make.save([enhanced(VOLUME, slope=slope)], tmp_path)))
    np.testing.assert_allclose(scan.voxels, VOLUME * np.array(slope)[:, None, None], rtol=1e-6)
    broken = enhanced(VOLUME)
    del broken.PerFrameFunctionalGroupsSequence[5:]
    assert reasons(read(make.save([broken], tmp_path))[1]) == {"inconsistent"}


def test_files_without_meta_header_and_gzipped(tmp_path):
    slices = make.series(VOLUME)
    paths = [make.save_bare(ds, tmp_path / f"{k}.ima") for k, ds in enumerate(slices)]
    assert np.array_equal(only(read(paths)).voxels, VOLUME)
    for path in paths:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert np.array_equal(only(read(paths)).voxels, VOLUME)
    studies, rejects = find_studies([tmp_path], salt="pepper-and-salt")
    assert len(studies) == 1 and rejects == []


@pytest.mark.parametrize(
    "damage",
    [
        {"Rows": 60000},
        {"BitsAllocated": 12},
        {"PixelData": b""},
        {"PhotometricInterpretation": "NONSENSE"},
        lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"),  # says RLE, is not
    ],
)
def test_damaged_files_never_raise_and_never_cost_the_others(tmp_path, damage):
    slices = make.series(VOLUME)
    paths = make.save(slices, tmp_path, names=[f"s{k}" for k in range(8)])
    if callable(damage):
        paths[5].write_bytes(damage(paths[5].read_bytes()))
    else:
        ds = make.edited(slices[5:6], **damage)[0]
        pydicom.dcmwrite(paths[5], ds, enforce_file_format=False)
    scans, rejects = read(paths)
    assert len(scans) == 1 and scans[0].voxels.shape[0] == 8
    assert np.array_equal(scans[0].voxels[:5], VOLUME[:5])
    assert all("Doe" not in str(r) and "MRN00471" not in str(r) for r in rejects)


def test_random_bytes_never_raise(tmp_path):
    good = make.save(make.series(VOLUME), tmp_path / "good")[0].read_bytes()
    for n in range(60):
        data = bytearray(good)
        for at in RNG.integers(132, len(data), 12):
            data[at] = RNG.integers(256)
        path = tmp_path / f"f{n}"
        path.write_bytes(bytes(data[: RNG.integers(140, len(data))] if n % 3 == 0 else data))
        scans, rejects = read(path)
        assert scans or rejects
    studies, _ = find_studies([tmp_path], salt="pepper-and-salt")
    assert studies


# --- NIfTI and NRRD -------------------------------------------------------------------------------------------------


def nifti(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(array, np.diag([2.0, 3, 4, 1]) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def patch(path, at, data) -> Path:
    """Overwrites bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)
    return path


def test_nifti_axes_and_affine(tmp_path):
    affine = np.array([[-1.0, 0.2, 0, 10], [0.1, 2, 0.3, -20], [0, 0.1, 3, 5], [0, 0, 0, 1]])
    array = VOLUME.transpose(2, 1, 0)
    for name in ("a_t1w.nii", "b_FLAIR.nii.gz"):
        scan = only(read(nifti(tmp_path / name, array, affine), "nifti"))
        assert np.array_equal(scan.voxels, VOLUME) and scan.voxels.dtype == np.int16 and scan.modality == "MR"
        np.testing.assert_allclose(scan.affine @ [7, 2, 3, 1], affine @ [3, 2, 7, 1], atol=1e-5)
        assert scan.name == ("t1w" if "t1w" in name else "flair")


def test_nifti_values(tmp_path):
    path = tmp_path / "x.nii"
    array = VOLUME.transpose(2, 1, 0)
    patch(nifti(path, array), 112, np.array([2.0, -1024.0], "<f4").tobytes())  # scl_slope, scl_inter
    scan = only(read(path, "nifti"))
    assert scan.voxels.dtype == np.int16 and np.array_equal(scan.voxels, VOLUME * 2 - 1024)
    floats = array.astype(np.float64)
    floats[0, 0, 0] = np.nan
    scan = only(read(nifti(path, floats), "nifti"))
    assert scan.voxels.dtype == np.float32 and scan.voxels[0, 0, 0] == 0 and "non-finite" in notes(scan)
    scans, rejects = read(nifti(path, np.stack([array, array + 1], -1)), "nifti")
    assert rejects == [] and [s.meta["volume"] for s in scans] == [0, 1] and np.array_equal(scans[1].voxels, VOLUME + 1)
    colour = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert reasons(read(nifti(path, colour), "nifti")[1]) == {"colour-image"}
    assert reasons(read(nifti(path, array.astype(np.complex64)), "nifti")[1]) == {"colour-image"}
    scan = only(read(nifti(path, array, np.diag([0.002, 0.003, 0.004, 1]), xyzt_units=1), "nifti"))
    assert scan.meta["spacing"] == pytest.approx([4, 3, 2], rel=1e-5)
    patch(nifti(path, array), 252, bytes(4))  # qform_code, sform_code
    assert notes(only(read(path, "nifti"))) == {"no-orientation"}
    patch(nifti(path, array), 296, bytes(16))  # a row of the sform
    assert reasons(read(path, "nifti")[1]) == {"no-geometry"}
    nifti(tmp_path / "y.nii.gz", array)
    (tmp_path / "y.nii.gz").write_bytes((tmp_path / "y.nii.gz").read_bytes()[:-60])
    assert reasons(read(tmp_path / "y.nii.gz", "nifti")[1]) == {"truncated-pixel-data"}
    nifti(path, array)
    path.write_bytes(path.read_bytes()[:-50])
    assert reasons(read(path, "nifti")[1]) == {"truncated-pixel-data"}


def test_nifti_files_that_nibabel_ships():
    scans, _ = read(NIBABEL / "tests" / "data" / "example4d.nii.gz", "nifti")
    assert [s.voxels.shape for s in scans] == [(24, 96, 128)] * 2
    want = nibabel.load(NIBABEL / "tests" / "data" / "example4d.nii.gz")
    np.testing.assert_allclose(scans[1].affine @ [3, 2, 1, 1], want.affine @ [1, 2, 3, 1], atol=1e-4)
    scan = only(read(NIBABEL / "tests" / "data" / "anatomical.nii", "nifti"))
    assert scan.voxels.shape == (25, 41, 33) and scan.voxels.dtype == np.dtype("=i2") and scan.voxels.min() < 0


@pytest.mark.parametrize("space", ["left-posterior-superior", "RAS", "scanner-xyz", None])
def test_nrrd(tmp_path, space):
    array = VOLUME.transpose(2, 1, 0)
    header = {"encoding": "gzip", "kinds": ["domain"] * 3}
    if space:
        directions = np.array([[0.5, 0, 0], [0, 0.6, 0.1], [0, 0, 3.0]])
        header |= {"space": space, "space directions": directions, "space origin": [1.0, 2, 3]}
    else:
        header["spacings"] = [0.5, 0.6, 3.0]
    nrrd.write(str(tmp_path / "t2w.nrrd"), array, header, index_order="F")
    scan = only(read(tmp_path / "t2w.nrrd", "nrrd"))
    assert np.array_equal(scan.voxels, VOLUME) and scan.name == "t2w"
    assert notes(scan) == (set() if space in ("left-posterior-superior", "RAS") else {"no-orientation"})
    if space:
        sides = np.array([-1, -1, 1]) if space == "left-posterior-superior" else np.ones(3)
        want = sides * (np.array([1.0, 2, 3]) + directions.T @ [1, 2, 3])
        np.testing.assert_allclose((scan.affine @ [3, 2, 1, 1])[:3], want, atol=1e-9)


def test_nrrd_lists_and_damage(tmp_path):
    array = np.stack([VOLUME, VOLUME + 1]).transpose(0, 3, 2, 1)  # the list axis is the fastest
    header = {
        "space": "left-posterior-superior",
        "kinds": ["list", "domain", "domain", "domain"],
        "space directions": np.array([[np.nan] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 2]]),
        "space origin": [0.0, 0, 0],
    }
    path = tmp_path / "dwi.nrrd"
    nrrd.write(str(path), array, header, index_order="F")
    scans, rejects = read(path, "nrrd")
    assert rejects == [] and np.array_equal(scans[1].voxels, VOLUME + 1)
    path.write_bytes(path.read_bytes()[:-60])
    assert reasons(read(path, "nrrd")[1]) == {"truncated-pixel-data"}


# --- discovery ------------------------------------------------------------------------------------------------------

SALT = "a-salt-for-tests"


def two_studies(folder: Path) -> None:
    """Two studies, three series, all slices mixed in one folder and without extensions."""
    a = make.series(VOLUME, StudyInstanceUID=make.uid("A"), SeriesInstanceUID=make.uid("a1"), SeriesNumber=7)
    b = make.series(VOLUME, StudyInstanceUID=make.uid("A"), SeriesInstanceUID=make.uid("a2"), SeriesNumber=2)
    c = make.series(VOLUME[:4], StudyInstanceUID=make.uid("B"), SeriesInstanceUID=make.uid("b1"), PatientID="OTHER77")
    c = make.edited(c, AccessionNumber="ACC-1138")
    make.save([*a, *b, *c], folder)


def test_mixed_studies_in_a_folder_and_a_zip(tmp_path):
    two_studies(tmp_path / "in" / "deep")
    (tmp_path / "in" / "notes.txt").write_text("hello")
    (tmp_path / "in" / "empty").touch()
    shutil.copy(PYDICOM / "dicomdirtests" / "DICOMDIR", tmp_path / "in" / "DICOMDIR")
    shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "in")
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT)
    assert sorted(len(s.series) for s in studies) == [1, 2]
    large = max(studies, key=lambda s: len(s.series))
    assert [len(s.files) for s in large.series] == [8, 8] and large.patient != large.key
    assert {(r.path, r.reason) for r in rejects} == {
        ("in/notes.txt", "not-an-image"),
        ("in/empty", "empty-file"),
        ("in/DICOMDIR", "dicomdir"),
    }
    zipped, refused = find_studies([tmp_path / "all.zip"], salt=SALT)
    assert [(s.key, s.patient, [x.key for x in s.series]) for s in zipped] == [
        (s.key, s.patient, [x.key for x in s.series]) for s in studies
    ]
    assert len(refused) == 3
    for mine, theirs in zip(studies, zipped):
        for p, q in zip(mine.series, theirs.series):
            assert np.array_equal(read_scans(p)[0][0].voxels, read_scans(q)[0][0].voxels)
    other, _ = find_studies([tmp_path / "in"], salt="another-salt")
    assert not {s.key for s in other} & {s.key for s in studies}
    with ThreadPoolExecutor(2) as pool:
        assert find_studies([tmp_path / "in"], salt=SALT, map_fn=pool.map)[0] == studies


def test_both_sources_and_a_file_by_itself(tmp_path):
    two_studies(tmp_path / "x" / "data")
    nifti(tmp_path / "t1.nii.gz", VOLUME)
    for source in ("x/data", "y/data"):
        (tmp_path / source).mkdir(parents=True, exist_ok=True)
        nifti(tmp_path / source / "scan.nii", VOLUME)
    studies, rejects = find_studies([tmp_path / "x/data", tmp_path / "y/data", tmp_path / "t1.nii.gz"], salt=SALT)
    assert len(studies) == 5 and len({s.key for s in studies}) == 5 and rejects == []
    with pytest.raises(UserError, match="nowhere"):
        find_studies([tmp_path / "nowhere"], salt=SALT)
    (tmp_path / "none").mkdir()
    studies, rejects = find_studies([tmp_path / "none"], salt=SALT)
    assert studies == [] and [(r.kind, r.reason) for r in rejects] == [("source", "no-images")]


def test_zips_that_are_hostile_or_broken(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as z:
        z.writestr("a", "b")
    good = make.save(make.series(VOLUME)[:1], tmp_path / "in")[0].read_bytes()
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        z.writestr("../../escape.dcm", good)
        z.writestr("/etc/absolute.dcm", good)
        z.writestr("inner.zip", inner.getvalue())
        z.writestr("fine", good)
        z.writestr("secret", good)
    data = (tmp_path / "evil.zip").read_bytes()
    at = data.rfind(b"PK\x01\x02")  # the central entry of the last member: mark it as encrypted
    (tmp_path / "evil.zip").write_bytes(data[: at + 8] + bytes([data[at + 8] | 1]) + data[at + 9 :])
    (tmp_path / "cut.zip").write_bytes(data[:200])
    (tmp_path / "scans.tar.gz").write_bytes(gzip.compress(b"x" * 600))
    studies, rejects = find_studies([tmp_path / n for n in ("evil.zip", "cut.zip", "scans.tar.gz")], salt=SALT)
    assert [len(s.series) for s in studies] == [1]
    found = {(r.path, r.reason) for r in rejects if r.kind == "file"}
    assert found == {
        ("evil.zip!/../../escape.dcm", "unsafe-path"),
        ("evil.zip!//etc/absolute.dcm", "unsafe-path"),
        ("evil.zip!/inner.zip", "nested-archive"),
        ("evil.zip!/secret", "encrypted"),
        ("cut.zip", "unreadable"),
        ("scans.tar.gz", "nested-archive"),
    }
    assert not (tmp_path.parent / "escape.dcm").exists()


def test_volumes_in_zips(tmp_path):
    nifti(tmp_path / "v.nii.gz", VOLUME.transpose(2, 1, 0))
    nrrd.write(str(tmp_path / "w.nrrd"), VOLUME.transpose(2, 1, 0), {"spacings": [1, 1, 1]}, index_order="F")
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as z:
        z.write(tmp_path / "v.nii.gz", "sub/v.nii.gz")
        z.write(tmp_path / "w.nrrd", "sub/w.nrrd")
    studies, rejects = find_studies([tmp_path / "v.zip"], salt=SALT)
    assert rejects == [] and [s.kind for s in studies[0].series] == ["nifti", "nrrd"]
    for series in studies[0].series:
        assert np.array_equal(only(read_scans(series)).voxels, VOLUME)


def test_bids_tree(tmp_path):
    for place in ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-01/ses-a/anat/sub-01_ses-a_FLAIR"):
        (tmp_path / "bids" / place).parent.mkdir(parents=True, exist_ok=True)
        nifti(tmp_path / "bids" / f"{place}.nii.gz", VOLUME)
    for place in (
        "sub-01/ses-b/anat/sub-01_ses-b_T1w",
        "sub-02/anat/sub-02_T2w",
        "derivatives/x/sub-01/anat/sub-01_desc_T1w",
    ):
        (tmp_path / "bids" / place).parent.mkdir(parents=True, exist_ok=True)
        nifti(tmp_path / "bids" / f"{place}.nii.gz", VOLUME)
    nifti(tmp_path / "bids/sub-02/anat/sub-02_desc-lesion_mask.nii.gz", VOLUME)
    (tmp_path / "bids/sub-02/anat/sub-02_T2w.json").write_text("{}")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tage\nsub-01\t33\nsub-02\t44\nsub-03\t55\n")
    manifest = tmp_path / "labels.tsv"
    manifest.write_text(
        "participant_id\tsession_id\tlabel:ill\treport\n01\ta\t1\tA lesion.\nsub-01\tses-b\t0\t\nsub-02\t\t\tNothing.\n"
    )
    studies, rejects = find_studies([tmp_path / "bids"], salt=SALT, manifest=manifest)
    assert sorted(len(s.series) for s in studies) == [1, 1, 2] and len({s.patient for s in studies}) == 2
    two = max(studies, key=lambda s: len(s.series))
    assert two.labels == {"ill": 1.0} and two.sentences == ["A lesion."]
    assert [only(read_scans(s)).name for s in two.series] == ["flair", "t1w"]
    assert {(r.path.split("/")[-1], r.reason, r.kind) for r in rejects} == {
        ("sub-01_desc_T1w.nii.gz", "bids-derivative", "file"),
        ("sub-02_desc-lesion_mask.nii.gz", "segmentation", "file"),
        ("sub-02_T2w.json", "sidecar", "file"),
        ("participants.tsv", "sidecar", "file"),
        ("participants.tsv", "no-images", "participant"),
    }
    kept, _ = find_studies([tmp_path / "bids"], salt=SALT, skip_names="")
    assert sum(len(s.series) for s in kept) == 5


def test_a_folder_is_a_study_unless_the_manifest_says_otherwise(tmp_path):
    for name in ("case1/t1.nii", "case1/t2.nii", "case2/t1.nii", "flat/x.nii", "flat/y.nii", "flat/z.nii"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        nifti(tmp_path / "in" / name, VOLUME)
    studies, _ = find_studies([tmp_path / "in"], salt=SALT)
    assert sorted(len(s.series) for s in studies) == [1, 2, 3]
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "path,study,split,patient,label:a,report\nin/case1,,train,p1,1,One.\nin/flat/x.nii,s,val,p2,,X.\n"
        "in/flat/y.nii,s,,,0,Y.\nin/flat/z.nii,,test,p2,,\nin/gone.nii,,,,,\n"
    )
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT, manifest=manifest)
    by_split = {s.split: s for s in studies}
    assert {k: len(s.series) for k, s in by_split.items()} == {"train": 2, "val": 2, "test": 1, "": 1}
    assert by_split["val"].sentences == ["X.", "Y."] and by_split["val"].labels == {"a": 0.0}
    assert by_split["val"].patient == by_split["test"].patient != by_split["train"].patient
    assert {(r.path, r.reason, r.kind) for r in rejects} == {
        ("m.csv:6", "row-without-study", "manifest"),
        (by_split[""].key, "study-without-row", "study"),
    }


def test_manifest_finds_dicom_by_uid_accession_and_path(tmp_path):
    two_studies(tmp_path / "in")
    rows = [
        {"StudyInstanceUID": make.uid("A"), "report": ["One.", "Two."], "labels": {"x": True, "y": None}},
        {"AccessionNumber": "ACC-1138", "report": "Three. Four.", "split": "val"},
    ]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT, manifest=tmp_path / "m.json")
    assert rejects == []
    assert {tuple(s.sentences): (s.labels, s.split) for s in studies} == {
        ("One.", "Two."): ({"x": 1.0}, ""),
        ("Three.", "Four."): ({}, "val"),
    }
    # A folder that holds two studies names neither.
    (tmp_path / "m.jsonl").write_text('{"path": "in", "report": "Which?"}\n')
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT, manifest=tmp_path / "m.jsonl")
    assert all(s.sentences == [] for s in studies) and [r.reason for r in rejects] == ["ambiguous-row"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.csv", "path,label:a\nx,maybe\n", "line 2, column 'label:a'"),
        ("m.csv", "path,report\na,b\nc,d,e\n", "line 3: 3 cells but 2 columns"),
        ("m.csv", 'path,report\na,"b\n', "line 2: not valid CSV"),
        ("m.csv", "report,split\nx,train\n", "line 2: nothing names the study"),
        ("m.csv", "path,path\na,b\n", "'path' appears twice"),
        ("m.csv", "path\n", "no rows"),
        ("m.json", '[{"path": "a"},]', "line 1, column 16"),
        ("m.json", '{"path": "a"}', "list of objects"),
        ("m.json", '[{"path": "a", "report": 5}]', "line 1, column 'report'"),
        ("m.json", '[{"path": "a", "labels": [1]}]', "column 'labels'"),
        ("m.jsonl", '{"path": "a"}\n{"path": "b",}', "line 2, column 14"),
        ("m.txt", "path", "unknown kind"),
    ],
)
def test_manifest_errors_name_the_place(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as e:
        read_manifest(tmp_path / name)
    assert said in str(e.value) and name in str(e.value)


def test_rows_that_contradict_each_other(tmp_path):
    nifti(tmp_path / "a.nii", VOLUME)
    (tmp_path / "m.csv").write_text("path,label:x\na.nii,1\na.nii,0\n")
    with pytest.raises(UserError, match=r"line 3, column 'label:x'"):
        find_studies([tmp_path / "a.nii"], salt=SALT, manifest=tmp_path / "m.csv")
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("report", "sentences"),
    [
        ("No infarct. A 1.5 cm mass. Done", ["No infarct.", "A 1.5 cm mass.", "Done"]),
        (
            "FINDINGS:\nMass seen\nin the lobe.\n\nIMPRESSION:\n1. Bleed.\n2) Old infarct",
            ["Mass seen in the lobe.", "Bleed.", "Old infarct"],
        ),
        ("Seen by Dr. Smith, cf. Fig. 2. Is it new? Yes!", ["Seen by Dr. Smith, cf. Fig. 2.", "Is it new?", "Yes!"]),
        ("- one\n- two\r\n- three", ["one", "two", "three"]),
        (" \n ", []),
    ],
)
def test_sentences(report, sentences):
    assert split_sentences(report) == sentences


def test_nothing_identifies_the_patient(tmp_path):
    folder = tmp_path / "in" / "Doe_Jane" / "MRN00471" / "2021-03-04"
    slices = make.series(VOLUME, SeriesDescription="T1 for Mrs Doe", ProtocolName="Doe special", BodyPartExamined="DOE")
    slices[0] = make.image(VOLUME[0].astype(np.uint8), PatientComments="Jane was late", Rows=600)
    make.save(slices, folder)
    bad = pydicom.dcmread(make.save(slices[1:2], tmp_path / "in" / "Q", names=[f"{slices[1].SOPInstanceUID}.dcm"])[0])
    bad.Modality = "SR"
    bad.save_as(tmp_path / "in" / "Q" / f"{slices[1].SOPInstanceUID}.dcm")
    (folder / "readme.txt").write_text("Jane")
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT)
    for study in studies:
        for series in study.series:
            scans, more = read_scans(series)
            rejects = rejects + more
            said = repr([(s.name, s.modality, s.meta, s.notes) for s in scans])
            assert not any(word in said.lower() for word in ("doe", "jane", "mrn", "2021"))
    written = repr(rejects) + repr([(s.key, s.patient, [x.key for x in s.series]) for s in studies])
    written += repr([f.shown for s in studies for x in s.series for f in x.files])
    assert len(rejects) >= 2
    for word in ("doe", "jane", "mrn00471", "2021", "1947", slices[0].StudyInstanceUID, slices[1].SOPInstanceUID):
        assert word.lower() not in written.lower()
    assert "in/~" in written and "readme.txt" in written
    hashed, refused = find_studies([tmp_path / "in"], salt=SALT, paths="hash")
    assert "readme" not in repr(refused) and hashed[0].key == studies[0].key
    with pytest.raises(UserError, match="redact"):
        find_studies([tmp_path / "in"], salt=SALT, paths="all")


def test_links_and_lost_rights(tmp_path):
    two_studies(tmp_path / "in")
    os.symlink(tmp_path / "nothing", tmp_path / "in" / "dangling")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT)
    assert len(studies) == 2 and {(r.path, r.reason) for r in rejects} == {
        ("in/dangling", "unreadable"),
        ("in/loop", "unreadable"),
    }


@pytest.mark.parametrize(
    ("text", "timing", "token"),
    [
        ("AX T2 FLAIR", {}, "flair"),
        ("ep2d_diff_3scan_trace_ADC", {}, "adc"),
        ("ep2d_diff_b1000", {}, "dwi"),
        ("t1_mprage_sag", {}, "t1w"),
        ("t1_mprage_sag", {"contrast": True}, "t1c"),
        ("AX T1 POST GAD", {}, "t1c"),
        ("SWI_Images", {}, "swi"),
        ("", {"te": 90, "tr": 4000}, "t2w"),
        ("", {"te": 100, "tr": 9000, "ti": 2500}, "flair"),
        ("", {"te": 12, "tr": 500}, "t1w"),
        ("", {"te": 20, "tr": 2500}, "pd"),
        ("", {"te": 20, "tr": 600, "gradient_echo": True}, "t2star"),
        ("Patient1 something", {}, "unknown"),
    ],
)
def test_names_are_tokens(text, timing, token):
    assert names.guess("MR", text, **timing) == token


def test_an_unknown_reason_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="unknown reject reason"):
        Rejected("no-such-reason")
