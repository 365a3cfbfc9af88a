"""DICOM series -> scans: decoding, rescaling, and the rules that drop what is no volume."""

from collections.abc import Sequence

import gdcm
import numpy as np
import pydicom
from pydicom.dataset import Dataset

from jaxmed.prep import frames, names, stack
from jaxmed.prep.files import MAX_BYTES, open_ref
from jaxmed.prep.frames import PLANAR, Slice
from jaxmed.prep.scan import FileRef, RawScan, RawSeries, ReadOptions, Reject, Rejected
from jaxmed.prep.stack import note

# Quantities whose sign has a meaning: MONOCHROME1 there is a wish for display, not a property of the numbers.
_QUANTITIES = {"CT", "PT", "NM"}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(series: RawSeries, options: ReadOptions) -> tuple[list[RawScan], list[Reject]]:
    """The DICOM side of `scan.read_scans`."""
    with frames.Quiet():
        return _read(series, options)


def _read(series: RawSeries, options: ReadOptions) -> tuple[list[RawScan], list[Reject]]:
    rejects: list[Reject] = []
    slices: list[Slice] = []
    headers: dict[int, Dataset] = {}
    for index, ref in enumerate(series.files):
        try:
            with open_ref(ref) as f:
                ds = frames.quiet_read(f, pixels=False)
            slices += frames.slices_of(ds, index)
            if index == 0 or len(headers) == 0:
                headers[index] = ds
        except Rejected as e:
            rejects.append(Reject(ref.shown, e.reason, e.detail))
        except Exception as e:  # header values of impossible types: the file is bad, not the run
            rejects.append(Reject(ref.shown, "unreadable", f"contradictory header ({type(e).__name__})"))
    scans: list[RawScan] = []
    pixels = _Pixels(series.files, rejects)
    if slices:
        scans = _scans(series, slices, next(iter(headers.values())), pixels, options, rejects)
    if not scans and not any(r.kind == "series" for r in rejects):
        reason = rejects[0].reason if rejects else "no-images"
        rejects.append(_whole(series, Rejected(reason, "no file of the series can be used")))
    return scans, rejects


def _whole(series: RawSeries, e: Rejected, file: int = 0, files: int | None = None) -> Reject:
    return Reject(series.files[file].shown, e.reason, e.detail, "series", len(series.files) if files is None else files)


def _scans(
    series: RawSeries,
    slices: list[Slice],
    header: Dataset,
    pixels: "_Pixels",
    options: ReadOptions,
    rejects: list[Reject],
) -> list[RawScan]:
    modality = str(frames.value(header, "Modality", "")).strip().upper()
    description = " ".join(
        str(frames.value(header, k, "")) for k in ("SeriesDescription", "ProtocolName", "SequenceName", "ScanOptions")
    )
    slices, copies = stack.merge_copies(slices)
    groups = stack.stacks(slices)
    if not options.localizers and (
        names.is_localizer(frames.texts(header, "ImageType"), description) or _three_plane(groups)
    ):
        rejects.append(_whole(series, Rejected("localizer", "a scout or localizer")))
        return []
    result: list[RawScan] = []
    for group in groups:
        files = len({s.file for s in group})
        try:
            if not options.localizers and "LOCALIZER" in group[0].stack[2]:
                raise Rejected("localizer", "a scout or localizer inside another series")
            found = _group(group, header, modality, description, pixels, options)
        except Rejected as e:
            rejects.append(_whole(series, e, group[0].file, files))
            continue
        except MemoryError:
            rejects.append(_whole(series, Rejected("too-large", "does not fit into memory"), group[0].file, files))
            continue
        if not found:
            rejects.append(_whole(series, Rejected(*pixels.last), group[0].file, files))
        result += found
    for scan in result:
        if pixels.guessed:
            scan.notes.append(note("no-meta-header", "files without file meta; they were read as they are written"))
        if copies:
            scan.notes.append(note("duplicate-slices", f"{copies} files of the series are stored twice"))
        if len(groups) > 1 and not scan.meta.get("planar"):
            scan.notes.append(note("several-stacks", f"the series holds {len(groups)} stacks"))
    return result


def _three_plane(groups: list[list[Slice]]) -> bool:
    """A few slices each in two or three planes at right angles: a localizer that does not say so."""
    normals = [stack.normal_of(g[0].orientation) for g in groups if g[0].orientation is not None]
    if len(normals) != len(groups) or len(groups) < 2 or max(len(g) for g in groups) > 5:
        return False
    return any(abs(a @ b) < 0.5 for i, a in enumerate(normals) for b in normals[i + 1 :])


def _group(
    group: list[Slice],
    header: Dataset,
    modality: str,
    description: str,
    pixels: "_Pixels",
    options: ReadOptions,
) -> list[RawScan]:
    """The scans of one stack: one per volume and slab."""
    places = stack.place(group)
    if places is None:
        if modality in PLANAR and len({s.file for s in group}) == len(group):
            if not options.planar:
                raise Rejected("planar", "projection images")
            return [scan for s in group for scan in _planar(s, header, modality, description, pixels)]
        group, places = _without_geometry(group, options)
        lost = [note("order-from-numbers", "no positions: ordered by instance numbers, orientation unknown")]
    else:
        lost = []
    found = stack.volumes(group, places)
    kept = found if options.max_volumes is None else found[: options.max_volumes]
    scans = []
    for index, pairs in enumerate(kept):
        rescaled = _Rescaler([s for _, s in pairs], header, modality, pixels)
        for volume in stack.assemble(pairs, rescaled, options):
            voxels = stack.narrow(np.stack(volume.planes))
            scan = RawScan(
                voxels,
                _LPS_TO_RAS @ volume.affine,
                modality,
                _name(header, modality, description, max(s.b_value or 0.0 for s in group)),
                _meta(header, modality, group[0], pixels.syntax(group[0].file)),
                volume.notes + lost + rescaled.notes,
            )
            b_values = {s.b_value for _, s in pairs}
            scan.meta |= {
                "step": volume.step,
                "spacing": [float(v) for v in np.linalg.norm(scan.affine[:3, :3], axis=0)],
                "uniform": volume.filled == 0 and not volume.resampled,
                "filled": volume.filled,
                "orientation": stack.plane_name(scan.affine),
            }
            if len(pairs) == 1 and modality == "CT":
                scan.meta["tilt"] = frames.number(header, "GantryDetectorTilt") or 0.0
            elif len(pairs) > 1:
                scan.meta["tilt"] = volume.tilt
            if len(b_values) == 1 and None not in b_values:
                scan.meta["b_value"] = b_values.pop()
            if modality == "CT" and scan.voxels.shape[0] > 1 and volume.tilt > 0.5:
                scan.notes.append(note("gantry-tilt", f"slices are sheared by {volume.tilt:.1f} degrees"))
            if len(found) > 1:
                scan.meta["volume"] = index
            scans.append(scan)
    if len(found) > 1:
        scans = _distinct(scans, len(found))
    return scans


def _distinct(scans: list[RawScan], volumes: int) -> list[RawScan]:
    """Drops volumes whose voxels equal an earlier one's: the same slices exported twice."""
    kept: list[RawScan] = []
    for scan in scans:
        twin = next((k for k in kept if np.array_equal(k.voxels, scan.voxels)), None)
        if twin is None:
            kept.append(scan)
        elif all(n["reason"] != "duplicate-slices" for n in twin.notes):
            twin.notes.append(note("duplicate-slices", "the same volume is stored again in this series"))
    for scan in kept:
        detail = f"{len(scans)} of {volumes} volumes were read"
        if len(kept) > 1 or volumes > len(scans):
            scan.notes.append(note("several-volumes", detail))
    return kept


def _without_geometry(group: list[Slice], options: ReadOptions) -> tuple[list[Slice], list[float]]:
    if options.require_geometry:
        raise Rejected("no-geometry", f"{len(group)} images without position and orientation")
    ordered = sorted(group, key=lambda s: (s.number, s.file, s.frame))
    step = group[0].between or group[0].thickness or 1.0
    axes = np.array([1.0, 0, 0, 0, 1.0, 0]) if group[0].orientation is None else group[0].orientation
    normal = stack.normal_of(axes)
    for index, s in enumerate(ordered):
        s.orientation, s.position, s.spacing = axes, normal * step * index, s.spacing or (1.0, 1.0)
    return ordered, [step * i for i in range(len(ordered))]


def _planar(s: Slice, header: Dataset, modality: str, description: str, pixels: "_Pixels") -> list[RawScan]:
    rescaled = _Rescaler([s], header, modality, pixels)
    plane = rescaled(s)
    if plane is None:
        return []
    rows, columns = s.spacing or (1.0, 1.0)
    affine = _LPS_TO_RAS @ np.diag([1.0, rows, columns, 1.0])[[2, 1, 0, 3]]  # w -> x, h -> y, d -> z of the detector
    notes = [note("planar", "orientation in the patient is unknown"), *rescaled.notes]
    if s.spacing is None:
        notes.append(note("no-spacing", "pixel spacing is absent or zero; 1 mm assumed"))
    meta = _meta(header, modality, s, pixels.syntax(s.file))
    meta |= {"planar": True, "uniform": True, "filled": 0, "spacing": [1.0, rows, columns]}
    name = _name(header, modality, description, 0.0)
    return [RawScan(stack.narrow(plane[None]), affine, modality, name, meta, notes)]


def _name(header: Dataset, modality: str, description: str, b_value: float) -> str:
    sequence = str(frames.value(header, "ScanningSequence", "")).upper()
    return names.guess(
        modality,
        description,
        image_type=frames.texts(header, "ImageType"),
        te=frames.number(header, "EchoTime"),
        tr=frames.number(header, "RepetitionTime"),
        ti=frames.number(header, "InversionTime"),
        b_value=b_value,
        contrast=bool(frames.value(header, "ContrastBolusAgent", "")),
        gradient_echo="GR" in sequence and "SE" not in sequence,
        echo_planar="EP" in sequence,
    )


def _meta(header: Dataset, modality: str, s: Slice, syntax: str) -> dict[str, object]:
    photometric = str(frames.value(header, "PhotometricInterpretation", "")).strip()
    found = {
        "kind": "dicom",
        "thickness": s.thickness,
        "photometric": photometric if photometric in ("MONOCHROME1", "MONOCHROME2") else None,
        "syntax": syntax,
        "bits": int(frames.number(header, "BitsStored") or 0) or None,
        "echo": s.stack[3],
        "units": "HU" if modality == "CT" else "",
        "body": names.body_part(str(frames.value(header, "BodyPartExamined", ""))) or None,
        "contrast": bool(frames.value(header, "ContrastBolusAgent", "")),
    }
    return {k: v for k, v in found.items() if v is not None}


class _Rescaler:
    """Stored values -> physical ones, slice by slice, all slices of a volume in one dtype.

    Integer slopes and intercepts stay in integers (lossless); MONOCHROME1 is inverted within the stored range.
    """

    def __init__(self, slices: Sequence[Slice], header: Dataset, modality: str, pixels: "_Pixels"):
        self.pixels = pixels
        every = [s for first in slices for s in (first, *first.alternates)]
        self.integer = all(float(s.slope).is_integer() and float(s.intercept).is_integer() for s in every)
        self.plain = all(s.slope == 1 and s.intercept == 0 for s in every)
        bits = int(frames.number(header, "BitsStored") or 16)
        signed = bool(frames.number(header, "PixelRepresentation"))
        inverted = str(frames.value(header, "PhotometricInterpretation", "")).strip() == "MONOCHROME1"
        self.top = ((1 << bits) - 1 if not signed else -1) if inverted and modality not in _QUANTITIES else None
        self.notes = [] if self.top is None else [note("inverted", "MONOCHROME1: values were inverted")]

    def __call__(self, s: Slice) -> np.ndarray | None:
        for candidate in (s, *s.alternates):
            plane = self.pixels.plane(candidate)
            if plane is not None:
                break
        else:
            return None
        if plane.dtype.kind not in "iu":
            plane = plane.astype(np.float32)
            return plane if self.plain else plane * np.float32(candidate.slope) + np.float32(candidate.intercept)
        if self.top is not None:
            plane = (self.top - plane.astype(np.int64)).astype(np.int32 if plane.dtype.itemsize > 2 else plane.dtype)
        if self.plain:
            return plane
        if self.integer:
            return plane.astype(np.int32) * int(candidate.slope) + int(candidate.intercept)
        return (plane.astype(np.float64) * candidate.slope + candidate.intercept).astype(np.float32)


class _Pixels:
    """Decoded files; the last one is kept, because multi-frame objects and mosaics are asked plane by plane."""

    def __init__(self, files: tuple[FileRef, ...], rejects: list[Reject]):
        self.files, self.rejects = files, rejects
        self.held: tuple[int, np.ndarray | None] = (-1, None)
        self.bad: set[int] = set()
        self.syntaxes: dict[int, str] = {}
        self.guessed = False  # was a transfer syntax missing?
        self.last = ("undecodable", "no slice can be decoded")

    def plane(self, s: Slice) -> np.ndarray | None:
        """The stored pixels of a slice (h, w), or None if its file is bad; a bad file is reported once."""
        if s.file in self.bad:
            return None
        if self.held[0] != s.file:
            self.held = (-1, None)
            try:
                self.held = (s.file, self._decode(s.file))
            except MemoryError:
                raise
            except Exception as e:  # besides ours, header values of impossible types
                if not isinstance(e, Rejected):
                    e = Rejected("unreadable", f"contradictory header ({type(e).__name__})")
                self.bad.add(s.file)
                self.last = (e.reason, e.detail)
                self.rejects.append(Reject(self.files[s.file].shown, e.reason, e.detail))
                return None
        whole = self.held[1][s.frame]
        if s.tile is None:
            return whole
        (top, left), (rows, columns) = s.tile, s.shape
        return whole[top : top + rows, left : left + columns]

    def syntax(self, file: int) -> str:
        return self.syntaxes.get(file, "")

    def _decode(self, file: int) -> np.ndarray:
        with open_ref(self.files[file]) as f:
            ds = frames.quiet_read(f, pixels=True)
        self.guessed |= "TransferSyntaxUID" not in ds.file_meta
        self.syntaxes[file] = syntax_of(ds).keyword
        return decode(ds)


def decode(ds: Dataset) -> np.ndarray:
    """The stored pixels of a whole file, (frames, h, w).

    Raises:
      Rejected: "truncated-pixel-data", "too-large", "undecodable", "inconsistent".
      MemoryError: they do not fit into memory.
    """
    if "Rows" not in ds:  # it was there when only the header was read
        raise Rejected("truncated-pixel-data", "the file ends within its pixels")
    syntax = syntax_of(ds)
    count = int(frames.number(ds, "NumberOfFrames") or 1)
    shape = (count, int(ds.Rows), int(ds.Columns))
    stored = next((t for t in frames.PIXELS if t in ds), None)
    if stored is None:
        raise Rejected("truncated-pixel-data", "the pixels are absent")
    expected = int(np.prod(shape, dtype=np.float64) * (frames.number(ds, "BitsAllocated") or 16) / 8)
    if expected > MAX_BYTES:
        raise Rejected("too-large", f"more than {MAX_BYTES >> 30} GiB")
    have = len(ds[stored].value or b"")
    if not syntax.is_encapsulated and have < expected:
        raise Rejected("truncated-pixel-data", f"{have} of {expected} bytes")
    if have == 0:
        raise Rejected("truncated-pixel-data", "the pixels are empty")
    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    try:
        array = ds.pixel_array
    except MemoryError:
        raise
    except Exception as e:  # decoders raise what they meet
        raise Rejected("undecodable", f"{syntax.keyword} ({type(e).__name__})") from None
    array = array.reshape(-1, *array.shape[-2:])
    if array.shape != shape:
        raise Rejected("inconsistent", f"header says {shape}, pixels are {array.shape} (frames, rows, columns)")
    return _stored_bits(array, ds)


def syntax_of(ds: Dataset) -> pydicom.uid.UID:
    """The transfer syntax; files without meta header get the one that their elements were written in."""
    meta = ds.file_meta
    if "TransferSyntaxUID" not in meta:
        implicit, little = ds.original_encoding
        if implicit or implicit is None:
            meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        else:
            meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
    return pydicom.uid.UID(meta.TransferSyntaxUID)


def _stored_bits(array: np.ndarray, ds: Dataset) -> np.ndarray:
    """Clears what old files keep above the stored bits (overlays), extending the sign."""
    bits, allocated = int(frames.number(ds, "BitsStored") or 0), array.dtype.itemsize * 8
    if array.dtype.kind not in "iu" or not 0 < bits < allocated:
        return array
    if array.dtype.kind == "u":
        return array & array.dtype.type((1 << bits) - 1)
    return (array << (allocated - bits)) >> (allocated - bits)
