"""NIfTI and NRRD files -> scans."""

import os
import re

import numpy as np

from jaxmed.core.files import is_full
from jaxmed.prep import frames, names
from jaxmed.prep.files import head, on_disk
from jaxmed.prep.scan import FileRef, RawScan, RawSeries, ReadOptions, Reject, Rejected
from jaxmed.prep.stack import narrow, note, plane_name

_NIFTI = re.compile(r"\.(nii|nii\.gz|hdr)$", re.I)
_NRRD = re.compile(r"\.(nrrd|nhdr)$", re.I)
_MILLIMETRES = {"m": 1000.0, "mm": 1.0, "um": 1e-3, "micron": 1e-3, "meter": 1000.0, "cm": 10.0}


def kind_of(name: str) -> str:
    """ "nifti", "nrrd" or "" from a file's name."""
    return "nifti" if _NIFTI.search(name) else "nrrd" if _NRRD.search(name) else ""


def stem(name: str) -> str:
    """The file's name without folder and endings."""
    return re.sub(r"\.(gz|nii|hdr|nrrd|nhdr|dcm|dicom|png|jpe?g)\b", "", re.split(r"[\\/]", name)[-1], flags=re.I)


def check(ref: FileRef) -> None:
    """Raises `Rejected` if the file's first bytes are not what its name says."""
    name = ref.member or ref.path
    start = head(ref, 352)
    if kind_of(name) == "nrrd":
        good = start[:4] == b"NRRD"
    else:
        size = start[:4]
        good = len(start) >= 348 and size in ((348).to_bytes(4, "little"), (348).to_bytes(4, "big"))
        good = good or size in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
    if not good:
        raise Rejected("unreadable", f"not a {kind_of(name)} header")


def read(series: RawSeries, options: ReadOptions) -> tuple[list[RawScan], list[Reject]]:
    """The NIfTI and NRRD side of `scan.read_scans`. Arrays are turned to (d, h, w) = (k, j, i) of the file."""
    ref = series.files[0]
    try:
        with frames.Quiet():
            array, affine, notes, finish = (_nifti if series.kind == "nifti" else _nrrd)(ref)
            if series.rescale is not None:
                finish = _rescaled(*series.rescale)
            return _scans(ref, series, array, affine, notes, finish, options), []
    except Rejected as e:
        return [], [Reject(ref.shown, e.reason, e.detail, "series")]
    except MemoryError:
        return [], [Reject(ref.shown, "too-large", "does not fit into memory", "series")]


def _scans(ref, series, array, affine, notes, finish, options) -> list[RawScan]:
    if array.ndim > 4:
        flat = int(np.prod(array.shape[3:]))
        if flat != max(array.shape[3:]):
            raise Rejected("inconsistent", f"{array.ndim} dimensions")
        array = array.reshape(*array.shape[:3], flat)
    while array.ndim < 3:
        array = array[..., None]
    if min(array.shape) < 1:
        raise Rejected("inconsistent", f"empty array of shape {array.shape}")
    if min(array.shape[:3]) < options.min_slices:
        raise Rejected("too-few-slices", f"shape {array.shape}, {options.min_slices} asked for")
    affine = np.asarray(affine, np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (lengths < 1e-6).any():
        raise Rejected("no-geometry", "degenerate affine")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-2:
        raise Rejected("no-geometry", "degenerate affine")
    for axis, mm in zip((2, 1, 0), series.spacing or ()):
        if mm is not None:
            affine[:3, axis] *= mm / lengths[axis]
    if series.spacing and None not in series.spacing:
        notes = [n for n in notes if n["reason"] != "no-spacing"]
    if options.require_geometry and any(n["reason"] == "no-spacing" for n in notes):
        raise Rejected("no-geometry", "no voxel spacing")
    turned = affine[:, [2, 1, 0, 3]]
    total = 1 if array.ndim == 3 else array.shape[3]
    count = total if options.max_volumes is None else min(total, options.max_volumes)
    text = stem(ref.member or ref.path)
    result = []
    for index in range(count):
        own = list(notes)
        voxels, extra = finish(np.asarray(array if array.ndim == 3 else array[..., index]))
        if total > 1:
            own.append(note("several-volumes", f"{count} of {total} volumes were read"))
        spacing = np.linalg.norm(turned[:3, :3], axis=0)
        normal = np.cross(turned[:3, 1], turned[:3, 2])
        step = abs(float(turned[:3, 0] @ normal / np.linalg.norm(normal)))
        meta = {
            "kind": series.kind,
            "spacing": [float(v) for v in spacing],
            "step": step,
            "uniform": True,
            "filled": 0,
            "orientation": plane_name(turned),
            "units": "",
        }
        if total > 1:
            meta["volume"] = index
        given = [word for word in ("rescale", "spacing") if getattr(series, word) is not None]
        if given:
            meta["from_manifest"] = " ".join(given)
        name = names.guess("", text)
        modality = {"ct": "CT", "cta": "CT", "pt": "PT", "unknown": ""}.get(name, "MR")
        result.append(
            RawScan(np.ascontiguousarray(voxels.transpose(2, 1, 0)), turned.copy(), modality, name, meta, own + extra)
        )
    return result


def _rescaled(slope: float, intercept: float):
    """Stored values -> physical ones; integers stay integers where that is lossless."""

    def finish(array: np.ndarray) -> tuple[np.ndarray, list]:
        if array.dtype.kind == "b":
            array = array.astype(np.uint8)
        if array.dtype.kind in "iu" and slope == 1 and intercept == 0:
            return narrow(array.astype(array.dtype.newbyteorder("="))), []
        if array.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer() and array.dtype.itemsize < 8:
            return narrow(array.astype(np.int64) * int(slope) + int(intercept)), []
        if array.dtype.kind not in "iuf":
            raise Rejected("colour-image", "voxels are complex numbers or colours")
        result = (array.astype(np.float64) * slope + intercept).astype(np.float32)
        if np.isfinite(result).all():
            return result, []
        lost = float((~np.isfinite(result)).mean())
        return np.where(np.isfinite(result), result, 0).astype(np.float32), [
            note("non-finite", f"{100 * lost:.3g} % of the voxels")
        ]

    return finish


def _nifti(ref: FileRef):
    import nibabel

    name = ref.member or ref.path
    if ref.member and name.lower().endswith(".hdr"):
        raise Rejected("unreadable", "a pair of .hdr and .img inside a zip; unpack it")
    suffix = ".nii.gz" if name.lower().endswith(".gz") else os.path.splitext(name)[1].lower()
    try:
        with on_disk(ref, suffix) as path:
            image = nibabel.load(path)
            header = image.header
            if image.get_data_dtype().kind not in "iufb":
                raise Rejected("colour-image", "voxels are complex numbers or colours")
            raw = np.asanyarray(image.dataobj.get_unscaled())
    except (Rejected, MemoryError):
        raise
    except Exception as e:  # nibabel raises what it meets: ImageFileError, EOFError, zlib.error, ValueError, OSError
        if is_full(e):
            raise
        check(ref)
        impossible = isinstance(e, nibabel.spatialimages.HeaderDataError)
        reason = "unreadable" if impossible else "truncated-pixel-data"
        raise Rejected(reason, f"nibabel cannot read it ({type(e).__name__})") from None
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    affine, notes = np.array(image.affine, np.float64), []
    if not isinstance(header, nibabel.Nifti1Header):
        notes.append(note("no-orientation", "ANALYZE header: sides are not stored"))
    else:
        if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
            notes.append(note("no-orientation", "neither sform nor qform is set"))
            if not np.any(np.asarray(header["pixdim"][1:4], np.float64)):
                notes.append(note("no-spacing", "voxel sizes are zero"))
        try:
            scale = _MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
        except KeyError:
            scale = 1.0  # an undefined unit code
        affine[:3] *= scale
    return raw, affine, notes, _rescaled(slope, intercept)


def _nrrd(ref: FileRef):
    import nrrd

    name = ref.member or ref.path
    suffix = os.path.splitext(name)[1].lower()
    if ref.member and suffix == ".nhdr":
        raise Rejected("unreadable", "a detached NRRD header inside a zip; unpack it")
    try:
        with on_disk(ref, suffix) as path:
            raw, header = nrrd.read(path, index_order="F")
    except (Rejected, MemoryError):
        raise
    except Exception as e:  # pynrrd raises NRRDError, ValueError, EOFError, zlib.error, OSError
        if is_full(e):
            raise
        raise Rejected("truncated-pixel-data", f"pynrrd cannot read it ({type(e).__name__})") from None
    kinds = [str(k).lower() for k in header.get("kinds", ["domain"] * raw.ndim)]
    directions = header.get("space directions")
    lists = [i for i, k in enumerate(kinds) if k not in ("domain", "space")]
    if directions is not None:
        directions = np.array([[np.nan] * 3 if row is None else row for row in directions], np.float64)
        lists = [i for i in range(raw.ndim) if np.isnan(directions[i]).any()]
    if any("color" in kinds[i] or "complex" in kinds[i] for i in lists):
        raise Rejected("colour-image", "voxels are complex numbers or colours")
    space = [i for i in range(raw.ndim) if i not in lists]
    if len(space) not in (2, 3) or len(lists) > 1:
        raise Rejected("inconsistent", f"{len(space)} spatial and {len(lists)} other axes")
    raw = raw.transpose(*space, *lists)
    affine, notes = np.eye(4), []
    if directions is not None and directions.shape[1] == 3 and len(space) == 3:
        affine[:3, :3] = directions[space].T
        origin = np.asarray(header.get("space origin", np.full(3, np.nan)), np.float64)
        if np.isfinite(origin).all() and origin.shape == (3,):
            affine[:3, 3] = origin
        else:
            notes.append(note("no-orientation", "no space origin; the origin is arbitrary"))
        sides = str(header.get("space", "")).lower()
        signs = {"l": -1, "p": -1, "r": 1, "a": 1, "s": 1, "i": -1}
        first = [w[0] for w in re.split(r"[- ]", sides) if w] if "-" in sides else list(sides)
        if len(first) >= 3 and [c in ok for c, ok in zip(first, ("lr", "pa", "si"))] == [True] * 3:
            affine[:3] *= np.array([signs[c] for c in first[:3]], np.float64)[:, None]
        else:
            notes.append(note("no-orientation", "the space is not one of a patient"))
    else:
        spacings = np.asarray(header.get("spacings", np.full(raw.ndim, np.nan)), np.float64)
        spacings = np.array([spacings[i] if i < len(spacings) else np.nan for i in space])
        known = np.isfinite(spacings)
        notes.append(note("no-orientation", "no space directions"))
        if not known.all():
            notes.append(note("no-spacing", "spacing is absent; 1 mm assumed"))
        affine[: len(space), : len(space)] = np.diag(np.where(known, spacings, 1.0))
    units = [str(u).lower() for u in header.get("space units", [])]
    affine[:3] *= _MILLIMETRES.get(units[0], 1.0) if units else 1.0
    return raw, affine, notes, _rescaled(1.0, 0.0)
