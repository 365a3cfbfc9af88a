"""DICOM series made for tests: small ones from nothing, and ones that no package has, from the slices of a real series.

A series is a list of pydicom datasets in slice order; every function returns new datasets and leaves its input alone.
"""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from scipy.ndimage import map_coordinates

CT, MR, CR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.1"
AXIAL = (1.0, 0, 0, 0, 1, 0)
CORONAL = (1.0, 0, 0, 0, 0, -1)
SAGITTAL = (0.0, 1, 0, 0, 0, -1)
OBLIQUE = (0.9848077530, 0.1736481777, 0, -0.1710100717, 0.9698463104, 0.1736481777)


def uid(*words) -> str:
    """The same words give the same UID."""
    return generate_uid(entropy_srcs=["jaxmed tests", *map(str, words)])


def image(pixels: np.ndarray, *, modality: str = "MR", **elements) -> FileDataset:
    """One image object with the given pixels and elements (by keyword; None leaves one out)."""
    classes = {"CT": CT, "MR": MR, "CR": CR}
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    defaults = {
        "SOPClassUID": classes[modality],
        "SOPInstanceUID": uid(modality, sorted(map(str, elements.items())), pixels.tobytes()),
        "Modality": modality,
        "StudyInstanceUID": uid("study"),
        "SeriesInstanceUID": uid("series"),
        "PatientName": "Doe^Jane Q",
        "PatientID": "MRN00471",
        "PatientBirthDate": "19470311",
        "StudyDate": "20210304",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "PixelSpacing": [0.8, 0.6],
        "SliceThickness": 2.0,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "NumberOfFrames": None if pixels.ndim == 2 else pixels.shape[0],
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "BitsAllocated": pixels.dtype.itemsize * 8,
        "BitsStored": pixels.dtype.itemsize * 8,
        "HighBit": pixels.dtype.itemsize * 8 - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    for keyword, value in {**defaults, **elements}.items():
        if value is not None:
            setattr(ds, keyword, value)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.PixelData = np.ascontiguousarray(pixels).tobytes()
    return ds


def series(
    volume: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-10.0, -20.0, 30.0),
    step: float = 2.0,
    places: Sequence[float] | None = None,
    shift: Sequence[float] = (0.0, 0.0, 0.0),
    **elements,
) -> list[FileDataset]:
    """Slices (d, h, w) along the normal: at k * step, or at the given places in mm; `shift` mm per slice is added."""
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    places = [k * step for k in range(len(volume))] if places is None else places
    result = []
    for k, (plane, place) in enumerate(zip(volume, places)):
        position = np.array(origin) + normal * place + np.array(shift) * k
        result.append(
            image(
                plane,
                **{
                    "InstanceNumber": k + 1,
                    "ImageOrientationPatient": list(orientation),
                    "ImagePositionPatient": [float(v) for v in position],
                    **elements,
                },
            )
        )
    return result


def expected_affine(datasets: Sequence[Dataset]) -> np.ndarray:
    """Index (d, h, w) -> RAS mm straight from the headers of slices in order."""
    first, last = datasets[0], datasets[-1]
    affine = np.eye(4)
    start, end = np.array(first.ImagePositionPatient, float), np.array(last.ImagePositionPatient, float)
    axes, spacing = np.array(first.ImageOrientationPatient, float), [float(v) for v in first.PixelSpacing]
    affine[:3, 0] = (end - start) / (len(datasets) - 1)
    affine[:3, 1] = axes[3:] * spacing[0]
    affine[:3, 2] = axes[:3] * spacing[1]
    affine[:3, 3] = start
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def edited(datasets: Sequence[Dataset], **elements) -> list[Dataset]:
    """Copies with elements changed; a callable value gets the slice's number; new instance UIDs."""
    result = []
    for k, ds in enumerate(datasets):
        ds = copy.deepcopy(ds)
        for keyword, value in elements.items():
            value = value(k) if callable(value) else value
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
        if "SOPInstanceUID" not in elements:
            ds.SOPInstanceUID = uid(ds.SOPInstanceUID, elements.keys(), k)
        result.append(ds)
    return result


def save(datasets: Sequence[Dataset], folder: Path, *, names: Sequence[str] | None = None, seed: int = 0) -> list[Path]:
    """Writes the slices; without names in a shuffled order and without extensions, as scanners' exports are."""
    folder.mkdir(parents=True, exist_ok=True)
    if names is None:
        names = [f"IM{n:04d}" for n in np.random.default_rng(seed).permutation(len(datasets))]
    paths = [folder / name for name in names]
    for path, ds in zip(paths, datasets):
        ds.save_as(path, enforce_file_format=True)
    return paths


def save_bare(ds: Dataset, path: Path) -> Path:
    """Without preamble and file meta, implicit little endian: as old archives keep images."""
    bare = Dataset(copy.deepcopy(dict(ds)))
    pydicom.dcmwrite(path, bare, implicit_vr=True, little_endian=True, enforce_file_format=False)
    return path


def real_slices(paths: Sequence[Path], crop: int | None = None) -> list[FileDataset]:
    """A real series decoded, ordered along its normal, uncompressed, with `crop` central pixels of each plane."""
    return list(_real_slices(tuple(paths), crop))


@functools.lru_cache(maxsize=4)  # decoding JPEG 2000 takes a second, and nobody changes what is returned
def _real_slices(paths: tuple[Path, ...], crop: int | None) -> list[FileDataset]:
    found = [pydicom.dcmread(p) for p in paths]
    axes = np.array(found[0].ImageOrientationPatient, float)
    normal = np.cross(axes[:3], axes[3:])
    found.sort(key=lambda ds: float(np.array(ds.ImagePositionPatient, float) @ normal))
    result = []
    for ds in found:
        pixels = ds.pixel_array
        out = copy.deepcopy(ds)
        for tag in [e.tag for e in out.group_dataset(0)]:  # one real file has rubbish behind its pixels
            del out[tag]
        out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if crop is not None:
            top, left = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
            pixels = pixels[top : top + crop, left : left + crop]
            spacing = [float(v) for v in ds.PixelSpacing]
            move = axes[:3] * spacing[1] * left + axes[3:] * spacing[0] * top
            out.ImagePositionPatient = [float(v) for v in np.array(ds.ImagePositionPatient, float) + move]
            out.Rows, out.Columns = crop, crop
        out.PixelData = np.ascontiguousarray(pixels).tobytes()
        out["PixelData"].VR = "OW"
        out["PixelData"].is_undefined_length = False
        result.append(out)
    return result


def tilted(datasets: Sequence[Dataset], degrees: float) -> list[Dataset]:
    """The same anatomy as a scanner with a tilted gantry would have it.

    The planes are turned about the x axis, the table still moves along z, and every pixel is interpolated (linearly)
    from the given upright axial slices at its place in the patient.
    """
    volume = np.stack([np.frombuffer(ds.PixelData, np.int16).reshape(ds.Rows, ds.Columns) for ds in datasets])
    to_index = np.linalg.inv(expected_affine(datasets))
    angle = np.deg2rad(degrees)
    axes = [1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle))]
    result = edited(datasets, ImageOrientationPatient=axes, GantryDetectorTilt=degrees)
    target = expected_affine(result)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij")).reshape(3, -1)
    at = (to_index @ target)[:3, :3] @ grid + (to_index @ target)[:3, 3:]
    turned = map_coordinates(volume.astype(np.float32), at, order=1, mode="nearest").reshape(volume.shape)
    for ds, plane in zip(result, np.rint(turned).astype(np.int16)):
        ds.PixelData = plane.tobytes()
    return result


def implicit(ds: Dataset) -> Dataset:
    """A copy in implicit little endian."""
    out = copy.deepcopy(ds)
    out.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return out
