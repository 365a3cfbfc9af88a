"""What the readers hand over: scans with their geometry, studies without identities, and reasons for what was refused.

The reading half of `python -m jaxmed.prep` is two calls:

  studies, rejects = discover.find_studies(sources, salt=...)     # headers only
  scans, rejects = scan.read_scans(series)                        # voxels of one series

Nothing in `RawScan`, `Reject` or the public fields of `RawStudy` identifies a person: keys are salted hashes, names are
tokens from a closed list, `meta` holds numbers and tokens, texts of the headers are never copied. `FileRef.path` and
`FileRef.member` are the real places on disk, needed to read; only `FileRef.shown` may be written anywhere.
"""

import dataclasses
import hashlib
import hmac

import numpy as np


class Rejected(Exception):
    """A file or series that is not turned into a scan.

    Attributes:
      reason: kebab-case token, see `REASONS`.
      detail: one sentence for people, without anything from the patient's header.
    """

    def __init__(self, reason: str, detail: str = ""):
        if reason not in REASONS:
            raise ValueError(f"unknown reject reason {reason!r}")
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


# Every reason that `Reject.reason` or a note of `RawScan.notes` can have, with its meaning.
REASONS = {
    # files that are no image
    "not-an-image": "the file is of no kind that prep reads",
    "sidecar": "a table, JSON or gradient file that belongs to images",
    "empty-file": "the file has no bytes",
    "unreadable": "the file cannot be opened or its header cannot be parsed",
    "unsafe-path": "a zip member whose name leaves the archive",
    "encrypted": "a zip member that needs a password",
    "nested-archive": "an archive inside an archive, or of a kind that prep does not open",
    "too-large": "larger than the size limit when decompressed",
    "dicomdir": "a DICOMDIR index; the files are found without it",
    "no-images": "a source, participant or study without any image that can be read",
    # DICOM objects that are no scan
    "structured-report": "an SR document",
    "segmentation": "a SEG object, or a file named as mask or segmentation",
    "skipped-by-name": "a volume whose name the recipe or --read.skip_names leaves out",
    "rt-object": "radiotherapy structure set, dose, plan or record",
    "presentation-state": "a presentation state or key object selection",
    "registration": "a spatial registration or fiducials object",
    "encapsulated-document": "a PDF or other document wrapped in DICOM",
    "waveform": "an ECG or other waveform",
    "no-pixel-data": "a DICOM object without pixels",
    "secondary-capture": "a screenshot or scanned page",
    "localizer": "a scout or localizer",
    "colour-image": "colour pixels; scans are grey",
    "palette-image": "palette colour pixels; scans are grey",
    # radiographs (`ReadOptions.projections`)
    "not-a-radiograph": "a volume; the recipe takes single projection images",
    "multi-frame": "a cine or several frames; radiographs are single images",
    "too-small": "fewer pixels on a side than --read.min_side",
    "too-deep": "values that 16 bits do not hold",
    "blank": "hardly any different grey values: no exposure, or a drawing",
    "duplicate-image": "another file holds the same image (SOPInstanceUID); the first one is kept",
    "bids-derivative": "inside the derivatives folder of a BIDS tree",
    # scans that cannot be used
    "truncated-pixel-data": "fewer pixels than the header promises",
    "undecodable": "the pixels cannot be decoded",
    "no-geometry": "no position and orientation, or a degenerate affine",
    "missing-slices": "slices are missing (reject: more than allowed; note: interpolated)",
    "non-uniform-spacing": "uneven slice steps (reject: too uneven; note: resampled to one step)",
    "too-few-slices": "fewer slices than asked for",
    "inconsistent": "the header contradicts itself or its neighbours",
    # notes on scans that are kept
    "duplicate-slices": "slices at the same position: the first readable one is kept",
    "several-slabs": "one series with separated slabs: each becomes a scan",
    "several-stacks": "one series with several orientations, sizes, echoes or image types: each becomes a scan",
    "several-volumes": "a time or diffusion series: each kept volume becomes a scan",
    "gantry-tilt": "slices are shifted against each other; the affine is sheared",
    "inverted": "MONOCHROME1: inverted so that more attenuation is brighter",
    "no-orientation": "spacing is known, orientation in the patient is not",
    "planar": "a projection image: one slice, plane spacing only",
    "no-spacing": "pixel spacing is unknown; 1 mm assumed",
    "order-from-numbers": "positions are absent; slices are ordered by their instance numbers",
    "non-finite": "NaN or infinite voxels set to 0",
    "no-meta-header": "the DICOM preamble or file meta is missing; the syntax was guessed",
    # suspicions about radiographs that are kept
    "photometric-disagreement": "PresentationLUTShape and the photometric interpretation contradict; the latter counts",
    "looks-inverted": "bright around a dark middle: perhaps inverted",
    "clipped": "much of the picture is black or white: perhaps a wrong window",
    "low-contrast": "nearly one grey value where the picture should be",
    "burnt-in-text": "text in the pixels, by the header or by shapes like letters: look before you pass the data on",
    "duplicate-pixels": "the same pixels as another image",
    # the manifest
    "row-without-study": "a manifest row that matches no study",
    "study-without-row": "a study that no manifest row matches",
    "ambiguous-row": "a manifest row that matches several studies; joined to none",
    "unread-columns": "columns of a manifest that mean nothing to prep",
}
# Reasons that leave nothing out: what `find_studies` says about studies and tables that are used.
KEPT = ("study-without-row", "unread-columns")


@dataclasses.dataclass(frozen=True)
class FileRef:
    """One file on disk or in a zip. `shown` is the only field that may be written to a report."""

    path: str  # the file, or the zip that holds it
    member: str = ""  # name inside the zip
    shown: str = ""  # relative to the source, identifiers replaced (see `discover.find_studies`)


@dataclasses.dataclass(frozen=True)
class Reject:
    """One line of `prep_report.json`."""

    path: str  # `FileRef.shown` of the (first) file, or the study key, or "manifest.csv:12"
    reason: str  # one of REASONS
    detail: str = ""
    kind: str = "file"  # "file", "series", "study", "manifest", "participant" or "source"
    files: int = 1


@dataclasses.dataclass
class RawScan:
    """One volume in its own voxel grid."""

    voxels: np.ndarray  # (d, h, w) integer or float32; rescaled: HU for CT
    affine: np.ndarray  # (4, 4) float64, voxel index (d, h, w, 1) -> patient RAS+ millimetres; sheared for tilted CT
    modality: str  # "CT", "MR", "CR", "PT", ... ("" if the format does not say)
    name: str  # token of names.TOKENS, e.g. "t1w", "flair", "dwi", "ct", "unknown"
    meta: dict[str, object]  # numbers, booleans and tokens only, see `read_scans`
    notes: list[dict[str, str]] = dataclasses.field(default_factory=list)  # {"reason", "detail"}


@dataclasses.dataclass
class RawSeries:
    """Files that are read together; for NIfTI and NRRD one file."""

    kind: str  # "dicom", "nifti", "nrrd" or "picture" (PNG, JPEG)
    files: tuple[FileRef, ...]  # in the order found; stacking orders them by position
    key: str  # salted hash
    # From a manifest, for NIfTI and NRRD: replace what the file's header says. None = as the header has it.
    rescale: tuple[float, float] | None = None  # (slope, intercept) of the stored values
    spacing: tuple[float | None, float | None, float | None] | None = None  # mm, order d h w


@dataclasses.dataclass
class RawStudy:
    """Scans of one visit, with what the manifest says about it."""

    key: str  # salted hash, unique among the studies found
    patient: str  # salted hash of the patient, or `key` if unknown
    series: list[RawSeries]
    sentences: list[str] = dataclasses.field(default_factory=list)
    labels: dict[str, float] = dataclasses.field(default_factory=dict)
    split: str = ""  # "" = the manifest says nothing
    region: str = ""  # of a radiograph, see `regions`


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How `read_scans` decides; stored with the recipe.

    Attributes:
      max_missing: so many absent slices of a stack are interpolated; more reject it.
      max_step_ratio: largest over smallest slice step of an uneven stack that is resampled; beyond it is rejected.
      min_slices: stacks with fewer slices are rejected.
      max_volumes: volumes kept of a time or diffusion series (the first ones); None keeps all.
      planar: keep projection radiographs as scans with one slice.
      require_geometry: reject images without position and orientation; False keeps them with identity orientation.
      localizers: keep scouts and localizers.
      projections: every file is one radiograph, kept as it was stored (see `radiographs.read`), and a record of its
        own; PNG and JPEG count too. All of the above but `localizers` mean nothing then.
      secondary: keep radiographs whose image type says that they are secondary.
      min_side: radiographs with fewer pixels on a side are rejected.
    """

    max_missing: int = 2
    max_step_ratio: float = 3.0
    min_slices: int = 1
    max_volumes: int | None = 8
    planar: bool = True
    require_geometry: bool = True
    localizers: bool = False
    projections: bool = False
    secondary: bool = False
    min_side: int = 64


def salted_hash(salt: str, *parts: str) -> str:
    """16 hex characters of HMAC-SHA256: the same for the same salt and parts, useless without the salt."""
    message = "\x1f".join(parts).encode()
    return hmac.new(salt.encode(), message, hashlib.sha256).hexdigest()[:16]


def read_scans(series: RawSeries, options: ReadOptions = ReadOptions()) -> tuple[list[RawScan], list[Reject]]:
    """Loads the voxels of one series.

    A series can give several scans (several stacks, time points, a 4D file) and some of its files can be bad while the
    rest is fine, so this never raises for bad data: what is refused is in the second list, each with its reason. A
    series without any scan has at least one reject of kind "series".

    Keys of `RawScan.meta` (absent if unknown): `kind`, `tilt` (degrees, CT), `step` (mm between slices along the
    normal), `thickness` (mm), `spacing` (3 mm, order d h w), `uniform` (bool: nothing was resampled or interpolated),
    `filled` (slices interpolated), `photometric`, `syntax` (transfer syntax keyword), `bits`, `volume` (index of a time
    or diffusion point), `b_value`, `echo`, `orientation` ("axial", "coronal", "sagittal", "oblique"), `units` ("HU" or
    ""), `body` (a token), `contrast` (bool), `planar` (bool), `from_manifest` ("rescale", "spacing" or both); those of
    radiographs are in `radiographs.read`.
    """
    from jaxmed.prep import dicom, radiographs, volumes  # they are built on this module

    if options.projections:
        return radiographs.read(series, options)
    read = dicom.read if series.kind == "dicom" else volumes.read
    return read(series, options)
