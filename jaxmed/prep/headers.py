"""What one file is, from its first bytes and its header."""

import dataclasses
import re

import pydicom
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from jaxmed.prep import frames, regions, volumes
from jaxmed.prep.files import ARCHIVES, head, open_ref
from jaxmed.prep.scan import FileRef, Rejected

SIDECARS = (".json", ".tsv", ".csv", ".bval", ".bvec", ".bvals", ".bvecs", ".jsonl")
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # how PNG and JPEG files begin
_IDENTITY = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "AccessionNumber", "PatientBirthDate"),
    *("StudyInstanceUID", "SeriesInstanceUID", "ReferringPhysicianName", "PerformingPhysicianName", "PatientBirthName"),
)
_TAGS = [
    Tag(pydicom.datadict.tag_for_keyword(k))
    for k in (
        *_IDENTITY,
        *("SpecificCharacterSet", "SOPClassUID", "Modality", "Rows", "Columns", "SamplesPerPixel", "SeriesNumber"),
        *("PhotometricInterpretation", "ImagePositionPatient", "IssuerOfPatientID", "DirectoryRecordSequence"),
        *("PerFrameFunctionalGroupsSequence", "SOPInstanceUID", "BodyPartExamined"),
    )
]


@dataclasses.dataclass
class Header:
    """What grouping needs of one file; identifiers stay in memory."""

    kind: str  # "dicom", "nifti", "nrrd", "picture", or "" if refused
    reason: str = ""
    detail: str = ""
    study: str = ""  # StudyInstanceUID
    series: str = ""  # SeriesInstanceUID
    patient: str = ""
    accession: str = ""
    order: float = 0.0  # SeriesNumber
    instance: str = ""  # SOPInstanceUID
    region: str = ""  # a token of `regions`
    identifiers: tuple[str, ...] = ()  # names, numbers and dates that may appear in paths


def inspect(ref: FileRef, projections: bool = False) -> Header:
    """Classifies a file; never raises for bad data.

    Args:
      projections: radiographs are wanted: PNG and JPEG are images too.
    """
    try:
        with frames.Quiet():
            return _inspect(ref, projections)
    except Rejected as e:
        return Header("", e.reason, e.detail)
    except MemoryError:
        return Header("", "too-large", "the header does not fit into memory")
    except Exception as e:  # header values of impossible types: the file is bad, not the run
        return Header("", "unreadable", f"contradictory header ({type(e).__name__})")


def _inspect(ref: FileRef, projections: bool) -> Header:
    name = (ref.member or ref.path).lower()
    start = head(ref, 264)
    if not start:
        raise Rejected("empty-file", "0 bytes")
    kind = volumes.kind_of(name)
    if kind:
        volumes.check(ref)
        return Header(kind)
    if projections and start.startswith(PICTURES):
        return Header("picture")
    if start[128:132] != b"DICM" and not _bare_dicom(start):
        if name.endswith(SIDECARS):
            raise Rejected("sidecar", "belongs to images or to the data set")
        if name.endswith(ARCHIVES):
            raise Rejected("nested-archive", "an archive of this kind is not opened; unpack it, or use zip")
        raise Rejected("not-an-image", "neither DICOM, NIfTI nor NRRD")
    with open_ref(ref) as f:
        ds = frames.quiet_read(f, pixels=False, tags=_TAGS)
    header = Header("dicom")
    header.study, header.series = (str(frames.value(ds, k, "")) for k in ("StudyInstanceUID", "SeriesInstanceUID"))
    header.patient = str(frames.value(ds, "PatientID", ""))
    header.accession = str(frames.value(ds, "AccessionNumber", "")).strip()
    header.order = frames.number(ds, "SeriesNumber") or 0.0
    header.instance = str(frames.value(ds, "SOPInstanceUID", ""))
    header.region = regions.region(str(frames.value(ds, "BodyPartExamined", "")))
    header.identifiers = _identifiers(ds)
    try:
        if start[128:132] != b"DICM" and "SOPClassUID" not in ds and "Modality" not in ds:
            raise Rejected("not-an-image", "neither DICOM, NIfTI nor NRRD")
        frames.refuse(ds, projections=projections)
    except Rejected as e:
        header.kind, header.reason, header.detail = "", e.reason, e.detail
    return header


def _bare_dicom(start: bytes) -> bool:
    """Do the bytes look like DICOM elements without preamble: group 2 or 8, an element that exists, a length?"""
    if len(start) < 8:
        return False
    for order in ("little", "big"):
        group, element = int.from_bytes(start[:2], order), int.from_bytes(start[2:4], order)
        if group in (0x0002, 0x0008) and element <= 0x1200:
            explicit = re.fullmatch(rb"[A-Z]{2}", start[4:6]) is not None
            if explicit or int.from_bytes(start[4:8], order) <= 1024:
                return True
    return False


def _identifiers(ds: pydicom.Dataset) -> tuple[str, ...]:
    """Every value, and every word of a name, that would tell who it is if it stood in a path."""
    result: set[str] = set()
    for keyword in _IDENTITY:
        found = frames.value(ds, keyword)
        if found is None:
            continue
        # Only a MultiValue is several: a PersonName iterates over its letters.
        for part in found if isinstance(found, MultiValue) else [found]:
            text = str(part)
            result.add(text)
            if "Name" in keyword:
                result.update(re.findall(r"[^\W\d_]{3,}", text))
    return tuple(sorted(result))
