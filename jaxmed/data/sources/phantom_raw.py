"""Phantom studies as the files that a hospital would give: NIfTI and DICOM, with a CSV of reports and labels.

For trying `python -m jaxmed.prep` from end to end. Synthetic; see `phantom`.
"""

import csv
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from jaxmed.data.sources import phantom

# Finer than the shards of the demo.
RAW = phantom.Config(
    size=112, depth=(20, 28), depth_step=2, step_mm=2.0, cover_mm=(150.0, 170.0), fov_mm=(210.0, 240.0)
)


def write_raw(dir: str | os.PathLike, n: int, *, seed: int = 0, dicom_every: int = 4) -> Path:
    """Writes `n` studies, each a folder, and `manifest.csv` with their reports, labels and patients.

    Args:
      dicom_every: every such study, from the first on, is a folder of DICOM series; the others are NIfTI.

    Returns:
      The path of the manifest.
    """
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        study = phantom.subject((seed, len(phantom.SPLITS), i), RAW, kind=phantom.CLASSES[i % 5], raw=True)
        folder = dir / f"phantom-{i:04d}"
        folder.mkdir(exist_ok=True)
        for number, scan in enumerate(study["scans"], start=1):
            if i % dicom_every == 0:
                write_dicom(folder / f"series{number:02d}", study["key"], number, scan)
            else:
                write_nifti(folder / f"{scan['name']}.nii.gz", scan)
        rows.append(
            {"path": folder.name, "patient": f"phantom-{i:04d}", "report": " ".join(study["sentences"])}
            | {f"label:{k}": int(v) for k, v in study["labels"].items()}
        )
    with open(dir / "manifest.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return dir / "manifest.csv"


def write_nifti(path: Path, scan: dict[str, Any]) -> None:
    """One scan; the file's axes are (w, h, d), as scanners' converters order them."""
    affine = scan["affine"][:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(scan["voxels"].transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def write_dicom(folder: Path, key: str, number: int, scan: dict[str, Any]) -> None:
    """One scan as a series, one file per slice, named without extension."""
    folder.mkdir(exist_ok=True)
    voxels, to_lps = scan["voxels"], np.diag([-1.0, -1, 1, 1])
    affine = to_lps @ scan["affine"]
    steps = [float(np.linalg.norm(affine[:3, k])) for k in range(3)]
    across, down, through = (affine[:3, k] / steps[k] for k in (2, 1, 0))
    is_ct = scan["name"] == "ct"

    def uid(*parts):
        return generate_uid(entropy_srcs=["jaxmed phantom", key, *map(str, parts)])

    for k, pixels in enumerate(voxels):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage if is_ct else MRImageStorage
        meta.MediaStorageSOPInstanceUID = uid(number, k)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"I{k:04d}"
        d = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
        d.SOPClassUID, d.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = uid(), uid(number), uid("frame")
        d.PatientName, d.PatientID, d.AccessionNumber = "PHANTOM^SYNTHETIC", key, key[:12]
        d.Modality, d.SeriesDescription = ("CT" if is_ct else "MR"), scan["name"]
        d.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if is_ct else "OTHER"]
        d.SeriesNumber, d.InstanceNumber = number, k + 1
        d.ImagePositionPatient = [round(float(x), 6) for x in affine[:3, 3] + k * affine[:3, 0]]
        d.ImageOrientationPatient = [round(float(x), 9) for x in (*across, *down)]
        d.PixelSpacing = [round(steps[1], 6), round(steps[2], 6)]
        d.SliceThickness = round(steps[0], 6)
        d.SpacingBetweenSlices = round(steps[0], 6)
        d.SliceLocation = round(float(through @ (affine[:3, 3] + k * affine[:3, 0])), 6)
        d.Rows, d.Columns = pixels.shape
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated = d.BitsStored = 16
        d.HighBit, d.PixelRepresentation = 15, 1
        offset = 1024 if is_ct else 0
        if is_ct:
            d.RescaleIntercept, d.RescaleSlope, d.RescaleType = -1024, 1, "HU"
        d.PixelData = (pixels + offset).astype("<i2").tobytes()
        pydicom.dcmwrite(path, d, enforce_file_format=True)
