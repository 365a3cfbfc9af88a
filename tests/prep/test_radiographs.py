"""`prep --recipe=radiograph`: made-up DICOM and picture files of every kind, and the real ones of the cache."""

import json

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from scipy import ndimage

from jaxmed.data import intensity, shards
from jaxmed.prep import collimation
from jaxmed.prep.__main__ import main
from jaxmed.prep.discover import find_studies
from jaxmed.prep.scan import FileRef, RawSeries, ReadOptions, read_scans
from tests.fetch_data import path_of
from tests.prep import make_series as make

OPTIONS = ReadOptions(projections=True)
DX = "1.2.840.10008.5.1.4.1.1.1.1"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@pytest.fixture(autouse=True)
def salt(monkeypatch):
    monkeypatch.setenv("JAXMED_PREP_SALT", "a salt for tests only")


def limb(shape=(120, 90), high=3000, seed=0) -> np.ndarray:
    """Something like a limb: bright, bone brighter, noise, dark air."""
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    flesh, bone = abs(x) < 0.6 + 0.1 * np.sin(3 * y), abs(x + 0.1 * y) < 0.2
    image = 0.05 + 0.4 * flesh + 0.4 * bone
    noise = np.random.default_rng(seed).normal(0, 0.01, shape)
    return (np.clip(ndimage.gaussian_filter(image, 1.5) + noise, 0, 1) * high).astype(np.uint16)


def radiograph(pixels=None, **elements):
    pixels = limb() if pixels is None else pixels
    known = {"Modality": "DX", "SOPClassUID": DX, "BitsStored": 12, "HighBit": 11, "PixelSpacing": None}
    if pixels.dtype.itemsize == 1:
        known |= {"BitsStored": 8, "HighBit": 7}
    return make.image(pixels, modality="CR", **{**known, **elements})


def read(tmp_path, ds, kind="dicom", name="a", **options):
    path = tmp_path / name
    if isinstance(ds, Dataset):
        ds.save_as(path, enforce_file_format=True)
    return read_scans(RawSeries(kind, (FileRef(str(path), "", name),), "k"), ReadOptions(projections=True, **options))


def shown(tmp_path, ds, how="voi"):
    """The image as training sees it, its scan, the reasons of its notes."""
    [scan], rejects = read(tmp_path, ds)
    assert rejects == [] and scan.voxels.dtype == np.uint16 and scan.voxels.shape[0] == 1
    json.dumps(scan.meta)  # plain values only
    return intensity.unit(scan.meta, intensity=how)[scan.voxels[0]], scan, {n["reason"] for n in scan.notes}


def lut(first, bits, values, vr="US"):
    item = Dataset()
    item.LUTDescriptor = [len(values) % 65536, first, bits]
    item.LUTData = values
    item["LUTData"].VR = vr
    return Sequence([item])


# ---- Intensities.


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID", "NONSENSE"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_windows(tmp_path, function, photometric):
    raw = limb()
    x = 2.0 * raw - 1000
    ds = radiograph(raw, WindowCenter=[1500, 7], WindowWidth=[3001, 9], VOILUTFunction=function)
    ds.RescaleSlope, ds.RescaleIntercept, ds.PhotometricInterpretation = 2, -1000, photometric
    got, scan, notes = shown(tmp_path, ds)
    expected = {
        "LINEAR_EXACT": np.clip((x - 1500) / 3001 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 1500) / 3001)),
    }.get(function, np.clip((x - 1499.5) / 3000 + 0.5, 0, 1))
    np.testing.assert_allclose(got, 1 - expected if photometric == "MONOCHROME1" else expected, atol=1e-9)
    np.testing.assert_array_equal(scan.voxels[0], raw)  # as stored
    assert scan.meta["windows"] == [[1500, 3001], [7, 9]] and "photometric-disagreement" not in notes


def test_presentation_shape_is_no_second_inversion(tmp_path):
    raw = limb()
    plain, _, _ = shown(tmp_path, radiograph(raw, WindowCenter=1500, WindowWidth=3000))
    for photometric, shape, disagree in (
        ("MONOCHROME1", "INVERSE", False),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
    ):
        ds = radiograph(raw, WindowCenter=1500, WindowWidth=3000, PresentationLUTShape=shape)
        ds.PhotometricInterpretation = photometric
        got, scan, notes = shown(tmp_path, ds)
        np.testing.assert_allclose(got, 1 - plain if photometric == "MONOCHROME1" else plain, atol=1e-12)
        assert ("photometric-disagreement" in notes) == disagree and scan.meta["presentation"] == shape
    reference, _, _ = shown(tmp_path, radiograph(raw, PhotometricInterpretation="MONOCHROME1"), "reference")
    np.testing.assert_allclose(reference, (raw.max() - raw.astype(float)) / np.ptp(raw), atol=1e-12)


def test_tables(tmp_path):
    raw = limb()
    values = (np.linspace(0, 1, 3500) ** 0.5 * 4095).astype(int).tolist()
    ds = radiograph(raw, VOILUTSequence=lut(100, 12, values), WindowCenter=5, WindowWidth=5)
    got, scan, _ = shown(tmp_path, ds)
    np.testing.assert_allclose(got, np.asarray(values)[np.clip(raw.astype(int) - 100, 0, 3499)] / 4095, atol=1e-12)
    assert intensity.how(scan.meta) == "lut"
    # The same as words, as bytes of 8 bits, and 65536 entries, which 16 bits write as 0.
    packed = np.asarray(values, "<u2").tobytes()
    again, _, _ = shown(tmp_path, radiograph(raw, VOILUTSequence=lut(100, 12, packed, "OW")))
    assert len(packed) == 7000 and not np.array_equal(again, got)  # the descriptor counted the bytes: twice the entries
    words = lut(100, 12, packed, "OW")
    words[0].LUTDescriptor = [3500, 100, 12]
    np.testing.assert_array_equal(shown(tmp_path, radiograph(raw, VOILUTSequence=words))[0], got)
    eight = lut(0, 8, bytes(range(256)) * 12, "OW")
    got, _, _ = shown(tmp_path, radiograph(raw, VOILUTSequence=eight))
    np.testing.assert_allclose(got, (np.minimum(raw, 3071) % 256) / 255, atol=1e-12)
    full = lut(0, 16, (np.arange(65536) // 2).astype("<u2").tobytes(), "OW")
    full[0].LUTDescriptor = [0, 0, 16]
    got, scan, _ = shown(tmp_path, radiograph(raw, VOILUTSequence=full))
    np.testing.assert_allclose(got, raw // 2 / 65535, atol=1e-12)
    assert len(scan.meta["voi_lut"]["values"]) == 65536
    # Modality LUT, then a window on what it gives; a slope beside it means nothing.
    table = (5 * np.arange(4096)).tolist()
    ds = radiograph(raw, ModalityLUTSequence=lut(0, 16, table), WindowCenter=7000, WindowWidth=9000)
    ds.RescaleSlope, ds.RescaleIntercept = 3, 3
    got, _, _ = shown(tmp_path, ds)
    np.testing.assert_allclose(got, intensity.window(5.0 * raw, 7000, 9000), atol=1e-12)


def test_signed_values(tmp_path):
    raw = limb().astype(np.int16) - 1500
    values = list(range(0, 4096, 2))
    expected = np.asarray(values)[np.clip(raw.astype(int) + 500, 0, 2047)] / 4095
    got, scan, _ = shown(tmp_path, radiograph(raw, BitsStored=16, HighBit=15, VOILUTSequence=lut(-500, 12, values)))
    assert scan.meta["offset"] == 32768 and scan.meta["voi_lut"]["first"] == -500
    np.testing.assert_array_equal(scan.voxels[0].astype(int) - 32768, raw)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    # Unsigned pixels below 0 after the slope: the first mapped value is -500, and its VR can only say 65036.
    ds = radiograph(limb(), RescaleSlope=1, RescaleIntercept=-1500, VOILUTSequence=lut(65036, 12, values))
    got, scan, _ = shown(tmp_path, ds)
    assert "offset" not in scan.meta and scan.meta["voi_lut"]["first"] == -500
    np.testing.assert_allclose(got, expected, atol=1e-12)
    got, _, _ = shown(tmp_path, radiograph(raw, BitsStored=16, HighBit=15, WindowCenter=-100, WindowWidth=2000))
    np.testing.assert_allclose(got, intensity.window(raw.astype(float), -100, 2000), atol=1e-12)


def test_without_a_window_percentiles_of_the_exposed_pixels(tmp_path):
    raw = np.full((200, 220), 0, np.uint16)
    raw[40:160, 70:160] = 200 + limb()
    got, scan, notes = shown(tmp_path, radiograph(raw))
    assert scan.meta["box"] == [40, 70, 160, 160] and scan.meta["box_from"] == "edges"
    inside = raw[40:160, 70:160]
    low, high = np.percentile(inside, (0.5, 99.5), method="inverted_cdf")
    np.testing.assert_allclose(got, np.clip((raw - float(low)) / (float(high) - low), 0, 1), atol=1e-12)
    assert got[inside.shape[0] :].max() <= 1 and "no-spacing" in notes
    # Zeros that a decade of a shutter added do not change what the patient looks like.
    plain, _, _ = shown(tmp_path, radiograph(inside))
    np.testing.assert_allclose(got[40:160, 70:160], plain, atol=0.02)


def test_shutters_of_the_header():
    pixels = limb((100, 140)) + 50
    rows, columns = np.mgrid[1:101, 1:141]
    ds = Dataset()
    ds.ShutterShape = ["RECTANGULAR", "CIRCULAR"]
    ds.ShutterUpperHorizontalEdge, ds.ShutterLowerHorizontalEdge = 11, 90
    ds.ShutterLeftVerticalEdge, ds.ShutterRightVerticalEdge = 21, 130
    ds.CenterOfCircularShutter, ds.RadiusOfCircularShutter = [50, 70], 45
    inside, box, source = collimation.exposed(pixels, ds)
    expected = (rows >= 11) & (rows <= 90) & (columns >= 21) & (columns <= 130)
    expected &= (rows - 50) ** 2 + (columns - 70) ** 2 <= 45**2
    np.testing.assert_array_equal(inside, expected)
    assert box == (10, 24, 90, 115) and source == "header"
    ds = Dataset()
    ds.ShutterShape = "POLYGONAL"
    ds.VerticesOfThePolygonalShutter = [10, 10, 10, 120, 80, 60]
    inside, box, _ = collimation.exposed(pixels, ds)
    assert box == (9, 9, 80, 120) and 0.9 < inside.sum() / (0.5 * 110 * 70) < 1.15
    # Numbers in some other unit (as in a real chest image), nothing, and a field without pixels count for nothing.
    for edges in ((907, 1299, -184, 184), (50, 20, 10, 20), (40, 41, 40, 41)):
        ds = Dataset()
        ds.CollimatorShape = "RECTANGULAR"
        ds.CollimatorUpperHorizontalEdge, ds.CollimatorLowerHorizontalEdge = edges[:2]
        ds.CollimatorLeftVerticalEdge, ds.CollimatorRightVerticalEdge = edges[2:]
        inside, box, source = collimation.exposed(pixels, ds)
        assert inside.all() and box is None and source == ""


def test_tilted_collimation_is_left_out():
    rows, columns = np.mgrid[:300, :240]
    field = (abs((rows - 150) * 0.97 + (columns - 120) * 0.24) < 90) & (
        abs((columns - 120) * 0.97 - (rows - 150) * 0.24) < 60
    )
    pixels = np.where(field, limb((300, 240)) + 300, 0).astype(np.uint16)
    inside, box, _ = collimation.exposed(pixels)
    assert (inside & ~field).mean() < 0.01 and (field & ~inside).mean() < 0.01
    assert box is not None and box[0] > 20 and box[1] > 20


# ---- What is taken and what is refused.


REFUSED = [
    ("multi-frame", lambda: radiograph(np.stack([limb()] * 3))),
    ("colour-image", lambda: radiograph(PhotometricInterpretation="RGB", SamplesPerPixel=3)),
    ("too-small", lambda: radiograph(limb((60, 200)))),
    ("blank", lambda: radiograph(np.full((90, 90), 7, np.uint16))),
    ("blank", lambda: radiograph((limb() > 1000).astype(np.uint16) * 4095)),
    ("secondary-capture", lambda: radiograph(ImageType=["DERIVED", "SECONDARY"])),
    ("secondary-capture", lambda: radiograph(ImageType=["DERIVED", "PRIMARY", "DRAWING"])),
    ("secondary-capture", lambda: radiograph(Modality="US", SOPClassUID=CAPTURE)),
    ("localizer", lambda: radiograph(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    ("structured-report", lambda: radiograph(Modality="SR")),
    ("no-pixel-data", lambda: radiograph(Rows=None)),
]


@pytest.mark.parametrize(("reason", "build"), REFUSED, ids=[f"{r}{i}" for i, (r, _) in enumerate(REFUSED)])
def test_refusals(tmp_path, reason, build):
    scans, rejects = read(tmp_path, build())
    assert scans == [] and [r.reason for r in rejects] == [reason] and rejects[0].kind == "series"


def test_refusals_that_options_lift(tmp_path):
    assert read(tmp_path, radiograph(ImageType=["DERIVED", "SECONDARY"]), secondary=True)[0]
    assert read(tmp_path, radiograph(limb((60, 200))), min_side=32)[0]
    ds = radiograph()
    del ds.PixelData
    assert read(tmp_path, ds)[1][0].reason == "truncated-pixel-data"
    assert read(tmp_path, ds, kind="nifti")[1][0].reason == "not-a-radiograph"
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:700])
    assert read(tmp_path, None, name="cut")[0] == []


def test_the_meta_of_a_record(tmp_path):
    ds = radiograph(limb(high=255).astype(np.uint8), Modality="OT", SOPClassUID=CAPTURE, BodyPartExamined="KNIE LI")
    ds.ImagerPixelSpacing, ds.PixelSpacing = [0.144, 0.15], ["0.000", "0.000"]
    ds.Laterality, ds.ViewPosition, ds.BurnedInAnnotation, ds.PresentationIntentType = (
        "L",
        "LATERAL",
        "YES",
        "FOR PROCESSING",
    )
    _, scan, notes = shown(tmp_path, ds)
    expected = {"bits": 8, "region": "knee", "laterality": "L", "view": "LAT", "pixel_mm": [0.144, 0.15]}
    assert expected.items() <= scan.meta.items() and scan.meta["intent"] == "processing"
    assert scan.modality == "OT" and scan.name == "xr" and notes == {"burnt-in-text"}
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, :3], axis=0), [1, 0.144, 0.15])
    assert "pixel_mm" not in shown(tmp_path, radiograph(PixelSpacing=["0.000", "0.000"]))[1].meta


def test_suspects(tmp_path):
    raw = limb((240, 200))
    good = shown(tmp_path, radiograph(raw, WindowCenter=1500, WindowWidth=3000))[2]
    assert good == {"no-spacing"}
    found = {
        "clipped": radiograph(raw, WindowCenter=200, WindowWidth=100),
        "low-contrast": radiograph(raw, WindowCenter=30000, WindowWidth=65000),
        "looks-inverted": radiograph(3000 - raw, WindowCenter=1500, WindowWidth=3000),
    }
    written = raw.copy()
    for k in range(9):  # nine letters of one height
        written[20:32, 20 + 10 * k : 22 + 10 * k] = written[20:22, 20 + 10 * k : 26 + 10 * k] = 4095
    found["burnt-in-text"] = radiograph(written, WindowCenter=1500, WindowWidth=3000)
    marker = raw.copy()
    marker[20:32, 20:22] = marker[30:32, 20:28] = 4095
    for reason, ds in found.items():
        assert reason in shown(tmp_path, ds)[2], reason
    assert "burnt-in-text" not in shown(tmp_path, radiograph(marker, WindowCenter=1500, WindowWidth=3000))[2]


# ---- Pictures.


def test_pictures(tmp_path):
    raw = limb(high=250).astype(np.uint8)
    deep = limb(high=60000)
    Image.fromarray(raw).save(tmp_path / "grey.png")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.repeat(raw[..., None], 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(np.repeat(raw[..., None], 3, -1)).save(tmp_path / "rgb.jpg", quality=95)
    Image.fromarray(raw).convert("P").save(tmp_path / "palette.png")
    coloured = np.repeat(raw[..., None], 3, -1)
    coloured[:40, :, 0] //= 2
    Image.fromarray(coloured).save(tmp_path / "colour.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:900])
    for name, expected, bits in (("grey", raw, 8), ("deep", deep, 16), ("rgb", raw, 8), ("palette", raw, 8)):
        [scan], rejects = read(tmp_path, None, "picture", f"{name}.png")
        assert rejects == [] and scan.meta["bits"] == bits and scan.meta["kind"] == "picture"
        np.testing.assert_array_equal(scan.voxels[0], expected)
    [scan], _ = read(tmp_path, None, "picture", "rgb.jpg")
    assert np.abs(scan.voxels[0].astype(int) - raw).mean() < 3 and scan.meta["syntax"] == "JPEG"
    assert read(tmp_path, None, "picture", "colour.png")[1][0].reason == "colour-image"
    assert read(tmp_path, None, "picture", "cut.png")[1][0].reason == "undecodable"


# ---- The command.


def archive(folder, count=30):
    """`count` images of half as many patients, with what else lies in an archive; rows of a manifest."""
    folder.mkdir()
    rows = []
    for i in range(count):
        ds = radiograph(limb(seed=i, shape=(100 + i, 90)), SOPInstanceUID=make.uid("x", i), WindowCenter=1500)
        ds.WindowWidth, ds.StudyInstanceUID, ds.PatientID = 3000, make.uid("study", i // 2), f"PAT{i // 2:03}"
        ds.SeriesInstanceUID, ds.BodyPartExamined = make.uid("series", i // 2), ("KNEE", "HAND")[i // 2 % 2]
        make.save([ds], folder / f"s{i}")
        rows.append(f"{ds.StudyInstanceUID},{int(i // 2 in (3, 9))}")
    return "StudyInstanceUID,label:fracture\n" + "\n".join(sorted(set(rows))) + "\n"


def test_the_command(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (tmp_path / "m.csv").write_text(archive(raw))
    copied = next((raw / "s4").iterdir())
    (raw / "z_copy[1].dcm").write_bytes(copied.read_bytes())
    same = radiograph(limb(seed=5, shape=(105, 90)), SOPInstanceUID=make.uid("again"), PatientID="PAT777")
    same.StudyInstanceUID, same.WindowCenter, same.WindowWidth = make.uid("study again"), 1500, 3000
    make.save([same], raw / "same")
    make.save([radiograph(np.full((90, 90), 7, np.uint16), SOPInstanceUID=make.uid("blank"))], raw / "blank")
    make.save([radiograph(3000 - limb(), SOPInstanceUID=make.uid("inv"), PatientID="PAT888")], raw / "inverted")
    Image.fromarray(limb(high=255).astype(np.uint8)).save(raw / "knee_7.png")
    Image.fromarray(limb(high=255).astype(np.uint8)).save(raw / "knee_7_mask.png")
    command = [str(raw), f"--out={out}", f"--manifest={tmp_path / 'm.csv'}", "--recipe=radiograph", "--workers=0"]
    command += ["--split=train=0.6,val=0.2,test=0.2", "--stratify=42", "--shard-studies=16", "--paths=keep"]
    assert main(command) == 0
    report = json.loads((out / "prep_report.json").read_text())
    dataset = shards.open_dataset(out, verify="full")
    assert len(dataset) == 33 and set(dataset.index["scans"]) == {1} and set(dataset.index["dtype"]) == {"uint16"}
    assert dataset.manifest["recipe"]["value_range"] == [0, 65535] and dataset.manifest["recipe"]["stratify"] == 42
    rejected = report["counts"]["rejected"]
    assert rejected == {"blank": 1, "duplicate-image": 1, "segmentation": 1, "no-images": 1}
    [duplicate] = [r for r in report["rejects"] if r["reason"] == "duplicate-image"]
    assert "[1]" in duplicate["path"] and "s4" in duplicate["detail"]
    sanity = report["sanity"]
    assert sanity["images"] == 33 and sanity["photometric"] == {"MONOCHROME2": 33} and sanity["patients"] == 18
    assert sanity["region"] == {"knee": 16, "hand": 14, "unknown": 3} and sanity["patients_unknown"] == 1
    assert list(sanity["suspects"]) == ["looks-inverted"] and len(sanity["duplicate-pixels"]) == 1
    assert report["counts"]["noted"]["duplicate-pixels"] == 1
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.getpixel((7, 7)) == (220, 40, 40)  # the suspect comes first, framed
    # Patients are whole, the rare label is shared out, every image of a study has its row.
    index = dataset.index
    for patient in set(index["patient"]):
        assert len(set(index["split"][index["patient"] == patient])) == 1
    assert np.nansum(index["label/fracture"]) == 4 and len(set(index["split"][index["label/fracture"] == 1])) == 2
    assert {k: v["patients"] for k, v in sanity["splits"].items()} == {"test": 4, "train": 10, "val": 4}
    text = json.dumps(report) + (out / "dataset.json").read_text() + repr([s for s in dataset.read(range(33))])
    assert "PAT0" not in text.replace("raw/s", "") and "Doe" not in text
    # Again: nothing left to do; another seed is another data set.
    before = (out / "prep_report.json").read_bytes(), (out / "contact_sheet.png").read_bytes()
    assert main(command) == 0
    assert before == ((out / "prep_report.json").read_bytes(), (out / "contact_sheet.png").read_bytes())
    assert main([*command[:-4], "--stratify=7", *command[-2:]]) == 2
    assert "was begun with other arguments" in capsys.readouterr().err
    assert main([str(raw), f"--out={tmp_path / 'o'}", "--recipe=radiograph", "--workers=0", "--study=x"]) == 2
    assert "--patient groups them" in capsys.readouterr().err
    assert (
        main(["--source=tfds", "--source.dir=x", f"--out={tmp_path / 'o'}", "--recipe=radiograph", "--workers=0"]) == 2
    )
    assert "reads files" in capsys.readouterr().err


def test_manifest_of_pictures_and_what_other_recipes_refuse(tmp_path):
    raw = tmp_path / "raw"
    for i in range(6):
        (raw / f"patient{i // 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(limb(seed=i, high=255).astype(np.uint8)).save(raw / f"patient{i // 2}" / f"image{i}.png")
    make.save([radiograph(Modality="OT", SOPClassUID=CAPTURE)], raw / "capture")
    (tmp_path / "m.csv").write_text(
        "image_id,label:hardware,split\n" + "".join(f"image{i}.png,{i % 2},\n" for i in range(6))
    )
    studies, rejects = find_studies(
        [raw], salt="salt of tests", manifest=tmp_path / "m.csv", patient=r"patient\d", projections=True
    )
    pictures = [s for s in studies if s.series[0].kind == "picture"]
    assert len(studies) == 7 and len({s.patient for s in pictures}) == 3
    assert sorted(s.labels["hardware"] for s in pictures) == [0, 0, 0, 1, 1, 1]
    assert [r.reason for r in rejects] == ["study-without-row"]
    # Without the recipe pictures are no images and a capture is a screenshot, as ever.
    studies, rejects = find_studies([raw], salt="salt of tests")
    assert studies == [] and sorted({r.reason for r in rejects}) == ["no-images", "not-an-image", "secondary-capture"]


# ---- Real files.


def real(name):
    path = path_of(name)
    if not path.exists():
        pytest.skip(f"{name} is absent; python -m tests.fetch_data")
    [scan], rejects = read_scans(RawSeries("dicom", (FileRef(str(path), "", "x"),), "k"), OPTIONS)
    assert rejects == []
    return scan


@pytest.mark.parametrize(
    ("name", "shape", "meta", "box"),
    [
        ("RG1", (1955, 1841), {"bits": 15, "region": "chest", "view": "PA", "windows": [[15000, 30000]]}, None),
        ("RG3", (1760, 1760), {"bits": 10, "laterality": "R", "view": "AP"}, (0, 442, 1760, 1257)),
    ],
)
def test_compressed_and_plain_files_of_one_radiograph_are_equal(name, shape, meta, box):
    j2k, plain = real(f"pydicom-data/{name}_J2KR.dcm"), real(f"pydicom-data/{name}_UNCR.dcm")
    assert plain.voxels.shape == (1, *shape) and np.array_equal(j2k.voxels, plain.voxels)
    assert meta.items() <= plain.meta.items() and "pixel_mm" not in plain.meta
    assert {k: v for k, v in j2k.meta.items() if k != "syntax"} == {
        k: v for k, v in plain.meta.items() if k != "syntax"
    }
    assert plain.meta.get("box") == (None if box is None else list(box))
    for how in ("voi", "percentiles", "reference"):
        image = intensity.table(plain.meta, intensity=how)[plain.voxels[0]]
        low, high = np.percentile(image, (1, 99)) / 65535
        assert low < 0.25 and high > 0.75 and high - low > 0.6
    centre, stored = image[shape[0] // 2, shape[1] // 2], plain.voxels[0, shape[0] // 2, shape[1] // 2]
    top, bottom = plain.meta["range"][::-1]
    assert centre == np.rint((top - stored) / (top - bottom) * 65535)  # MONOCHROME1: inverted once


def test_the_shoulder():
    scan = real("ami.js/monochrome2.dcm")
    assert scan.voxels.shape == (1, 3480, 4240) and scan.voxels.dtype == np.uint16 and scan.voxels.max() == 255
    assert {"bits": 8, "region": "shoulder", "view": "AP", "photometric": "MONOCHROME2"}.items() <= scan.meta.items()
    np.testing.assert_allclose(scan.meta["pixel_mm"], 0.1, rtol=1e-6)
    table = intensity.table(scan.meta)
    assert table[0] == 0 and table[255] == 65535 and table[127] == np.rint((127 - 127.5) / 255 * 65535 + 32767.5)
