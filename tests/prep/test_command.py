"""`python -m jaxmed.prep` as a whole: restartable, deterministic, de-identified, clear about what goes wrong."""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from jaxmed.data import ops, shards
from jaxmed.prep import run
from jaxmed.prep.__main__ import main
from jaxmed.prep.pool import Died, Failed, Pool

SALT = "a salt for tests only"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def salt(monkeypatch):
    monkeypatch.setenv("JAXMED_PREP_SALT", SALT)


def nifti(path: Path, seed: int, shape=(40, 44, 12), spacing=(1.5, 1.5, 5.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    voxels[10:30, 10:30, 4:8] = 1200
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*spacing, 1.0])), path)


def studies(folder: Path, count: int, **kwargs) -> Path:
    for i in range(count):
        nifti(folder / f"visit{i}" / "scan.nii.gz", i, **kwargs)
    return folder


def command(*args, limit: int | None = None, **kwargs) -> subprocess.CompletedProcess:
    """The command in a process of its own; `limit` is the size that no file may exceed (a disk that is full)."""
    small = [] if limit is None else ["bash", "-c", f'ulimit -f {limit // 1024} && exec "$@"', "-"]
    line = [*small, sys.executable, "-m", "jaxmed.prep", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


def content(out: Path) -> dict[str, str]:
    """Hashes of everything a user sees, by name."""
    files = [p for p in out.iterdir() if p.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def report(out: Path) -> dict:
    return json.loads((out / "prep_report.json").read_text())


def half_written(out: Path) -> list[str]:
    return [p.name for p in out.rglob("*.tmp")]


# Restart and determinism.


def test_shards_do_not_depend_on_workers_and_survive_kill_9(tmp_path, capsys):
    raw = studies(tmp_path / "raw", 7, shape=(80, 80, 70), spacing=(2.0, 2.0, 3.0))
    (raw / "visit3" / "notes.txt").write_text("no image")
    options = [
        raw,
        "--recipe=hlip_chest_ct",
        "--recipe.size=64,160,160",
        "--name=x",
        "--shard-studies=2",
        "--split=train=0.5,val=0.5",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main([*map(str, options), f"--out={straight}", "--workers=0"]) == 0
    line = [sys.executable, "-m", "jaxmed.prep", *map(str, options), f"--out={killed}", "--workers=2"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.glob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = shards.sidecars(killed)
    assert 1 <= len(whole) < 4 and not (killed / "dataset.json").exists()
    for sidecar in whole:
        data = (killed / sidecar["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sidecar["sha256"]
    kept = (killed / whole[0]["file"]).stat().st_mtime_ns
    (killed / ".shard-00003.array_record.1.tmp").write_bytes(b"half a shard")
    assert main([*map(str, options), f"--out={killed}", "--workers=0"]) == 0
    assert (killed / whole[0]["file"]).stat().st_mtime_ns == kept  # continued, not done again
    assert content(killed) == content(straight) and not half_written(killed)
    dataset = shards.open_dataset(killed, verify="full")
    assert len(dataset) == 7 and dataset.manifest["recipe"]["value_range"] == [-1150, 350]
    assert (
        dataset.manifest["recipe"]["read"]["max_volumes"] == 1 and dataset.manifest["recipe"]["name"] == "hlip_chest_ct"
    )
    assert set(dataset.index["split"]) == {"train", "val"} and list(dataset.index["key"]) == sorted(
        dataset.index["key"]
    )
    assert [r["reason"] for r in report(killed)["rejects"]] == ["not-an-image"]
    # Nothing left to do, and a shard that the user deleted comes back.
    (killed / whole[0]["file"]).unlink()
    assert main([*map(str, options), f"--out={killed}", "--workers=0"]) == 0
    assert content(killed) == content(straight)
    assert main([*map(str, options), f"--out={killed}", "--workers=0", "--recipe.size=96,96,96"]) == 2
    assert "--recipe (size 64 then, 96 now, size 160 then, 96 now" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [3_000, 200_000])
def test_a_full_disk_is_one_error_and_nothing_half_written(tmp_path, limit):
    raw = studies(tmp_path / "raw", 4, shape=(60, 60, 30))
    options = [raw, f"--out={tmp_path / 'out'}", "--name=x", "--shard-studies=2", "--workers=1"]
    full = command(*options, limit=limit)
    assert full.returncode == 2 and full.stderr.count("error: cannot write") == 1, full.stderr
    assert "Traceback" not in full.stderr and "run the same command again" in full.stderr
    out = tmp_path / "out"
    assert not list(out.glob("shard-*")) and not half_written(out) and not (out / "dataset.json").exists()
    assert main([*map(str, options[:-1]), "--workers=0"]) == 0
    assert main([str(raw), f"--out={tmp_path / 'b'}", "--name=x", "--shard-studies=2", "--workers=0"]) == 0
    assert content(tmp_path / "b") == content(out)


def open_dataset(dir: str, count: int):
    """A source for `--source=tests.prep.test_command`: study 1 takes its process along, study 2 fails, 3 is empty."""

    class Record:
        def __init__(self, i):
            self.i = i

        def study(self):
            if self.i == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.i == 2:
                raise ValueError("Mr. Nobody has no scan")
            voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5) * (self.i != 3)
            scan = {"voxels": voxels, "affine": np.diag([3.0, 2, 1, 1]), "name": "volume", "meta": {}}
            return {
                "scans": [scan],
                "sentences": ["Ok."],
                "labels": {"even": self.i % 2},
                "split": "val" if self.i else "",
            }

    index = {k: np.array([f"Nobody {i}" for i in range(count)]) for k in ("key", "patient")}
    index["scans"] = np.ones(count, int)
    return types.SimpleNamespace(index=index, record=Record, fingerprint="f")


def test_a_worker_that_dies_costs_one_study(tmp_path):
    out = tmp_path / "out"
    source = ["--source=tests.prep.test_command", "--source.dir=d", "--source.count=6"]
    done = command(*source, f"--out={out}", "--workers=2", "--codec=b2nd")
    assert done.returncode == 0, done.stderr
    rejects = {r["reason"]: r for r in report(out)["rejects"]}
    assert set(rejects) == {"worker-died", "failed", "constant", "no-images"}
    assert (
        rejects["worker-died"]["detail"] == "SIGKILL" and "ValueError at test_command.py" in rejects["failed"]["detail"]
    )
    assert rejects["worker-died"]["kind"] == "study" and report(out)["reasons"]["worker-died"]
    written = shards.open_dataset(out).read(range(3))
    assert sorted(s["split"] for s in written) == ["train", "val", "val"]
    assert sum(s["labels"]["even"] for s in written) == 1 and written[0]["sentences"] == ["Ok."]
    everything = done.stdout + done.stderr + "".join(p.read_text("latin1") for p in out.rglob("*") if p.is_file())
    assert "Nobody" not in everything + repr(written)


DIE = "__import__('os').kill(__import__('os').getpid(), 11)"


def test_pool_keeps_the_order_and_replaces_the_dead():
    with Pool(2) as pool:
        results = list(pool.run(eval, ["0", "1", DIE, "1/0", *"456"]))
        assert [text for text, _ in results] == ["0", "1", DIE, "1/0", *"456"]
        assert [r for _, r in results if isinstance(r, int)] == [0, 1, 4, 5, 6]
        assert results[2][1] == Died("SIGSEGV")
        assert isinstance(results[3][1], Failed) and isinstance(results[3][1].error, ZeroDivisionError)
        assert list(pool.run(eval, [])) == []
        assert next(pool.run(eval, iter(["7"] * 99)))[1] == 7  # an abandoned run
    assert not pool._idle and not pool._busy
    with Pool(1) as pool:  # reading headers: the file is refused, its neighbours are not
        before, dead, after = run._map(pool, eval, ["1", DIE, "2"])
    assert (before, after) == (1, 2) and "SIGSEGV" in dead.detail and dead.reason == "unreadable" and not dead.kind


# Identities.

SECRETS = ("ZZNAME", "ZZFIRST", "ZZID12345", "19470111", "ZZACC777", "ZZHOSPITAL", "ZZDOCTOR", "ZZSTATION", "8.498.777")
UID = "1.2.826.0.1.3680043.8.498.777"


def dicom(folder: Path, count: int = 6) -> None:
    """A CT series whose header is full of identities."""
    folder.mkdir(parents=True)
    for i in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"{UID}.3.{i}"
        d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, f"{UID}.3.{i}"
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = f"{UID}.1", f"{UID}.2", f"{UID}.4"
        d.PatientName, d.PatientID, d.PatientBirthDate = "ZZNAME^ZZFIRST", "ZZID12345", "19470111"
        d.AccessionNumber, d.StudyID, d.StudyDate = "ZZACC777", "ZZACC777", "19470111"
        d.InstitutionName, d.ReferringPhysicianName, d.StationName = "ZZHOSPITAL", "ZZDOCTOR^A", "ZZSTATION"
        d.StudyDescription, d.SeriesDescription = "for Dr ZZDOCTOR", "head of ZZNAME"
        d.ProtocolName, d.ImageComments, d.BodyPartExamined = "ZZNAME protocol", "ZZNAME said hello", "HEAD"
        d.Modality, d.SeriesNumber, d.InstanceNumber, d.ImageType = "CT", 2, i + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        d.ImagePositionPatient, d.ImageOrientationPatient = [-20, -30, 5.0 * i], [1, 0, 0, 0, 1, 0]
        d.PixelSpacing, d.SliceThickness = [1.5, 1.5], 5
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = 24, 20, 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleSlope, d.RescaleIntercept = 1, -1024
        pixels = np.random.default_rng(i).integers(0, 2000, (24, 20)).astype("<i2")
        if i == 1:
            pixels = pixels[:-5]  # truncated
        d.PixelData = pixels.tobytes()
        pydicom.dcmwrite(folder / f"ZZNAME_{i}.dcm", d)


def test_no_identity_reaches_shards_reports_or_logs(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    dicom(raw / "ZZNAME, ZZFIRST 1947-01-11" / UID)
    (raw / "ZZID12345.txt").write_text("ZZNAME")
    (raw / "list.csv").write_text(
        "StudyInstanceUID,patient,report,label:bleed\n"
        + f"{UID}.1,ZZID12345,No bleeding. Normal.,0\n"
        + f"{UID}.9,,x.,1\n"
    )
    done = command(raw, f"--out={out}", f"--manifest={raw / 'list.csv'}", "--recipe=hlip_head_ct", "--workers=1")
    assert done.returncode == 0, done.stderr
    [study] = shards.open_dataset(out).read([0])
    assert len(study["scans"]) == 3 and study["labels"] == {"bleed": 0}
    assert study["sentences"] == ["No bleeding.", "Normal."] and study["scans"][0]["meta"]["modality"] == "CT"
    places = [p for p in out.rglob("*") if p.is_file()]
    everything = done.stdout + done.stderr + repr(study) + "".join(f"{p}" + p.read_text("latin1") for p in places)
    index = np.load(out / "index.npz")
    everything += "".join(repr(index[k].tolist()) for k in index)
    assert not [s for s in SECRETS if s.lower() in everything.lower()]
    found = {(r["reason"], r["kind"]) for r in report(out)["rejects"]}
    assert {("truncated-pixel-data", "file"), ("not-an-image", "file"), ("row-without-study", "manifest")} <= found


def test_salts(tmp_path, monkeypatch, capsys):
    raw = str(studies(tmp_path / "raw", 1))
    keys = {}
    for name, salt in (("a", SALT), ("b", "another salt"), ("c", None), ("d", None)):
        monkeypatch.setenv("JAXMED_PREP_SALT", salt) if salt else monkeypatch.delenv("JAXMED_PREP_SALT", raising=False)
        assert main([raw, f"--out={tmp_path / name}", "--workers=0"]) == 0
        keys[name] = shards.open_dataset(tmp_path / name).index["key"][0]
    assert len(set(keys.values())) == 4
    own = tmp_path / "c" / ".prep" / "salt"
    assert own.stat().st_mode & 0o777 == 0o600 and not (tmp_path / "a" / ".prep" / "salt").exists()
    assert main([raw, f"--out={tmp_path / 'c'}", "--workers=0"]) == 0  # its own salt is found again
    assert main([raw, f"--out={tmp_path / 'e'}", "--workers=0", f"--salt-file={own}"]) == 0
    assert shards.open_dataset(tmp_path / "e").index["key"][0] == keys["c"]
    capsys.readouterr()
    assert main([raw, f"--out={tmp_path / 'a'}", "--workers=0", f"--salt-file={own}"]) == 2
    assert "different: the salt" in capsys.readouterr().err
    (tmp_path / "short").write_text("abc")
    for wrong, message in ((tmp_path / "short", "at least 8"), (tmp_path / "none", "cannot be read")):
        assert main([raw, f"--out={tmp_path / 'f'}", "--workers=0", f"--salt-file={wrong}"]) == 2
        assert message in capsys.readouterr().err


# Real files that come with the dependencies.


def test_real_files(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    brain = Path(nibabel.__file__).parent / "tests" / "data"
    ct = Path(pydicom.__file__).parent / "data" / "test_files"
    for source, target in (
        (brain / "example4d.nii.gz", raw / "brain" / "example4d.nii.gz"),
        (brain / "anatomical.nii", raw / "brain" / "anatomical.nii"),
        *(
            (ct / f"{n}.dcm", raw / "dicom" / n)
            for n in ("CT_small", "MR_small", "rtstruct", "reportsi", "MR_truncated")
        ),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    assert main([str(raw), f"--out={out}", "--workers=0"]) == 0
    table = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[-1].isdigit())
    assert (table["studies written"], table["scans"]) == ("3", "5") and table["refused: rt-object"] == "1"
    written = shards.open_dataset(out).read(range(3))
    by_shape = {s["voxels"].shape: (s, study) for study in written for s in study["scans"]}
    assert set(by_shape) == {(24, 96, 128), (25, 41, 33), (1, 128, 128), (1, 64, 64)}
    for name, shape in (("example4d.nii.gz", (24, 96, 128)), ("anatomical.nii", (25, 41, 33))):
        image = nibabel.load(brain / name)
        scan, study = by_shape[shape]
        assert len(study["scans"]) == 3  # two volumes and another scan: one folder, one study
        np.testing.assert_allclose(scan["affine"], image.affine[:, [2, 1, 0, 3]], atol=1e-4)
        voxels = np.asarray(image.dataobj).reshape(*image.shape[:3], -1)
        assert any(np.array_equal(scan["voxels"], voxels[..., i].T) for i in range(voxels.shape[-1]))
    scan, _ = by_shape[(1, 128, 128)]
    assert (scan["name"], scan["meta"]["modality"]) == ("ct", "CT") and scan["voxels"].min() < -500
    # The same files with a recipe: what it does not take is listed, a map comes back into the scan's own space.
    assert main([str(raw), f"--out={tmp_path / 'mri'}", "--workers=0", "--recipe=hlip_brain_mri"]) == 0
    assert report(tmp_path / "mri")["counts"]["rejected"]["wrong-modality"] == 1
    dataset = shards.open_dataset(tmp_path / "mri")
    assert sorted(dataset.index["scans"]) == [1, 3]
    assert set(dataset.index["depth"]) == {48} and set(dataset.index["height"]) == {224}
    study = dataset.read([int(np.argmax(dataset.index["scans"]))])[0]
    scan = next(s for s in study["scans"] if s["source_shape"] == (24, 96, 128))
    assert ops.axis_codes(scan["affine"]) == "IPR"
    back = ops.back_to_source(scan["voxels"], scan["affine"], scan["source_affine"], scan["source_shape"])
    original = np.asarray(nibabel.load(brain / "example4d.nii.gz").dataobj)[..., scan["meta"]["volume"]].T
    assert np.corrcoef(back.ravel(), original.ravel())[0, 1] > 0.99


# Manifest, vocabulary, bad input.


def test_manifest_and_vocabulary(tmp_path, capsys):
    raw, out = studies(tmp_path / "raw", 3), tmp_path / "out"
    (tmp_path / "m.csv").write_text(
        "path,split,Findings_EN,Impressions_EN,label:mass\n"
        "raw/visit0,train,The (large) heart,Big heart,1\nraw/visit1,test,,Normal,\n"
    )
    options = [str(raw), "--workers=0", f"--manifest={tmp_path / 'm.csv'}"]
    assert main([*options, f"--out={out}", "--report=ct_rate_raw"]) == 0
    dataset = shards.open_dataset(out)
    assert dataset.manifest["splits"] == {"test": 1, "train": 2} and dataset.manifest["classes"] == ["mass"]
    texts = {tuple(s["sentences"]) for s in dataset.read(range(3))}
    assert texts == {
        ("The volume shows: Big heart. The volume looks like: The large heart.",),
        ("The volume shows: Normal.",),
        (),
    }
    assert report(out)["counts"]["noted"] == {"study-without-row": 1} and report(out)["rejects"] == []
    capsys.readouterr()
    vocab = tmp_path / "vocab.txt"
    assert main(["vocab", f"--reports={out}", "--size=120", f"--out={vocab}"]) == 0
    assert "heart" in vocab.read_text().split() and "[CLS]" in vocab.read_text() and "normal" not in vocab.read_text()
    columns = ["--column=Impressions_EN", f"--reports={tmp_path / 'm.csv'}"]
    assert main(["vocab", *columns, "--size=90", f"--out={vocab}", "--cased"]) == 0
    assert "Normal" in vocab.read_text().split()
    assert "from 2 texts" in capsys.readouterr().out
    assert main([*options, f"--out={tmp_path / 'o'}", "--report=ct_rate_organ"]) == 2
    assert "lung_conclusion" in capsys.readouterr().err
    for args, message in (
        ([f"--reports={tmp_path / 'm.csv'}", "--size=90"], "no column report or text"),
        ([f"--reports={tmp_path / 'm.csv'}", "--size=90", "--column=x"], "no column x; it has Findings_EN"),
        ([f"--reports={tmp_path / 'none.txt'}", "--size=90"], "cannot be read"),
        ([*columns, "--size=9"], "cannot hold"),
    ):
        assert main(["vocab", *args, f"--out={vocab}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either folders"),
        (["{raw}"], "--out=DIR is missing"),
        (["{raw}", "--out={out}", "--recipe=hlip_mri"], "choose one of hlip_brain_mri"),
        (["{raw}", "--out={out}", "--recipe.slices=3"], "recipe native has no such option"),
        (["{raw}", "--out={out}", "--recipes.slices=3"], "unknown argument --recipes.slices=3"),
        (["{raw}", "--out={out}", "--recipe.axes"], "--recipe.OPTION=VALUE"),
        (["{raw}", "--out={out}", "--work=3"], "unknown argument --work=3"),
        (["{raw}", "--out={out}", "--workers=-1"], "must be 0 or more"),
        (["{raw}", "--out={out}", "--report=organs"], "invalid choice: 'organs'"),
        (["{raw}", "--out={out}", "--codec=zip"], "--codec=zip: choose one of"),
        (["{raw}", "--out={out}", "--split=train=0.5"], "sum to 1"),
        (["{raw}", "--out={out}", "--manifest={raw}/none.csv"], "none.csv"),
        (["{raw}/nothing", "--out={out}"], "nothing' does not exist"),
        (["{raw}", "--out={raw}/out"], "lies inside the source"),
        (["{raw}/visit0", "--out={raw}/visit0/scan.nii.gz"], "lies inside the source"),
        (["{raw}/visit0", "--out={file}/out"], "cannot be written"),
        (["{raw}", "--out={out}", "--manifest={raw}", "--labels=x"], "unknown kind"),
        (["{raw}", "--out={out}", "--labels=x"], "give it with --manifest=FILE"),
        (["{raw}", "--out={out}", "--study=["], "--study=\\[: no regular expression"),
        (["--source=tfds", "--out={out}", "--patient=x"], "--patient is about files"),
        (
            ["{raw}", "--out={out}", "--recipe=hlip_head_ct", "--recipe.modalities=CT"],
            "no usable study.*wrong-modality",
        ),
        (["--source=nosuch", "--out={out}"], "no module"),
        (["--source=tests.prep.test_command", "--out={out}"], "missing a required argument: 'dir'"),
        (["{raw}", "--source=tfds", "--out={out}"], "give either"),
        (["{raw}", "--source.dir=x", "--out={out}"], "needs --source=NAME"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, args, message):
    names = {"raw": studies(tmp_path / "raw", 1), "out": tmp_path / "out", "file": tmp_path / "file"}
    names["file"].touch()
    extra = [] if "--workers=-1" in args else ["--workers=0"]
    assert main([a.format(**names) for a in args] + extra) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), errors
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_out_folders_that_are_not_ours_to_write(tmp_path, capsys):
    raw, out = str(studies(tmp_path / "raw", 1)), tmp_path / "out"
    assert main([raw, f"--out={out}", "--workers=0"]) == 0
    with open(out / ".prep" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([raw, f"--out={out}", "--workers=0"]) == 2
    assert "another prep is at work" in capsys.readouterr().err
    studies(tmp_path / "raw", 2)
    assert main([raw, f"--out={out}", "--workers=0"]) == 2
    assert "the sources or the manifest" in capsys.readouterr().err
    assert (
        main([raw, f"--out={tmp_path / 'wrong'}", "--workers=0", "--recipe=hlip_head_ct", "--read.min_slices=99"]) == 2
    )
    assert main([raw, f"--out={tmp_path / 'wrong'}", "--workers=0"]) == 0  # nothing was stored: arguments may change
    (out / ".prep" / "run.json").unlink()
    assert main([raw, f"--out={out}", "--workers=0"]) == 2
    assert "did not write" in capsys.readouterr().err


def test_dry_run_and_lists(tmp_path, capsys):
    raw, out = str(studies(tmp_path / "raw", 2)), tmp_path / "out"
    assert main([raw, f"--out={out}", "--workers=0", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "studies found" in printed and "shards planned" in printed and not out.exists()
    assert main(["--list-recipes"]) == 0
    assert json.loads(capsys.readouterr().out)["hlip_head_ct"]["options"]["windows"]["bone"] == [600, 2800]
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "JAXMED_PREP_SALT" in capsys.readouterr().out
