"""Helpers of the readers' tests: reading one series with checks that hold for every series, and writing NIfTI."""

from pathlib import Path

import nibabel
import numpy as np

from jaxmed.prep import names
from jaxmed.prep.scan import REASONS, FileRef, RawSeries, ReadOptions, read_scans


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


def nifti(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(array, np.diag([2.0, 3, 4, 1]) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path
