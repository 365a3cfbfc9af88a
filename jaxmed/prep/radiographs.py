"""Projection radiographs as they were stored: one file, one image, one scan; nothing is rescaled, windowed or inverted.

The voxels are the stored values in uint16; what a viewer would do with them is in the meta as plain numbers, and
`data.intensity` makes the picture of both. Sources: single-frame DICOM, and PNG and JPEG files.
"""

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from jaxmed.data import intensity
from jaxmed.prep import collimation, dicom, frames, names, regions, suspects
from jaxmed.prep.files import MAX_BYTES, open_ref
from jaxmed.prep.scan import FileRef, RawScan, RawSeries, ReadOptions, Reject, Rejected
from jaxmed.prep.stack import note

SIGNED = 1 << 15  # added to signed values, so that uint16 holds them
LEAST_GREYS = 16  # fewer different values are no radiograph
_SCREENS = {"SCREEN SAVE", "SCREENSAVE", "SCREENSHOT", "DRAWING", "REPORT", "PRESENTATION STATE"}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(series: RawSeries, options: ReadOptions) -> tuple[list[RawScan], list[Reject]]:
    """The projection side of `scan.read_scans`.

    Keys of `RawScan.meta` besides those that `data.intensity` reads: `kind` ("dicom" or "picture"), `planar`, `bits`,
    `presentation` (PresentationLUTShape), `intent` ("presentation" or "processing"), `pixel_mm` ([row, column];
    absent = unknown), `box` ([top, left, bottom, right] of the collimated field, end exclusive; absent = the whole
    image) and `box_from`, `region`, `laterality`, `view` (see `regions`), `syntax`.
    """
    ref = series.files[0]
    try:
        if series.kind not in ("dicom", "picture"):
            raise Rejected("not-a-radiograph", f"a {series.kind} file; radiographs are DICOM, PNG or JPEG")
        with frames.Quiet():
            return [(_dicom if series.kind == "dicom" else _picture)(ref, options)], []
    except Rejected as e:
        return [], [Reject(ref.shown, e.reason, e.detail, "series")]
    except MemoryError:
        return [], [Reject(ref.shown, "too-large", "does not fit into memory", "series")]


def _dicom(ref: FileRef, options: ReadOptions) -> RawScan:
    with open_ref(ref) as f:
        ds = frames.quiet_read(f, pixels=True)
    try:
        return _from_header(ds, options)
    except (Rejected, MemoryError):
        raise
    except Exception as e:  # header values of impossible types: the file is bad, not the run
        raise Rejected("unreadable", f"contradictory header ({type(e).__name__})") from None


def _from_header(ds: Dataset, options: ReadOptions) -> RawScan:
    frames.refuse(ds, projections=True)
    count = int(frames.number(ds, "NumberOfFrames") or 1)
    if count > 1:
        raise Rejected("multi-frame", f"{count} frames")
    kinds = [k.upper() for k in frames.texts(ds, "ImageType")]
    if not options.localizers and "LOCALIZER" in kinds:
        raise Rejected("localizer", "a scout or localizer")
    if not options.secondary and ("SECONDARY" in kinds[1:2] or _SCREENS & set(kinds)):
        raise Rejected("secondary-capture", "its image type says that it is no primary image")
    _check_size(int(ds.Rows), int(ds.Columns), options)
    stored = dicom.decode(ds)[0]
    if stored.dtype.kind not in "iu" or int(stored.max()) - int(stored.min()) >= 1 << 16:
        raise Rejected("too-deep", f"{stored.dtype.name} pixels; 16 bits are kept")
    offset = SIGNED if stored.dtype.kind == "i" else 0
    if stored.dtype.itemsize > 2 and (int(stored.min()) + offset < 0 or int(stored.max()) + offset >= 1 << 16):
        raise Rejected("too-deep", "values beyond 16 bits")
    voxels = (stored.astype(np.int64) + offset).astype(np.uint16)
    meta = {"bits": int(frames.number(ds, "BitsStored") or 16), **_transforms(ds, voxels, offset)}
    modality = str(frames.value(ds, "Modality", "")).strip().upper()
    spacing = frames.spacing_of(ds)
    about = {
        "kind": "dicom",
        "pixel_mm": None if spacing is None else list(spacing),
        "region": regions.region(str(frames.value(ds, "BodyPartExamined", ""))),
        "laterality": regions.side(str(frames.value(ds, "ImageLaterality", "") or frames.value(ds, "Laterality", ""))),
        "view": regions.view(str(frames.value(ds, "ViewPosition", ""))),
        "intent": {"FOR PRESENTATION": "presentation", "FOR PROCESSING": "processing"}.get(
            str(frames.value(ds, "PresentationIntentType", "")).strip().upper(), ""
        ),
        "syntax": dicom.syntax_of(ds).keyword,
    }
    notes = []
    shape = meta.get("presentation")
    if shape and (shape == "INVERSE") != (meta["photometric"] == "MONOCHROME1"):
        notes.append(note("photometric-disagreement", f"{meta['photometric']}, but PresentationLUTShape {shape}"))
    if str(frames.value(ds, "BurnedInAnnotation", "")).strip().upper() == "YES":
        notes.append(note("burnt-in-text", "the header says so"))
    return _scan(voxels, modality, meta | about, spacing, notes, ds)


def _scan(
    voxels: np.ndarray,
    modality: str,
    meta: dict,
    spacing: tuple[float, float] | None,
    notes: list,
    ds: Dataset | None = None,
) -> RawScan:
    if len(np.unique(voxels[::2, ::2])) < LEAST_GREYS and len(np.unique(voxels)) < LEAST_GREYS:
        raise Rejected("blank", f"fewer than {LEAST_GREYS} different grey values")
    inside, box, source = collimation.exposed(
        voxels, ds, white="low" if meta["photometric"] == "MONOCHROME1" else "high"
    )
    meta["range"] = [int(voxels.min()), int(voxels.max())]
    counts = np.bincount(voxels[inside], minlength=intensity.VALUES)
    meta["percentiles"] = list(intensity.histogram_percentiles(counts, meta))
    if box is not None:
        meta |= {"box": list(box), "box_from": source}
    if spacing is None:
        notes.append(note("no-spacing", "pixel spacing is absent or zero; 1 mm assumed"))
    notes += suspects.look(voxels, inside, counts, meta)
    rows, columns = spacing or (1.0, 1.0)
    affine = _LPS_TO_RAS @ np.diag([1.0, rows, columns, 1.0])[[2, 1, 0, 3]]  # w -> x, h -> y, d -> z of the detector
    meta = {k: v for k, v in meta.items() if v not in (None, "")} | {"planar": True}
    return RawScan(voxels[None], affine, modality, names.guess(modality or "OT"), meta, notes)


def _check_size(rows: int, columns: int, options: ReadOptions) -> None:
    if min(rows, columns) < options.min_side:
        raise Rejected("too-small", f"{rows} x {columns} pixels; --read.min_side={options.min_side}")
    if rows * columns * 2 > MAX_BYTES:
        raise Rejected("too-large", f"{rows} x {columns} pixels")


# ---- What a viewer does with the stored values.


def _transforms(ds: Dataset, voxels: np.ndarray, offset: int) -> dict:
    """The keys of `data.intensity` that a header decides."""
    meta: dict = {"photometric": str(frames.value(ds, "PhotometricInterpretation", "")).strip() or "MONOCHROME2"}
    if meta["photometric"] not in ("MONOCHROME1", "MONOCHROME2"):
        raise Rejected("inconsistent", "a photometric interpretation that is not grey")
    if offset:
        meta["offset"] = offset
    shape = str(frames.value(ds, "PresentationLUTShape", "")).strip().upper()
    if shape in ("INVERSE", "IDENTITY"):
        meta["presentation"] = shape
    slope, intercept = frames.number(ds, "RescaleSlope"), frames.number(ds, "RescaleIntercept")
    if lut := _lut(ds, "ModalityLUTSequence", signed=bool(offset)):
        meta["modality_lut"] = lut
    elif (slope or 1.0, intercept or 0.0) != (1.0, 0.0):
        meta["rescale"] = [slope or 1.0, intercept or 0.0]
    ends = np.array([int(voxels.min()), int(voxels.max())]) - offset
    if lut := _lut(ds, "VOILUTSequence", signed=bool(intensity.modality(meta, ends).min() < 0)):
        meta["voi_lut"] = lut
    windows = list(zip(_floats(ds, "WindowCenter"), _floats(ds, "WindowWidth")))
    if windows:
        meta["windows"] = [list(w) for w in windows]
        function = str(frames.value(ds, "VOILUTFunction", "")).strip().upper()
        meta["window_function"] = function if function in intensity.WINDOW_FUNCTIONS else "LINEAR"
    return meta


def _floats(ds: Dataset, name: str) -> list[float]:
    found = frames.value(ds, name, ())
    listed = found if not isinstance(found, (str, bytes)) and hasattr(found, "__len__") else [found]
    values = [frames.finite(v) for v in listed]
    return [v for v in values if v is not None] if None not in values else []


def _lut(ds: Dataset, name: str, *, signed: bool) -> dict | None:
    """The first table of a sequence, or None if there is none or it makes no sense (PS3.3 C.11.1.1).

    Args:
      signed: values below 0 come in, so the first mapped value is a signed number whatever its VR says.
    """
    item = frames.first(ds, name)
    descriptor = None if item is None else frames.numbers(item, "LUTDescriptor", 3)
    data = None if item is None else frames.value(item, "LUTData")
    if descriptor is None or data is None:
        return None
    entries, first, bits = (int(v) for v in descriptor)
    entries = (entries & 0xFFFF) or 1 << 16  # 0 is how 16 bits say 65536
    if isinstance(data, bytes):
        order = "<" if ds.original_encoding[1] in (True, None) else ">"
        wide = len(data) >= 2 * entries
        values = np.frombuffer(data[: len(data) // 2 * 2], order + "u2") if wide else np.frombuffer(data, np.uint8)
    else:
        values = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    values = values[:entries]
    if not len(values) or not 1 <= bits <= 16:
        return None
    first = first - (1 << 16) if signed and first >= 1 << 15 else first
    return {"first": first, "bits": bits, "values": values.astype(int).tolist()}


# ---- Pictures.


def _picture(ref: FileRef, options: ReadOptions) -> RawScan:
    with open_ref(ref) as f:
        try:
            image = Image.open(f, formats=("PNG", "JPEG"))
            _check_size(image.height, image.width, options)
            if getattr(image, "n_frames", 1) > 1:
                raise Rejected("multi-frame", "an animation")
            grey = _grey(image)
        except (Rejected, MemoryError):
            raise
        except Exception as e:  # whatever a damaged file raises
            raise Rejected("undecodable", f"no PNG or JPEG that can be decoded ({type(e).__name__})") from None
    bits = 8 * grey.dtype.itemsize
    meta = {"kind": "picture", "bits": bits, "photometric": "MONOCHROME2", "syntax": image.format}
    return _scan(grey.astype(np.uint16), "", meta, None, [])


def _grey(image: Image.Image) -> np.ndarray:
    """(h, w) uint8 or uint16; colour files pass if all their channels are equal, as many public sets store them."""
    if image.mode == "L":
        return np.asarray(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise Rejected("too-deep", "values beyond 16 bits")
        return values.astype(np.uint16)
    channels = np.asarray(image.convert("RGB")).astype(np.int16)
    if np.abs(channels - channels[..., :1]).max() > 2:  # JPEG rounds
        raise Rejected("colour-image", "channels that differ")
    return channels[..., 1].astype(np.uint8)
