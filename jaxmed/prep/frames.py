"""DICOM headers -> slices with geometry: one list for classic files, enhanced multi-frame objects and mosaics."""

import contextlib
import dataclasses
import logging
import math
import threading
import warnings
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial

from jaxmed.prep.scan import Rejected

PIXELS = (0x7FE00010, 0x7FE00008, 0x7FE00009)

# Words of the SOP class name or the modality -> reason; first match wins.
_REFUSED_CLASSES = (
    ("Radiation Therapy", "rt-object"),
    ("RT ", "rt-object"),
    ("Segmentation", "segmentation"),
    ("Presentation State", "presentation-state"),
    ("Key Object", "presentation-state"),
    ("Spatial Registration", "registration"),
    ("Spatial Fiducials", "registration"),
    ("Encapsulated", "encapsulated-document"),
    ("Waveform", "waveform"),
    (" SR", "structured-report"),
    ("Report", "structured-report"),
    ("Media Storage Directory", "dicomdir"),
)
_REFUSED_MODALITIES = {
    "SR": "structured-report",
    "SEG": "segmentation",
    "RTSTRUCT": "rt-object",
    "RTDOSE": "rt-object",
    "RTPLAN": "rt-object",
    "RTRECORD": "rt-object",
    "PR": "presentation-state",
    "KO": "presentation-state",
    "REG": "registration",
    "FID": "registration",
    "DOC": "encapsulated-document",
    "ECG": "waveform",
    "HD": "waveform",
}
# Image-type values that separate stacks even where their positions do not collide.
_KINDS = {"M", "P", "R", "I", "PHASE", "REAL", "IMAGINARY", "MAGNITUDE", "PHASE MAP", "ADC", "FA", "TRACEW", "MPR"}
_KINDS |= {"LOCALIZER", "MIP", "MIN IP", "PROJECTION IMAGE", "SUBTRACTION", "WATER", "FAT", "IN_PHASE", "OUT_PHASE"}
PLANAR = {"CR", "DX", "MG", "RG", "IO", "PX", "XA", "RF"}


@dataclasses.dataclass
class Slice:
    """One plane: where its pixels are, where it lies, and what separates it from others at the same place."""

    file: int  # index into the series' files
    frame: int  # frame in the file
    tile: tuple[int, int] | None  # top left pixel inside a mosaic
    shape: tuple[int, int]  # rows, columns
    orientation: np.ndarray | None  # (6,) LPS cosines: along a row, down a column
    position: np.ndarray | None  # (3,) LPS mm, centre of the first pixel
    spacing: tuple[float, float] | None  # mm between rows, between columns
    thickness: float | None
    between: float | None
    location: float | None  # SliceLocation
    slope: float
    intercept: float
    number: int
    uid: str
    stack: tuple  # equal for slices that may form one stack
    volume: tuple  # candidates that tell repeated positions apart, most telling first
    b_value: float | None
    alternates: list["Slice"] = dataclasses.field(default_factory=list)


class Quiet:
    """While any of these is open, pydicom's warnings and log lines are dropped: they quote header values.

    Counted, because several threads may read at once and the switches belong to the process.
    """

    _lock, _open, _undo = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with Quiet._lock:
            if Quiet._open == 0:
                stack = contextlib.ExitStack()
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                logger = logging.getLogger("pydicom")
                stack.callback(setattr, logger, "disabled", logger.disabled)
                logger.disabled = True
                Quiet._undo = stack
            Quiet._open += 1

    def __exit__(self, *error) -> None:
        with Quiet._lock:
            Quiet._open -= 1
            if Quiet._open == 0:
                Quiet._undo.close()


def quiet_read(f: BinaryIO, *, pixels: bool, tags: list | None = None) -> Dataset:
    """Reads a DICOM file up to or including its pixels; bytes behind them are ignored.

    A missing preamble or file meta is accepted.

    Raises:
      Rejected: "unreadable", "not-an-image".
    """
    seen = False

    def stop(tag, vr, length) -> bool:
        nonlocal seen
        del vr, length
        if seen or (not pixels and tag in PIXELS):
            return True
        seen = tag in PIXELS
        return False

    try:
        ds = read_partial(f, stop_when=stop, force=True, specific_tags=tags)
    except Exception as e:  # pydicom raises what its parser meets: struct.error, EOFError, ValueError, ...
        raise Rejected("unreadable", f"not parsable as DICOM ({type(e).__name__})") from None
    if len(ds) == 0 and len(ds.file_meta) == 0:
        raise Rejected("not-an-image", "no DICOM elements")
    return ds


def value(ds: Dataset, name: str, default=None):
    """An element's value, or the default if it is absent, empty or malformed."""
    try:
        found = ds.get(name)
    except Exception:  # a value that cannot be converted to its type counts as absent
        return default
    return default if found is None or found == "" else found


def number(ds: Dataset, name: str) -> float | None:
    """A finite float, or None."""
    return finite(value(ds, name))


def finite(found) -> float | None:
    """A finite float, or None; the first of several."""
    if found is not None and not isinstance(found, (str, bytes)) and hasattr(found, "__len__"):
        found = found[0] if len(found) else None
    try:
        result = float(found)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def numbers(ds: Dataset | None, name: str, count: int) -> np.ndarray | None:
    """`count` finite floats, or None."""
    found = None if ds is None else value(ds, name)
    try:
        result = np.array([float(v) for v in found], np.float64)
    except (TypeError, ValueError):
        return None
    return result if result.shape == (count,) and np.isfinite(result).all() else None


def texts(ds: Dataset, name: str) -> tuple[str, ...]:
    """The values of a multi-valued text, stripped."""
    found = value(ds, name, ())
    return (found.strip(),) if isinstance(found, str) else tuple(str(v).strip() for v in found)


def refuse(ds: Dataset, *, projections: bool = False) -> None:
    """Raises `Rejected` for every DICOM object that is not a grey image; uses header elements only.

    Args:
      projections: radiographs are wanted: those that were digitised elsewhere (modality OT) are no screenshots.
    """
    uid = pydicom.uid.UID(str(value(ds, "SOPClassUID") or value(ds.file_meta, "MediaStorageSOPClassUID", "")))
    name = uid.name if uid in pydicom.uid.UID_dictionary else ""
    modality = str(value(ds, "Modality", "")).strip().upper()
    if "DirectoryRecordSequence" in ds:
        raise Rejected("dicomdir")
    for word, reason in _REFUSED_CLASSES:
        if word in name:
            raise Rejected(reason, f"SOP class {name}")
    if modality in _REFUSED_MODALITIES:
        raise Rejected(_REFUSED_MODALITIES[modality], f"modality {modality}")
    rows, columns = number(ds, "Rows"), number(ds, "Columns")
    if not rows or not columns:
        raise Rejected("no-pixel-data", "no rows and columns")
    photometric = str(value(ds, "PhotometricInterpretation", "")).strip()
    if photometric == "PALETTE COLOR":
        raise Rejected("palette-image", "palette colour pixels")
    if (number(ds, "SamplesPerPixel") or 1) > 1 or photometric.startswith(("RGB", "YBR")):
        raise Rejected("colour-image", "several samples per pixel")
    placed = "ImagePositionPatient" in ds or "PerFrameFunctionalGroupsSequence" in ds
    planar = PLANAR | {"OT"} if projections else PLANAR
    if "Secondary Capture" in name and modality not in planar and not placed:
        raise Rejected("secondary-capture", "a secondary capture without position")


def spacing_of(ds: Dataset | None) -> tuple[float, float] | None:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = numbers(ds, name, 2)
        if found is not None and (found > 0).all():
            return float(found[0]), float(found[1])
    return None


def _unit(orientation: np.ndarray | None) -> np.ndarray | None:
    """Cosines of length one and at right angles (within the rounding that headers show), or None."""
    if orientation is None:
        return None
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.9 or max(lengths) > 1.1:
        return None
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > 0.02:
        return None
    return np.concatenate([row, column])


def _rescale(ds: Dataset | None) -> tuple[float, float] | None:
    if ds is None:
        return None
    slope, intercept = number(ds, "RescaleSlope"), number(ds, "RescaleIntercept")
    if slope is None and intercept is None:
        return None
    return (slope or 1.0), (intercept or 0.0)


def _b_value(ds: Dataset) -> float | None:
    """Standard element, else those of Siemens, Philips and GE (which adds 1e9 to mark its values)."""
    found = number(ds, "DiffusionBValue")
    for group, element, creator in ((0x0019, 0x100C, "SIEMENS"), (0x2001, 0x1003, "Philips"), (0x0043, 0x1039, "GEMS")):
        if found is None and (group, element) in ds:
            owner = ds.get((group, 0x0010))
            if owner is not None and str(owner.value).upper().startswith(creator.upper()):
                raw = ds[group, element].value
                raw = raw.decode("ascii", "ignore").split("\\")[0] if isinstance(raw, bytes) else raw
                found = finite(raw)
                found = found % 100000 if found is not None and creator == "GEMS" else found
    return found


def _direction(ds: Dataset | None) -> tuple:
    found = numbers(ds, "DiffusionGradientOrientation", 3)
    return () if found is None else tuple(found)


def _stack_key(shape, spacing, kinds, echo, extra=()) -> tuple:
    spacing = None if spacing is None else tuple(round(v, 4) for v in spacing)
    kinds = tuple(sorted({k.upper() for k in kinds} & _KINDS))
    return (shape, spacing, kinds, None if echo is None else round(echo, 1), *extra)


def slices_of(ds: Dataset, file: int) -> list[Slice]:
    """The planes of one file.

    Raises:
      Rejected: "no-pixel-data", "inconsistent", or a reason of `refuse`.
    """
    refuse(ds)
    frames = int(number(ds, "NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in ds:
        return _enhanced(ds, file, frames)
    kinds = texts(ds, "ImageType")
    shape = (int(ds.Rows), int(ds.Columns))
    spacing = spacing_of(ds)
    slope, intercept = _rescale(ds) or (1.0, 0.0)
    echo, b_value = number(ds, "EchoTime"), _b_value(ds)
    volume = (
        number(ds, "TemporalPositionIdentifier"),
        b_value,
        _direction(ds),
        number(ds, "TriggerTime"),
        kinds,
        number(ds, "AcquisitionNumber"),
        str(value(ds, "AcquisitionTime", "")),
        str(value(ds, "ConvolutionKernel", "")),
    )
    base = Slice(
        file=file,
        frame=0,
        tile=None,
        shape=shape,
        orientation=_unit(numbers(ds, "ImageOrientationPatient", 6)),
        position=numbers(ds, "ImagePositionPatient", 3),
        spacing=spacing,
        thickness=number(ds, "SliceThickness"),
        between=number(ds, "SpacingBetweenSlices"),
        location=number(ds, "SliceLocation"),
        slope=slope,
        intercept=intercept,
        number=int(number(ds, "InstanceNumber") or 0),
        uid=str(value(ds, "SOPInstanceUID", "")),
        stack=_stack_key(shape, spacing, kinds, echo, (number(ds, "EchoNumbers"),)),
        volume=volume,
        b_value=b_value,
    )
    if "MOSAIC" in {k.upper() for k in kinds}:
        return _mosaic(ds, base)
    if frames == 1:
        return [base]
    # Several frames and no functional groups: cine, angiography, nuclear medicine; one position cannot serve them all.
    return [dataclasses.replace(base, frame=i, position=None, number=i, location=None) for i in range(frames)]


def first(ds: Dataset | None, name: str) -> Dataset | None:
    found = None if ds is None else ds.get(name)
    return found[0] if found else None


def _enhanced(ds: Dataset, file: int, frames: int) -> list[Slice]:
    """Planes of an enhanced object: each functional group from the frame's item, else from the shared one."""
    shared = first(ds, "SharedFunctionalGroupsSequence")
    items = ds.PerFrameFunctionalGroupsSequence
    if len(items) < frames:
        raise Rejected("inconsistent", f"{frames} frames but {len(items)} frame descriptions")
    shape = (int(ds.Rows), int(ds.Columns))
    result = []
    for index in range(frames):

        def group(name: str, item=items[index]) -> Dataset | None:
            own = first(item, name)
            return first(shared, name) if own is None else own

        def get(name: str, element: str, group=group) -> float | None:
            found = group(name)
            return None if found is None else number(found, element)

        measures, content = group("PixelMeasuresSequence"), group("FrameContentSequence")
        kinds = texts(ds, "ImageType")
        for name in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
            found = group(name)
            kinds = kinds if found is None else texts(found, "FrameType") + texts(found, "ComplexImageComponent")
        slope, intercept = _rescale(group("PixelValueTransformationSequence")) or _rescale(ds) or (1.0, 0.0)
        b_value = get("MRDiffusionSequence", "DiffusionBValue")
        gradient = first(group("MRDiffusionSequence"), "DiffusionGradientDirectionSequence")
        spacing = spacing_of(measures)
        stack_id = "" if content is None else str(value(content, "StackID", ""))
        result.append(
            Slice(
                file=file,
                frame=index,
                tile=None,
                shape=shape,
                orientation=_unit(numbers(group("PlaneOrientationSequence"), "ImageOrientationPatient", 6)),
                position=numbers(group("PlanePositionSequence"), "ImagePositionPatient", 3),
                spacing=spacing,
                thickness=None if measures is None else number(measures, "SliceThickness"),
                between=None if measures is None else number(measures, "SpacingBetweenSlices"),
                location=None,
                slope=slope,
                intercept=intercept,
                number=index,
                uid=str(value(ds, "SOPInstanceUID", "")),
                stack=_stack_key(shape, spacing, kinds, get("MREchoSequence", "EffectiveEchoTime"), (stack_id,)),
                volume=(
                    None if content is None else number(content, "TemporalPositionIndex"),
                    b_value,
                    _direction(gradient),
                    get("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
                    kinds,
                    None if content is None else number(content, "FrameAcquisitionNumber"),
                    "" if content is None else str(value(content, "FrameAcquisitionDateTime", "")),
                    file,
                ),
                b_value=b_value,
            )
        )
    return result


def _mosaic(ds: Dataset, base: Slice) -> list[Slice]:
    """Tiles of a Siemens mosaic as planes.

    The position in the header belongs to the corner of a virtual image as large as the mosaic around the first
    tile's centre, so it is moved by half of the difference; the slice direction is the CSA header's normal.
    """
    from nibabel.nicom import csareader  # only here: the import is slow

    try:
        csa = csareader.get_csa_header(ds, "image")
    except Exception as e:  # a damaged private element
        raise Rejected("unreadable", f"mosaic with a damaged CSA header ({type(e).__name__})") from None
    count = 0 if csa is None else int(csareader.get_n_mosaic(csa) or 0)
    if not count and (0x0019, 0x100A) in ds:
        count = int(finite(ds[0x0019, 0x100A].value) or 0)
    step = base.between or base.thickness
    if count < 1 or base.orientation is None or base.position is None or base.spacing is None or not step:
        raise Rejected("no-geometry", "mosaic without number of tiles, position, orientation or slice distance")
    across = math.ceil(math.sqrt(count))
    rows, columns = base.shape[0] // across, base.shape[1] // across
    if base.shape[0] % across or base.shape[1] % across:
        raise Rejected("inconsistent", f"{count} tiles do not divide {base.shape[0]} x {base.shape[1]} pixels evenly")
    row, column = base.orientation[:3], base.orientation[3:]
    normal = np.cross(row, column)
    stated = None if csa is None else csareader.get_slice_normal(csa)
    if stated is not None and np.asarray(stated, float) @ normal < 0:
        normal = -normal
    shift = (
        row * base.spacing[1] * (base.shape[1] - columns) / 2 + column * base.spacing[0] * (base.shape[0] - rows) / 2
    )
    return [
        dataclasses.replace(
            base,
            tile=(index // across * rows, index % across * columns),
            shape=(rows, columns),
            position=base.position + shift + normal * step * index,
            location=None,
            stack=((rows, columns), *base.stack[1:]),
            volume=(base.number, *base.volume),
        )
        for index in range(count)
    ]
