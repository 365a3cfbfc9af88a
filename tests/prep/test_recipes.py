"""Recipes: geometry by planted markers, options, stored values, texts, splits, shard plans."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmed.core.errors import UserError
from jaxmed.data import ops
from jaxmed.prep import recipes, regions, splits, text
from jaxmed.prep.convert import parse_split, split_of
from jaxmed.prep.run import plan_shards
from jaxmed.prep.scan import FileRef, RawScan, RawSeries, RawStudy
from tests.data.test_ops import oblique, positions

RNG = np.random.default_rng(0)


def marked(shape, affine, modality, place=(0.45, 0.55, 0.5), radius=9.0):
    """A scan with a bright ball (mm) at a fraction of its extent; HU for CT. Returns scan, world position."""
    center = affine[:3, :3] @ (np.array(place) * (np.array(shape) - 1)) + affine[:3, 3]
    at = positions(shape, affine)
    ball = np.linalg.norm(at - center, axis=-1) < radius
    if modality == "CT":
        half = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
        body = np.linalg.norm((at - half) @ np.linalg.inv(affine[:3, :3]).T / np.array(shape), axis=-1) < 0.45
        voxels = np.where(ball, 300, np.where(body, 0, -1000)).astype(np.int16)
    else:
        voxels = (RNG.integers(0, 100, shape) + 900 * ball).astype(np.int16)
    return RawScan(voxels, affine, modality, "ct" if modality == "CT" else "t1w", {"step": 5.0}), center


def bright(values) -> np.ndarray:
    """Mask of the ball: it is the brightest, everything else is at least 15 % of the range darker."""
    values = values.astype(np.float32)
    return values > values.max() - 0.15 * (values.max() - values.min())


AFFINES = {
    "oblique": oblique((3.5, 0.9, 0.8)),
    "tilted": oblique((3.5, 0.9, 0.8), shear=1.2),
    "coronal": oblique((3.5, 0.9, 0.8), (1.45, 0.1, 0.2)),
    "thick columns": oblique((0.9, 0.8, 3.5), (0.1, 0.2, -0.1)),
}
CASES = [
    ("hlip_brain_mri", ()),
    ("hlip_brain_mri", (("slices", "0"), ("resize", "0"), ("crop", "0"))),
    ("hlip_brain_mri", (("deskew", "true"),)),
    ("hlip_head_ct", ()),
    ("hlip_head_ct", (("deskew", "true"),)),
    ("hlip_chest_ct", (("size", "40,60,64"),)),
    ("hlip_chest_ct", (("size", "40,60,64"), ("crop", "center"), ("foreground", "body"))),
    ("hlip_chest_ct", (("size", "40,60,64"), ("mode", "resize"), ("deskew", "true"))),
    ("hlip_chest_ct", (("mode", "whole"),)),
    ("hlip_chest_ct_published", (("size", "40,60,64"),)),
    ("native", ()),
    ("native", (("dtype", "float32"),)),
    ("native", (("axes", "IPR"), ("slice_first", "true"))),
]


@pytest.mark.parametrize("grid", AFFINES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join('='.join(o) for o in c)}" for n, c in CASES])
def test_a_marker_keeps_its_place(name, options, grid):
    recipe = recipes.get(name, options)
    affine = AFFINES[grid]
    shape = (90, 80, 20) if grid == "thick columns" else (20, 90, 80)
    raw, center = marked(shape, affine, "CT" if "ct" in name else "MR")
    before = raw.voxels.copy()
    for scan in recipes.apply(recipe, raw):
        assert scan["source_shape"] == shape and np.array_equal(scan["source_affine"], affine)
        mask = bright(scan["voxels"])
        found = scan["affine"][:3, :3] @ np.argwhere(mask).mean(0) + scan["affine"][:3, 3]
        # Nearest slices are off by up to half a slice of the scan; everything else by less than half a stored voxel.
        stored = np.linalg.inv(scan["affine"])[:3, :3] @ (found - center)
        source = np.linalg.inv(affine)[:3, :3] @ (found - center)
        assert min(np.abs(stored).max(), np.abs(source).max()) < 0.5, (stored, source)
        # A mask drawn on the stored grid comes back onto the marker in the scan's own grid.
        back = ops.back_to_source(mask, scan["affine"], affine, shape, nearest=True)
        at = np.argwhere(back).mean(0)
        assert np.abs(at - np.array((0.45, 0.55, 0.5)) * (np.array(shape) - 1)).max() < 0.5
        if "deskew" in dict(options):
            assert recipes.tilt(scan["affine"]) < recipes.TILT
        elif grid == "tilted" and "ct" not in name:
            assert recipes.tilt(scan["affine"]) > 5
    np.testing.assert_array_equal(raw.voxels, before)  # the reader's array is not touched


def test_what_is_stored():
    mr, _ = marked((20, 90, 80), oblique(), "MR")
    [scan] = recipes.apply(recipes.get("hlip_brain_mri"), mr)
    assert scan["voxels"].shape == (48, 224, 224) and scan["voxels"].dtype == np.uint8 and scan["voxels"].max() == 254
    assert ops.axis_codes(scan["affine"]) == "IPR" and scan["meta"] == {"modality": "MR", "step": 5.0}
    ct, _ = marked((20, 90, 80), oblique(), "CT")
    scans = recipes.apply(recipes.get("hlip_head_ct", [("windows.stroke", "35,30")]), ct)
    assert [s["name"] for s in scans] == ["ct_blood", "ct_bone", "ct_brain", "ct_stroke"]
    assert scans[3]["meta"]["window"] == [35, 30] and all(s["voxels"].shape == (48, 224, 224) for s in scans)
    assert [int(s["voxels"].max()) for s in scans] == [255, 100, 255, 255]  # 300 HU in 600/2800 is 0.393
    [scan] = recipes.apply(recipes.get("hlip_chest_ct"), dataclasses.replace(ct, name="unknown", modality=""))
    assert scan["voxels"].dtype == np.int16 and scan["voxels"].shape == (112, 336, 336) and scan["name"] == "ct"
    assert (scan["voxels"].min(), scan["voxels"].max()) == (-1150, 300)
    np.testing.assert_allclose(ops.spacing_of(scan["affine"])[1:], 1, atol=0.03)  # sizes are truncated
    [whole] = recipes.apply(recipes.get("hlip_chest_ct", [("mode", "whole")]), ct)
    assert whole["voxels"].shape == (int(20 * 5 / 3), int(90 * 0.9), int(80 * 0.7))
    [native] = recipes.apply(recipes.get("native"), dataclasses.replace(ct, voxels=ct.voxels.astype(np.float64)))
    [cast] = recipes.apply(recipes.get("native", [("dtype", "uint8")]), ct)
    assert cast["voxels"].dtype == np.uint8 and set(np.unique(cast["voxels"])) == {0, 255}
    assert native["voxels"].dtype == np.float32 and np.array_equal(native["affine"], ct.affine)


def test_published_chest_equals_the_reference_steps():
    """The recipe and the functions that the goldens pin give the same voxels, up to the rounding to whole HU."""
    ct, _ = marked((30, 60, 50), oblique((2.0, 1.3, 1.1)), "CT")
    ct.voxels += RNG.integers(-400, 400, ct.voxels.shape).astype(np.int16)
    [scan] = recipes.apply(recipes.get("hlip_chest_ct_published", [("size", "24,64,64")]), ct)
    hu, _ = ops.resample(ct.voxels, ops.spacing_of(ct.affine), (3, 1, 1))
    expected, _ = ops.pad_crop(np.clip(hu, -1150, 350), (24, 64, 64), -1150)
    assert np.abs(scan["voxels"] - expected).max() <= 0.5


def test_one_dtype_holds_every_scan():
    def scans(*arrays):
        return [{"voxels": np.array(a, d)} for a, d in arrays]

    def dtype(*arrays):
        out = recipes.one_dtype(scans(*arrays))
        for new, (values, _) in zip(out, arrays):
            np.testing.assert_array_equal(new["voxels"], values)
        return {s["voxels"].dtype.name for s in out}

    assert dtype(([0, 255], "u1")) == {"uint8"}
    assert dtype(([0, 255], "i2"), ([3], ">i2")) == {"int16"}  # shared: kept, so that studies agree
    assert dtype(([0, 255], ">i2"), ([3], "i4")) == {"uint8"}
    assert dtype(([0, 70000], "i4"), ([True], "?")) == {"float32"}
    assert dtype(([0, 255], "u1"), ([-3], "i2")) == {"int16"}
    assert dtype(([0, 40000], "u2"), ([3], "u1")) == {"uint16"}
    assert dtype(([0, 40000], "u2"), ([-3], "i2")) == {"float32"}
    assert dtype(([0.5], "f4"), ([-3], "i2")) == {"float32"}


def test_every_option_is_read_by_a_step_and_stored():
    for recipe in recipes.RECIPES.values():
        described = json.loads(json.dumps(recipe.describe()))
        read = {k for s in described["steps"] for k in s if k != "step"}
        assert set(recipe.options) - {"value_range"} == read - {"value_range"}
        assert [s["step"] for s in described["steps"]] == list(recipe.steps)
        assert "value_range" in described and described["name"] == recipe.name
        assert recipes.read_options(recipe)["skip_names"]
    changed = recipes.get("hlip_head_ct", [("windows.blood", "70,180"), ("slices", "24"), ("modalities", "CT")])
    assert changed.options["windows"]["blood"] == (70, 180) and changed.modalities == ("CT",)
    assert recipes.RECIPES["hlip_head_ct"].options["windows"]["blood"] == (80, 200)
    assert recipes.get("hlip_head_ct", [("windows", "{'a': (1, 2)}")]).options["windows"] == {"a": (1, 2)}
    assert recipes.get("native", [("value_range", "0,4095")]).describe()["value_range"] == (0, 4095)
    assert recipes.read_options(changed, [("max_volumes", "none"), ("planar", "false")])["max_volumes"] is None


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("hlip_brain", None, "choose one of hlip_brain_mri"),
        ("hlip_brain_mri", ("slice", "3"), "no such option; it has deskew"),
        ("hlip_brain_mri", ("slices", "3.5"), "a whole number like 48"),
        ("hlip_brain_mri", ("slices", "-1"), "must be 0 or more"),
        ("hlip_brain_mri", ("slices", "true"), "a whole number"),
        ("hlip_brain_mri", ("deskew", "1"), "true or false"),
        ("hlip_brain_mri", ("axes", "IPS"), "one each of R/L"),
        ("hlip_brain_mri", ("percentiles", "99,1"), "the lower first"),
        ("hlip_brain_mri", ("slices.a", "3"), "no such option"),
        ("hlip_head_ct", ("windows.blood", "80"), "expected 2 numbers"),
        ("hlip_head_ct", ("windows.blood", "80,0"), "positive width"),
        ("hlip_head_ct", ("windows", "80,200"), "expected a table"),
        ("hlip_chest_ct", ("mode", "squash"), "crop, resize, whole"),
        ("hlip_chest_ct", ("size", "1,2"), "expected 3 numbers"),
        ("hlip_chest_ct", ("size", "1,2,2.5"), "whole numbers"),
        ("hlip_chest_ct", ("spacing", "0,1,1"), "must be positive"),
        ("native", ("value_range", "5,1"), "the lower first"),
        ("native", ("dtype", "int32"), "auto, uint8"),
    ],
)
def test_wrong_recipes(name, option, message):
    with pytest.raises(UserError, match=message):
        recipes.get(name, [option] if option else [])


def test_wrong_reading_options():
    with pytest.raises(UserError, match=r"--read\.max=1.*max_missing"):
        recipes.read_options(recipes.get("native"), [("max", "1")])
    with pytest.raises(UserError, match="whole number"):
        recipes.read_options(recipes.get("native"), [("max_missing", "few")])


def test_ct_rate_texts():
    row = {"Findings_EN": 'Trachea is "open" (both)', "Impressions_EN": "No mass. Nodule", "VolumeName": "x"}
    assert text.compose(row, "ct_rate_raw") == [
        "The volume shows: No mass. Nodule. The volume looks like: Trachea is open both."
    ]
    assert text.compose({**row, "Impressions_EN": "Not given."}, "ct_rate_raw") == [
        "The volume looks like: Trachea is open both."
    ]
    assert text.compose({"findings": "", "impression": None}, "ct_rate_raw") == []
    organs = text.compose({"Lung conclusion": "(nodule)", "heart_description": "big"}, "ct_rate_organ")
    assert organs[0] == "The lung shows: nodule. The lung looks like: No significant abnormalities."
    assert organs[1] == "The heart shows: No significant abnormalities. The heart looks like: big."
    assert [o.split()[1] for o in organs] == list(text.ORGANS)
    assert text.compose(row, "none") == []
    with pytest.raises(UserError, match="needs the columns lung_conclusion"):
        text.compose(row, "ct_rate_organ", "m.csv")
    with pytest.raises(UserError, match=r"m\.csv: .*needs a column impression or"):
        text.compose({"findings": "a"}, "ct_rate_raw", "m.csv")


def test_split_by_patient():
    shares = parse_split("train=0.8, val=0.1,test=0.1")
    names = [split_of(f"patient {i}", shares) for i in range(2000)]
    assert names == [split_of(f"patient {i}", shares) for i in range(2000)]
    assert [round(names.count(n) / 2000, 1) for n in ("train", "val", "test")] == [0.8, 0.1, 0.1]
    assert parse_split("train") == (("train", 1.0),)
    for wrong in ("train=0.8,val=0.1", "train=0.5,train=0.5", "train=x,val=1", "", "a=1,b=0", "a b"):
        with pytest.raises(UserError, match="sum to 1"):
            parse_split(wrong)


def test_plan_of_shards():
    series = [RawSeries("nifti", (FileRef("a"),), "k")]
    studies = [RawStudy(f"{i:02}", "p", series * (1 + i % 3)) for i in range(10)]
    recipe = recipes.get("hlip_brain_mri")
    for plan in (
        plan_shards(studies, recipe, shard_mb=8),
        plan_shards(studies, recipe, shard_mb=8, shard_studies=4),
        plan_shards(studies, recipes.get("native"), shard_mb=1),
    ):
        assert [i for r in plan for i in r] == list(range(10))
    assert len(plan) == 10  # a study larger than a shard has its own
    sizes = [sum(len(studies[i].series) for i in r) for r in plan_shards(studies, recipe, shard_mb=8)]
    assert max(sizes[:-1]) <= 9 and min(sizes[:-1]) >= 7  # 7 scans of 48x224x224, packed to a half, are 8 MB
    assert plan_shards([], recipe, shard_mb=8) == []


def test_stratified_split():
    rng = np.random.default_rng(0)
    studies = []
    for p in range(400):
        rare = p % 50 == 0
        labels = {"rare": float(rare), "common": float(p % 3 == 0)} if p % 4 else {}
        for i in range(1 + int(rng.integers(4))):
            region = ("knee", "hand", "skull")[min(p % 40, 2)]
            studies.append(RawStudy(f"k{p}-{i}", f"p{p}", [], labels=dict(labels), region=region))
    shares = parse_split("train=0.8075,val=0.0425,test=0.15")
    splits.stratified(studies, shares, 42)
    patients = {s.patient: s.split for s in studies}
    assert all(patients[s.patient] == s.split for s in studies)
    counts = {name: list(patients.values()).count(name) for name, _ in shares}
    assert counts == {"train": 323, "val": 17, "test": 60}
    for name in ("knee", "skull"):
        own = {s.patient: s.split for s in studies if s.region == name}
        assert abs(list(own.values()).count("test") / len(own) - 0.15) < 0.06
    again = [RawStudy(s.key, s.patient, [], labels=s.labels, region=s.region) for s in reversed(studies)]
    splits.stratified(again, shares, 42)
    assert {s.key: s.split for s in again} == {s.key: s.split for s in studies}
    splits.stratified(again := [RawStudy(s.key, s.patient, []) for s in studies], shares, 7)
    assert {s.key: s.split for s in again} != {s.key: s.split for s in studies}
    # What a manifest says stays, and the patient's other images follow.
    given = [RawStudy("a", "p", [], split="test"), RawStudy("b", "p", []), RawStudy("c", "q", [])]
    splits.stratified(given, shares, 0)
    assert [s.split for s in given] == ["test", "test", "train"]
    with pytest.raises(UserError, match="one patient"):
        splits.stratified([RawStudy("a", "p", [], split="test"), RawStudy("b", "p", [], split="train")], shares, 0)


def test_regions_and_views():
    words = (
        "Knie li.=knee|KNEE=knee|C SPINE=cspine|HWS=cspine|TSPINE=tspine|L-SPINE=lspine|Handgelenk re=wrist|HAND=hand"
    )
    words += "|Sprunggelenk=ankle|Ellenbogen=elbow|Fuß=foot|Schlüsselbein=clavicle|Wirbelsäule=spine|CHEST=chest"
    words += (
        "|Rippen=ribs|Hüfte=hip|Schulterblatt=scapula|LOWER LEG=lowerleg|TIB FIB=lowerleg|Schädel=skull|LEG=extremity"
    )
    words += "|Unterkiefer=jaw|épaule=shoulder|TOES=toe|Mickey Mouse=|=|THUMB=finger|PELVIS=pelvis"
    for pair in words.split("|"):
        text, _, token = pair.partition("=")
        assert regions.region(text) == token, text
    assert [regions.view(v) for v in ("ap", "Lateral", "L.L.", "Mr Smith", "")] == ["AP", "LAT", "LL", "", ""]
    assert [regions.side(v) for v in ("l", "R", "U", "")] == ["L", "R", "", ""]
