"""Finding studies in folders, zips and BIDS trees, joining them with manifests, and keeping identities out."""

import gzip
import io
import json
import os
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest

from jaxmed.core.errors import UserError
from jaxmed.prep import recipes
from jaxmed.prep.discover import find_studies
from jaxmed.prep.manifest import read_manifest, split_sentences
from jaxmed.prep.scan import read_scans
from tests.prep import make_series as make
from tests.prep.reading import nifti, only

VOLUME = np.random.default_rng(7).integers(0, 1000, (8, 6, 5)).astype(np.int16)
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"
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
    assert "sub-03" not in repr(rejects)
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
    manifest.write_text("path,report\nelsewhere/a.nii,One.\n")
    with pytest.raises(UserError, match=r"m\.csv: none of its 1 rows fits any of the 6 images \(looked for by path"):
        find_studies([tmp_path / "in"], salt=SALT, manifest=manifest)


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


def ct_rate(folder: Path) -> dict:
    """A small CT-RATE as it is published: volumes of stored values without geometry, and its three tables.

    Returns the keywords of `find_studies` for it.
    """
    volumes = {"train_1_a_1": 1, "train_1_a_2": 2, "train_1_b_1": 3, "train_2_a_1": 4, "train_1267_a_4": 5}
    for name, level in volumes.items():
        place = folder / "train" / name.rsplit("_", 2)[0] / name.rsplit("_", 1)[0]
        place.mkdir(parents=True, exist_ok=True)
        nifti(place / f"{name}.nii.gz", (VOLUME + level).transpose(2, 1, 0), np.eye(4))
    ids = [f"{name}.nii.gz" for name in [*volumes, "train_9_a_1"]]
    (folder / "reports.csv").write_text(
        "VolumeName,ClinicalInformation_EN,Findings_EN,Impressions_EN\n"
        + "".join(f"{i},cough,Clear {i[:9]}.,Normal\n" for i in ids)
    )
    (folder / "metadata.csv").write_text(
        "VolumeName,Manufacturer,PatientAge,RescaleIntercept,RescaleSlope,XYSpacing,ZSpacing\n"
        + "".join(f'{i},X,044Y,-1024,1,"[0.7, 0.6]",{1.5 + n}\n' for n, i in enumerate(ids))
    )
    (folder / "labels.csv").write_text(
        "VolumeName,Lung nodule,Cardiomegaly\n" + "".join(f"{i},{int('1_a' in i)},0\n" for i in ids)
    )
    tables = [folder / "reports.csv", folder / "metadata.csv"]
    return {"salt": SALT, "manifest": tables, "labels": [str(folder / "labels.csv")], "report": "ct_rate_raw"}


def test_ct_rate_as_published(tmp_path):
    options = ct_rate(tmp_path)
    skip = recipes.get("hlip_chest_ct_published").read["skip_names"]
    options |= {"patient": r"train_\d+", "skip_names": skip, "paths": "keep"}
    studies, rejects = find_studies([tmp_path / "train"], **options)
    assert sorted(len(s.series) for s in studies) == [1, 1, 2] and len({s.patient for s in studies}) == 2
    two = max(studies, key=lambda s: len(s.series))
    assert two.sentences == ["The volume shows: Normal. The volume looks like: Clear train_1_a."]
    assert two.labels == {"Lung nodule": 1.0, "Cardiomegaly": 0.0}
    for n, series in enumerate(two.series):
        scan = only(read_scans(series))
        assert np.array_equal(scan.voxels, VOLUME + n + 1 - 1024) and scan.voxels.dtype == np.int16
        assert np.allclose(scan.meta["spacing"], [1.5 + n, 0.7, 0.6]) and scan.meta["step"] == 1.5 + n
        assert scan.meta["from_manifest"] == "rescale spacing"
    assert {(r.path, r.reason) for r in rejects} == {
        ("train/train_1267/train_1267_a/train_1267_a_4.nii.gz", "skipped-by-name"),
        *((f"{t}.csv:{line}", "row-without-study") for t in ("reports", "metadata", "labels") for line in (6, 7)),
        ("reports.csv", "unread-columns"),
        ("metadata.csv", "unread-columns"),
    }
    assert {r.detail for r in rejects if r.reason == "unread-columns"} == {
        "ClinicalInformation_EN",
        "Manufacturer, PatientAge",
    }
    # A header that scales by itself is replaced, not followed by the table's numbers.
    place = tmp_path / "train" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz"
    data = bytearray(gzip.decompress(place.read_bytes()))
    struct.pack_into("<2f", data, 112, 1, -1024)
    place.write_bytes(gzip.compress(data))
    assert float(nibabel.load(place).dataobj.inter) == -1024
    [one] = [s for s in find_studies([tmp_path / "train"], **options)[0] if "train_2_a" in s.sentences[0]]
    assert np.array_equal(only(read_scans(one.series[0])).voxels, VOLUME + 4 - 1024)
    # Another layout: all volumes in one folder. Only the expression says what a study is.
    (tmp_path / "flat").mkdir()
    for path in (tmp_path / "train").rglob("*.nii.gz"):
        shutil.copy(path, tmp_path / "flat")
    flat, _ = find_studies([tmp_path / "flat"], **options, study=r"train_\d+_[a-z]+")
    content = [(s.patient, s.sentences, s.labels, [(x.rescale, x.spacing) for x in s.series]) for s in studies]
    found = [(s.patient, s.sentences, s.labels, [(x.rescale, x.spacing) for x in s.series]) for s in flat]
    assert sorted(found, key=str) == sorted(content, key=str)
    # One column of the table instead of all.
    options |= {"manifest": [*options["manifest"], tmp_path / "labels.csv"], "labels": ["cardiomegaly"]}
    studies, _ = find_studies([tmp_path / "train"], **options)
    assert all(s.labels == {"Cardiomegaly": 0.0} for s in studies)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["Cardiomegalia"]}, "--labels=Cardiomegalia: no manifest has this column; there are VolumeName"),
        ({"labels": ["Cardiomegaly"], "manifest": []}, "give it with --manifest=FILE"),
        ({"labels": ["{}/reports.csv"]}, "reports.csv, line 2, column 'ClinicalInformation_EN': label"),
        ({"report": "ct_rate_organ"}, "reports.csv: --report=ct_rate_organ needs the columns lung_conclusion"),
        ({"study": r"valid_\d+"}, r"--study=valid_\d+: matches no image, e.g. not 'train/"),
        ({"patient": "("}, "--patient=(: no regular expression"),
        ({"manifest": ["{}/twice.csv"]}, "twice.csv, line 3: spacing (9.0, None, None) contradicts"),
    ],
)
def test_wrong_tables_of_volumes(tmp_path, options, said):
    good = ct_rate(tmp_path)
    (tmp_path / "twice.csv").write_text("VolumeName,ZSpacing\ntrain_1_a_1,3\ntrain_1_a_1.nii.gz,9\n")
    options = {k: [str(w).format(tmp_path) for w in v] if isinstance(v, list) else v for k, v in options.items()}
    if options.get("manifest"):
        good |= {"labels": [], "report": "sentences"}
    with pytest.raises(UserError) as e:
        find_studies([tmp_path / "train"], **good | options)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.csv", "path,XYSpacing\na,0.7 mm\n", "line 2, column 'XYSpacing': '0.7 mm' is not one or two positive"),
        ("m.csv", "path,ZSpacing\na,-1\n", "'-1' is not a positive number (mm)"),
        ("m.csv", "path,rescale_slope\na,0\n", "'0' is not a number other than 0"),
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
    two_studies(tmp_path / "elsewhere")
    (tmp_path / "linked").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "linked" / "all")
    assert len(find_studies([tmp_path / "linked"], salt=SALT)[0]) == 2
    studies, rejects = find_studies([tmp_path / "in"], salt=SALT)
    assert len(studies) == 2 and {(r.path, r.reason) for r in rejects} == {
        ("in/dangling", "unreadable"),
        ("in/loop", "unreadable"),
    }
