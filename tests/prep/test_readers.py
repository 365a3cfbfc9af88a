"""Readers on small series made here: every rule of stacking, rescaling and refusing, without downloads."""

import gzip
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from jaxmed.prep import names
from jaxmed.prep.discover import find_studies
from jaxmed.prep.scan import Rejected
from tests.prep import make_series as make
from tests.prep.reading import nifti, notes, only, read, reasons

RNG = np.random.default_rng(7)
VOLUME = RNG.integers(0, 1000, (8, 6, 5)).astype(np.int16)
NIBABEL = Path(nibabel.__file__).parent


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
    scan = only(read(paths))
    assert np.array_equal(scan.voxels, VOLUME) and notes(scan) == {"no-meta-header"}
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


def test_random_bytes_never_raise_and_never_reach_a_log(tmp_path, caplog, capfd):
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
    assert studies and caplog.text == "" and capfd.readouterr() == ("", "")


# --- NIfTI and NRRD -------------------------------------------------------------------------------------------------


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
