"""Ways in and ways back on real files: folders, zips, trees and tables as `TABLE` of `test_real_files` has kinds of
series, and maps that return from the grid of a recipe to the voxels of the scan.
"""

import dataclasses
import functools
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest

from jaxmed.data import ops, shards
from jaxmed.prep.__main__ import main
from jaxmed.prep.discover import find_studies
from jaxmed.prep.scan import RawScan, read_scans
from tests.prep import make_series as make
from tests.prep.test_real_files import BODY, BRAIN, SHIPPED, dcm2niix, locate, same_place

# Four series of four studies, one of them a mosaic, one JPEG 2000.
MIXED = ("pydicom-data/693_J2KR.dcm", "shipped:pydicom/MR_small.dcm", "heudiconv/axasc35.dcm", BODY)
MIXED_SHAPES = [(1, 64, 64), (1, 512, 512), (20, 512, 512), (35, 64, 64)]


@dataclasses.dataclass(frozen=True)
class Way:
    """One line of the table: `build` fills a folder and gives the sources and the options of `find_studies`.

    `studies`: number of scans of each (of series if none is read). `shapes`: of the scans, [] reads none. `rejects`:
    (reason, kind). `dcm2niix`: the scans are where its images of the same files are; else, for NIfTI and NRRD, where
    the file's own affine says.
    """

    kind: str
    build: Callable[[Path], tuple[list[Path], dict]]
    studies: list[int]
    shapes: list[tuple[int, int, int]]
    rejects: Sequence[tuple[str, str]] = ()
    dcm2niix: bool = True


def _mixed(folder: Path) -> tuple[list[Path], dict]:
    (folder / "dicom").mkdir()
    for n, path in enumerate(p for name in MIXED for p in locate(name)):
        shutil.copy(path, folder / "dicom" / f"I{(n * 7919) % 1000:04}")
    return [folder / "dicom"], {}


def _zip(folder: Path) -> tuple[list[Path], dict]:
    [source], _ = _mixed(folder)
    with zipfile.ZipFile(folder / "all.zip", "w") as z:
        for path in source.iterdir():
            z.write(path, f"export/{path.name}")
        z.writestr("export/readme.txt", "from the archive")
    return [folder / "all.zip"], {}


EPI, T1 = SHIPPED["nibabel"] / "example4d.nii.gz", SHIPPED["nibabel"] / "anatomical.nii"


def _bids(folder: Path) -> tuple[list[Path], dict]:
    root = folder / "bids"
    for path, place in (
        (EPI, "sub-01/ses-1/func/sub-01_ses-1_bold.nii.gz"),
        (T1, "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii"),
    ):
        (root / place).parent.mkdir(parents=True)
        shutil.copy(path, root / place)
    (root / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\n")
    return [root], {}


def _volumes(folder: Path) -> tuple[list[Path], dict]:
    (folder / "case").mkdir()
    shutil.copy(EPI, folder / "case")
    image = nibabel.load(T1)
    header = {"space": "right-anterior-superior", "space directions": image.affine[:3, :3].T}
    header["space origin"] = image.affine[:3, 3]
    voxels = np.asanyarray(image.dataobj).astype(np.int16)
    nrrd.write(str(folder / "case" / "anatomical.nrrd"), voxels, header, index_order="F")
    return [folder / "case"], {}


def _manifest(folder: Path) -> tuple[list[Path], dict]:
    sources, _ = _mixed(folder)
    uid = pydicom.dcmread(locate(MIXED[2])[0], stop_before_pixels=True).StudyInstanceUID
    (folder / "m.csv").write_text(f"StudyInstanceUID,report,label:ill\n{uid},A brain. Normal.,0\n1.2.3,Gone.,\n")
    return sources, {"manifest": folder / "m.csv"}


WAYS = [
    Way("folder: several studies and series mixed, no extensions", _mixed, [1, 1, 1, 1], MIXED_SHAPES),
    Way("zip of the same", _zip, [1, 1, 1, 1], MIXED_SHAPES, [("not-an-image", "file")]),
    Way(
        *("BIDS tree", _bids, [1, 2], [(24, 96, 128), (24, 96, 128), (25, 41, 33)]),
        [("sidecar", "file"), ("no-images", "participant")],
        dcm2niix=False,
    ),
    Way("NIfTI and NRRD", _volumes, [3], [(24, 96, 128), (24, 96, 128), (25, 41, 33)], dcm2niix=False),
    Way(
        *("manifest", _manifest, [1, 1, 1, 1], []),
        [("row-without-study", "manifest"), *[("study-without-row", "study")] * 3],
        dcm2niix=False,  # the files of the first line, not read again
    ),
]


@pytest.fixture(scope="module")
def mixed_by_dcm2niix(tmp_path_factory):
    return functools.cache(
        lambda: dcm2niix([p for name in MIXED for p in locate(name)], tmp_path_factory.mktemp("dcm2niix"))
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.kind)
def test_ways_in(way, tmp_path, mixed_by_dcm2niix):
    sources, options = way.build(tmp_path)
    studies, rejects = find_studies(sources, salt="salt-of-tests", paths="keep", **options)
    if not way.shapes:
        said = {tuple(s.sentences): s.labels for s in studies}
        assert said == {("A brain.", "Normal."): {"ill": 0.0}, (): {}}
        assert sorted(len(s.series) for s in studies) == way.studies
        assert sorted((r.reason, r.kind) for r in rejects) == sorted(way.rejects)
        return
    found: list[list[RawScan]] = []
    for study in studies:
        found.append([])
        for series in study.series:
            scans, more = read_scans(series)
            found[-1] += scans
            rejects += more
    assert sorted(len(f) for f in found) == way.studies
    scans = sorted((s for f in found for s in f), key=lambda s: s.voxels.shape)
    assert [s.voxels.shape for s in scans] == way.shapes
    assert sorted((r.reason, r.kind) for r in rejects) == sorted(way.rejects)
    if way.dcm2niix:
        for scan in scans:
            size = sorted(scan.voxels.shape)
            image = next(i for i in mixed_by_dcm2niix() if sorted((*i.shape, 1)[:3]) == size)
            values, apart = same_place(scan, image)
            assert apart < 0.01 and np.array_equal(values, scan.voxels)
    else:
        for scan in scans:
            affine = nibabel.load(T1 if scan.voxels.shape[0] == 25 else EPI).affine
            np.testing.assert_allclose(scan.affine @ [2, 3, 5, 1], affine @ [5, 3, 2, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "name", "voxel", "size", "value"),
    [
        ("hlip_brain_mri", BRAIN, (9, 140, 100), (1, 9, 7), 1500),
        ("hlip_brain_mri", BRAIN, (15, 60, 128), (1, 9, 7), 1500),
        ("hlip_chest_ct", BODY, (12, 150, 110), (3, 9, 11), 900),
        ("hlip_chest_ct", BODY, (5, 40, 180), (3, 9, 11), 900),
    ],
)
def test_a_marker_comes_back_to_its_voxel(recipe, name, voxel, size, value, tmp_path, monkeypatch):
    """A real series with and without a marker burnt into known pixels of known files goes through the command. What
    differs on the stored grid is the marker as a model sees it; written back it lies on the pixels that were changed.
    """
    monkeypatch.setenv("JAXMED_PREP_SALT", "a salt for tests only")
    slices = make.real_slices(locate(name), 256)
    slab, rows, columns = (slice(v - n // 2, v + n // 2 + 1) for v, n in zip(voxel, size))
    stored = {}
    for which, burnt in (("plain", 0), ("marked", value)):
        series = make.edited(slices)
        for ds in series[slab]:
            plane = np.frombuffer(ds.PixelData, np.int16).reshape(ds.Rows, ds.Columns).copy()
            plane[rows, columns] = (burnt - float(ds.get("RescaleIntercept", 0))) / float(ds.get("RescaleSlope", 1))
            ds.PixelData = plane.tobytes()
        make.save(series, tmp_path / which)
        assert (
            main([str(tmp_path / which), f"--out={tmp_path / 'out' / which}", f"--recipe={recipe}", "--workers=0"]) == 0
        )
        [stored[which]] = shards.open_dataset(tmp_path / "out" / which).read([0])[0]["scans"]
    scan = stored["marked"]
    np.testing.assert_array_equal(scan["affine"], stored["plain"]["affine"])
    heat = np.abs(scan["voxels"].astype(np.float32) - stored["plain"]["voxels"])
    assert scan["voxels"].shape in ((48, 224, 224), (112, 336, 336)) and heat.max() > 50
    place = scan["affine"], scan["source_affine"], scan["source_shape"]
    back = ops.back_to_source(heat, *place)
    assert back.shape == (len(slices), 256, 256)
    mask = ops.back_to_source(heat > heat.max() / 2, *place, nearest=True)
    for found in (mask, back * (back > back.max() / 2)):
        centre = (np.indices(found.shape) * found).reshape(3, -1).sum(1) / found.sum()
        assert np.abs(centre - voxel).max() < 0.5, centre
        changed = np.zeros(found.shape, bool)
        changed[slab, rows, columns] = True
        overlap = (changed & (found > 0)).sum() / (changed | (found > 0)).sum()
        assert overlap > 0.5, overlap
    # The voxel's place in the patient is the one that the header of its file gives.
    ds = slices[voxel[0]]
    x, y = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
    at = np.array(ds.ImagePositionPatient, float)
    at = at + x * float(ds.PixelSpacing[1]) * voxel[2] + y * float(ds.PixelSpacing[0]) * voxel[1]
    assert np.abs((scan["source_affine"] @ [*voxel, 1])[:3] - [-at[0], -at[1], at[2]]).max() < 0.15
    inside = np.linalg.inv(scan["affine"]) @ scan["source_affine"] @ [*voxel, 1]
    nearest = tuple(np.rint(inside[:3]).astype(int))
    assert heat[nearest] > heat.max() / 2
