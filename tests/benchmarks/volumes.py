"""Real volumes as both sides store them: prepared by the recipes into shards, and the same voxels as uint8 `.pt`."""

import contextlib
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np

from jaxmed.data import shards
from jaxmed.prep.__main__ import main as prep

DATA = Path(__file__).resolve().parents[2] / ".cache" / "data"
STUDIES, SCANS = 8, 10
KINDS = ("t1", "head_ct")


def write(kind: str, folder: str, codecs) -> dict:
    """Eight studies of ten scans of 48 x 224 x 224. No public package has so many: a study is ten times the scan that
    the recipe makes (head CT: its three windows in turn), each shifted by some rows so that no two scans are equal.
    """
    import torch

    folder = Path(folder)
    source = folder / "source"
    source.mkdir(parents=True)
    if kind == "t1":
        shutil.copy(DATA / "pycortex" / "anatomicals" / "raw.nii.gz", source / "t1w.nii.gz")
        recipe = "hlip_brain_mri"
    else:
        _head_ct(source / "ct.nii")
        recipe = "hlip_head_ct"
    if prep([str(source), f"--out={folder / 'prepared'}", f"--recipe={recipe}", "--workers=0"]):
        sys.exit("the recipe failed")
    [study] = shards.open_dataset(folder / "prepared").read([0])
    files, n = [], 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(shards.ShardWriter(folder / c, 0, c)) for c in codecs]
        for i in range(STUDIES):
            scans, paths = [], []
            for k in range(SCANS):
                one = study["scans"][k % len(study["scans"])]
                one = {**one, "voxels": np.ascontiguousarray(np.roll(one["voxels"], n := n + 1, axis=1))}
                scans.append(one)
                paths.append(str(folder / f"{i}_{k}.pt"))
                torch.save(torch.from_numpy(one["voxels"]), paths[-1])
            for writer in writers:
                writer.add({"key": str(i), "scans": scans, "sentences": [], "split": "train"})
            files.append(paths)
    for codec in codecs:
        shards.finish(folder / codec, kind)
    return {
        "folder": str(folder),
        "files": files,
        "scans": SCANS,
        "depth": scans[0]["voxels"].shape[0],
        "pt": sum(Path(p).stat().st_size for paths in files for p in paths),
        "shards": {c: sum(p.stat().st_size for p in (folder / c).glob("*.array_record")) for c in codecs},
    }


def _head_ct(path: Path) -> None:
    """The cranium CT of the InVesalius examples as NIfTI: (108, 256, 256) int16 HU, 1.5 x 0.957 x 0.957 mm."""
    import nibabel

    with tarfile.open(DATA / "invesalius-examples" / "Cranium.inv3") as archive:
        member = next(m for m in archive if m.name.endswith("/matrix.dat"))
        raw = archive.extractfile(member).read()
    size = 108 * 256 * 256 * 2
    voxels = np.frombuffer(raw[len(raw) - size :], "<i2").reshape(108, 256, 256)
    nibabel.save(nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([-0.957, -0.957, 1.5, 1.0])), path)
