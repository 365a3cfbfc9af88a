"""The phantom: whole, repeatable, honest about being synthetic, and it does not give its labels away."""

import json

import nibabel
import numpy as np
import pydicom
import pytest

from jaxmed.core.errors import UserError
from jaxmed.data import masks, shards
from jaxmed.data.record import decode, encode
from jaxmed.data.sources import phantom, phantom_anatomy, phantom_imaging, phantom_raw, phantom_words

TINY = {"size": 24, "step_mm": 6.0}
CFG = phantom.Config(**TINY)


@pytest.mark.parametrize("kind", phantom.CLASSES)
def test_subject_is_a_record_and_a_function_of_its_seed(kind):
    study = phantom.subject((3, 1), CFG, kind)
    again = phantom.subject((3, 1), CFG, kind)
    assert encode(study) == encode(again)
    assert encode(study) != encode(phantom.subject((3, 2), CFG, kind))
    study = decode(encode(study))
    assert study["labels"] == {k: float(k == kind) for k in phantom.CLASSES}
    assert 2 <= len(study["scans"]) <= 6
    assert len({s["name"] for s in study["scans"]}) == len(study["scans"])
    for scan in study["scans"]:
        assert scan["voxels"].dtype == np.uint8 and scan["voxels"].shape[1:] == (24, 24)
        assert scan["voxels"].std() > 5
        assert abs(np.linalg.det(scan["affine"][:3, :3])) == pytest.approx(
            scan["meta"]["slice_mm"] * scan["meta"]["pixel_mm"] ** 2, rel=1e-3
        )
        assert ("mask_runs" in scan["meta"]) == (kind != "normal")


def test_lesions_are_where_the_mask_and_the_report_say():
    for seed in range(4):
        study = phantom.subject((seed,), phantom.Config(noise=(0.01, 0.01)), "hemorrhage")
        ct = [s for s in study["scans"] if s["name"] == "ct"]
        x = np.mean([_centre(s)[0] for s in study["scans"]])
        side = "left" if "left" in study["sentences"][0] else "right"
        assert (x < 0) == (side == "left")
        for scan in ct:
            mask = masks.from_runs(scan["meta"]["mask_runs"], scan["voxels"].shape)
            near = (scan["voxels"] > 20) & (scan["voxels"] < 235) & ~mask
            assert scan["voxels"][mask].mean() > scan["voxels"][near].mean() + 20


def _centre(scan):
    """Centre of the mask in patient millimetres, in the head's own frame (the tilt is small)."""
    mask = masks.from_runs(scan["meta"]["mask_runs"], scan["voxels"].shape)
    return (scan["affine"] @ [*np.argwhere(mask).mean(0), 1])[:3]


def test_contrasts_follow_the_signal_equations():
    rng = np.random.default_rng(0)
    names = (*phantom_anatomy.TISSUES, *phantom_anatomy.LESION_PARTS)
    for _ in range(5):
        s = {k: dict(zip(names, phantom_imaging.signals(rng, k))) for k in phantom_imaging.SEQUENCES}
        assert s["t1w"]["white"] > s["t1w"]["grey"] > s["t1w"]["csf"]
        assert s["t2w"]["csf"] > s["t2w"]["oedema"] > s["t2w"]["grey"] > s["t2w"]["white"]
        assert s["flair"]["ischemia"] > s["flair"]["grey"] > s["flair"]["csf"]
        assert s["t1c"]["solid"] > s["t1c"]["white"] and s["t1w"]["solid"] < s["t1w"]["white"]
        assert s["ct"]["bone"] > s["ct"]["clot"] > s["ct"]["grey"] > s["ct"]["ischemia"] > s["ct"]["fat"]


def test_masks_survive_their_run_lengths():
    rng = np.random.default_rng(0)
    for p in (0.0, 0.3, 1.0):
        mask = rng.random((3, 4, 5)) < p
        np.testing.assert_array_equal(masks.from_runs(masks.to_runs(mask), mask.shape), mask)
    with pytest.raises(ValueError):
        masks.from_runs([3, 4], (2, 2))


def test_reports_vary_and_do_not_follow_the_lesion():
    rng = np.random.default_rng(0)
    said = {phantom_words.lesion_sentence(rng, "mass", side="left", region="deep", mm=31) for _ in range(60)}
    assert len(said) > 8 and all("30 mm" in s for s in said)
    others = dict.fromkeys(phantom_words.OTHER)
    assert phantom_words.report(rng, "x", others | {"cyst": "left"})[0] == "x"


def test_make_goes_on_where_it_was_stopped_and_is_done_once(tmp_path, capsys, monkeypatch):
    options = dict(train=6, val=2, test=4, seed=1, shard_records=4, **TINY)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    phantom.make(whole, threads=1, **options)
    assert "hemorrhage" in capsys.readouterr().out

    subject, calls = phantom.subject, []

    def dies(key, cfg):
        calls.append(key)
        if len(calls) > 6:
            raise RuntimeError("killed")
        return subject(key, cfg)

    monkeypatch.setattr(phantom, "subject", dies)
    with pytest.raises(RuntimeError):
        phantom.make(broken, threads=1, **options)
    assert len(shards.sidecars(broken)) == 1 and not (broken / shards.MANIFEST).exists()
    monkeypatch.setattr(phantom, "subject", subject)
    phantom.make(broken, threads=2, **options)
    a, b = (json.loads((d / shards.MANIFEST).read_text()) for d in (whole, broken))
    assert a == b  # checksums of shards and index included
    assert a["splits"] == {"train": 6, "val": 2, "test": 4} and a["recipe"]["synthetic"]
    patients = shards.open_dataset(whole).index["patient"]
    assert len(set(patients.tolist())) == 12

    monkeypatch.setattr(phantom, "subject", None)  # nothing to do: nothing is made
    phantom.make(whole, **options)
    with pytest.raises(UserError, match=r"another dataset.*counts"):
        phantom.make(whole, **{**options, "train": 7})
    with pytest.raises(UserError, match=r"source\.sise"):
        phantom.make(whole, sise=3)


def test_raw_files_keep_the_geometry(tmp_path):
    manifest = phantom_raw.write_raw(tmp_path, 2, dicom_every=2)
    assert len(manifest.read_text().splitlines()) == 3
    nifti = sorted((tmp_path / "phantom-0001").glob("*.nii.gz"))
    study = phantom.subject((0, 3, 1), phantom_raw.RAW, phantom.CLASSES[1], raw=True)
    assert {p.name for p in nifti} == {f"{s['name']}.nii.gz" for s in study["scans"]}
    scan = study["scans"][0]
    image = nibabel.load(tmp_path / "phantom-0001" / f"{scan['name']}.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), scan["voxels"])
    np.testing.assert_allclose(image.affine @ [3, 2, 1, 1], scan["affine"] @ [1, 2, 3, 1], atol=1e-3)

    study = phantom.subject((0, 3, 0), phantom_raw.RAW, phantom.CLASSES[0], raw=True)
    for number, scan in enumerate(study["scans"], start=1):
        d = pydicom.dcmread(tmp_path / "phantom-0000" / f"series{number:02d}" / "I0002")
        values = d.pixel_array * float(d.get("RescaleSlope", 1)) + float(d.get("RescaleIntercept", 0))
        np.testing.assert_array_equal(values, scan["voxels"][2])
        corner = scan["affine"] @ [2, 0, 0, 1] * [-1, -1, 1, 1]
        np.testing.assert_allclose(d.ImagePositionPatient, corner[:3], atol=1e-4)
        assert d.PatientName == "PHANTOM^SYNTHETIC"
        for file in (tmp_path / "phantom-0000").rglob("I*"):
            assert not file.suffix


def test_command(tmp_path, capsys):
    assert phantom.main([f"--out={tmp_path / 'raw'}", "--raw=1"]) == 0
    assert "manifest.csv" in capsys.readouterr().out
    (tmp_path / "x").write_text("")
    assert phantom.main([f"--out={tmp_path / 'x'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
