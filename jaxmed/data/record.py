"""One record is one study: a msgpack header, then every scan in its own byte range.

    bytes  0..3   magic "JXMD"
           4..5   schema version, uint16 little-endian
           6..7   zero
           8..11  length of the header, uint32 little-endian
          12..    header (msgpack), then the scans, each at a multiple of 64 bytes

The header holds everything but the voxels, so that a reader decodes only the scans (and, with codec `b2nd`, only the
blocks) that it asks for. Codecs:

  lz4    every scan one blosc2 chunk (LZ4), decoded straight into the batch: the default, for studies that are read
         whole.
  zstd   the same with zstd: a quarter to a half smaller, three times the CPU time of reading.
  raw    voxels as they are; the shard compresses the whole record (zstd). Reading costs several times more CPU than
         `zstd`, because every record passes through two buffers of its full size; any ArrayRecord reader can use it.
  b2nd   blosc2 n-dimensional arrays, chunks 64^3 of blocks 32^3, for volumes that are read by crop.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import blosc2
import msgpack
import numpy as np

from jaxmed.core.errors import UserError

SCHEMA = 1
DEFAULT_CODEC = "lz4"
DTYPES = ("uint8", "int16", "uint16", "float32")

_MAGIC = b"JXMD"
_PREFIX = struct.Struct("<4sHHI")
_ALIGN = 64

Study = dict[str, Any]
Crop = Sequence[slice]


class StudyReader(Protocol):
    """One study that has been located but not decoded; `Record` reads shards, other sources bring their own.

    Attributes: `key`, `patient`, `split` (str), `sentences` (list of str), `labels` ({name: float}),
    `shapes` (one `(d, h, w)` or `(d, h, w, c)` per scan), `dtypes` (one numpy dtype per scan).
    """

    key: str
    patient: str
    split: str
    sentences: list[str]
    labels: dict[str, float]
    shapes: list[tuple[int, ...]]
    dtypes: list[np.dtype]

    def copy_into(self, scan: int, out: np.ndarray, first: int = 0) -> None: ...

    def study(self, scans: Iterable[int] | None = None, crop: Crop | None = None) -> Study: ...


# --- codecs -----------------------------------------------------------------------------------------------------------


class Codec(NamedTuple):
    # (contiguous voxels) -> bytes-like
    encode: Callable[[np.ndarray], Any]
    # (bytes-like, shape, dtype, start, stop, out or None) -> the box [start, stop) of the scan; fills `out` if given
    decode: Callable[..., np.ndarray]
    # ArrayRecord writer options of the shards
    shard_options: str


def _raw_encode(voxels: np.ndarray) -> memoryview:
    return memoryview(voxels.reshape(-1).view(np.uint8))


def _raw_decode(data, shape, dtype, start, stop, out) -> np.ndarray:
    box = np.frombuffer(data, dtype).reshape(shape)[tuple(slice(a, b) for a, b in zip(start, stop))]
    if out is None:
        return box
    out[...] = box
    return out


def _chunk_codec(codec: blosc2.Codec, level: int) -> Codec:
    def encode_chunk(voxels: np.ndarray) -> bytes:
        filters = [blosc2.Filter.SHUFFLE if voxels.itemsize > 1 else blosc2.Filter.NOFILTER]
        return blosc2.compress2(
            voxels.reshape(-1), codec=codec, clevel=level, typesize=voxels.itemsize, filters=filters, nthreads=1
        )

    def decode_chunk(data, shape, dtype, start, stop, out) -> np.ndarray:
        # The library checks sizes against its own header, not against ours.
        if blosc2.get_cbuffer_sizes(bytes(data[:32]))[0] != prod(shape) * dtype.itemsize:
            raise ValueError(f"header says {shape} {dtype}, the data have another size")
        whole = not any(start) and tuple(stop) == tuple(shape)
        direct = whole and out is not None and out.flags.c_contiguous and out.dtype == dtype
        target = out if direct else np.empty(shape, dtype)
        blosc2.decompress2(data, dst=target, nthreads=1)
        return target if direct else _raw_decode(target, shape, dtype, start, stop, out)

    return Codec(encode_chunk, decode_chunk, "group_size:1,uncompressed")


def _b2nd_encode(voxels: np.ndarray) -> bytes:
    spatial = min(voxels.ndim, 3)
    chunks = [min(64, n) for n in voxels.shape[:spatial]] + list(voxels.shape[spatial:])
    blocks = [min(32, n) for n in voxels.shape[:spatial]] + list(voxels.shape[spatial:])
    cparams = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    return blosc2.asarray(voxels, chunks=chunks, blocks=blocks, cparams=cparams).to_cframe()


def _b2nd_decode(data, shape, dtype, start, stop, out) -> np.ndarray:
    if blosc2.nthreads != 1:  # our own threads decode several scans at once; its pool would only get in their way
        blosc2.set_nthreads(1)
    array = blosc2.ndarray_from_cframe(bytes(data))
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise ValueError(f"header says {shape} {dtype}, data say {array.shape} {array.dtype}")
    size = tuple(b - a for a, b in zip(start, stop))
    target = out if out is not None and out.flags.c_contiguous and out.dtype == dtype else np.empty(size, dtype)
    array.get_slice_numpy(target, (tuple(start), tuple(stop)))
    if out is not None and target is not out:
        out[...] = target
        return out
    return target


CODECS = {
    "lz4": _chunk_codec(blosc2.Codec.LZ4HC, 5),
    "zstd": _chunk_codec(blosc2.Codec.ZSTD, 5),  # higher levels cost nothing when reading
    "raw": Codec(_raw_encode, _raw_decode, "group_size:1,zstd:1"),
    "b2nd": Codec(_b2nd_encode, _b2nd_decode, "group_size:1,uncompressed"),
}


# --- writing ----------------------------------------------------------------------------------------------------------


def encode(study: Mapping[str, Any], codec: str = DEFAULT_CODEC) -> bytes:
    """The bytes of one study.

    Args:
      study: `key` str; `patient` str (default: the key); `scans`, a non-empty list of `{"voxels": (d, h, w) or
        (d, h, w, c) in one of `DTYPES`, the same dtype for every scan; "affine": (4, 4), voxel index (d, h, w, 1) to
        patient RAS+ millimetres; "source_affine", "source_shape": the scan as acquired (default: the stored one);
        "name": str; "meta": dict of plain values}`; `sentences`, list of str; `labels`, {name: float}; `split` str.
      codec: one of `CODECS`.

    Raises:
      UserError: a field is missing or of the wrong kind; names the study and the field.
    """
    if codec not in CODECS:
        raise UserError(f"record codec {codec!r} is not known; use one of {', '.join(CODECS)}")
    key = study.get("key")
    if not isinstance(key, str) or not key:
        raise UserError(f"a study needs a non-empty string as 'key', got {key!r}")
    if not study.get("scans"):
        raise UserError(f"study {key}: it has no scans")
    sentences = study.get("sentences", [])
    if isinstance(sentences, str) or not all(isinstance(s, str) for s in sentences):
        raise UserError(f"study {key}: 'sentences' must be a list of strings")

    scans, parts, offset = [], [], 0
    for i, scan in enumerate(study["scans"]):
        voxels = np.asarray(scan["voxels"])
        where = f"study {key}, scan {i} ({scan.get('name', 'unnamed')})"
        if voxels.ndim not in (3, 4) or voxels.size == 0:
            raise UserError(
                f"{where}: voxels must be (d, h, w) or (d, h, w, c) and not empty, got shape {voxels.shape}"
            )
        if voxels.dtype.name not in DTYPES:
            raise UserError(f"{where}: voxels are {voxels.dtype.name}; store one of {', '.join(DTYPES)}")
        if scans and voxels.dtype.str.lstrip("<>|=") != scans[0]["dtype"].lstrip("<>|="):
            raise UserError(f"{where}: voxels are {voxels.dtype.name}, the scans before it {scans[0]['dtype']}")
        if voxels.nbytes >= 1 << 31 and codec in ("lz4", "zstd"):
            raise UserError(f"{where}: {voxels.nbytes} bytes; codec {codec!r} holds less than 2 GiB per scan: use b2nd")
        voxels = np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("<"))
        affine = _affine(scan.get("affine"), where, "affine")
        data = CODECS[codec].encode(voxels)
        size = memoryview(data).nbytes
        scans.append(
            {
                "shape": list(voxels.shape),
                "dtype": voxels.dtype.str,
                "affine": affine,
                "source_affine": _affine(scan["source_affine"], where, "source_affine")
                if "source_affine" in scan
                else affine,
                "source_shape": [int(n) for n in scan.get("source_shape", voxels.shape[:3])],
                "name": str(scan.get("name", "")),
                "meta": dict(scan.get("meta", {})),
                "offset": offset,
                "size": size,
            }
        )
        fill = -size % _ALIGN
        parts += [data, bytes(fill)]
        offset += size + fill
    header = msgpack.packb(
        {
            "key": key,
            "patient": str(study.get("patient", key)),
            "sentences": list(sentences),
            "labels": {str(k): float(v) for k, v in study.get("labels", {}).items()},
            "split": str(study.get("split", "")),
            "codec": codec,
            "scans": scans,
        },
        default=_plain,
    )
    start = _PREFIX.size + len(header)
    return b"".join(
        [_PREFIX.pack(_MAGIC, SCHEMA, 0, len(header)), header, bytes(-start % _ALIGN), *parts],
    )


def _affine(value, where: str, field: str) -> list[float]:
    affine = np.asarray(value, np.float64) if value is not None else np.zeros(0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise UserError(f"{where}: '{field}' must be a finite (4, 4) matrix, got {value!r}")
    return affine.reshape(-1).tolist()


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a record header holds plain values only, not {type(value).__name__}: {value!r}")


# --- reading ----------------------------------------------------------------------------------------------------------


class Record:
    """A study inside the bytes of its record; nothing is decoded before it is asked for. See `StudyReader`.

    Raises:
      UserError: the bytes are no jaxmed record, or one of another schema version.
    """

    def __init__(self, data: bytes, source: str = "record"):
        """`source` names the record in error messages, e.g. "shard-00003.array_record, row 7"."""
        if len(data) < _PREFIX.size or data[:4] != _MAGIC:
            raise UserError(f"{source}: not a jaxmed record; make the shards with `python -m jaxmed.prep`")
        _, version, _, size = _PREFIX.unpack_from(data)
        if version != SCHEMA:
            raise UserError(
                f"{source}: written with record schema {version}, this jaxmed reads schema {SCHEMA}; "
                "make the shards again with `python -m jaxmed.prep`, or install the jaxmed that wrote them"
            )
        header = msgpack.unpackb(memoryview(data)[_PREFIX.size : _PREFIX.size + size])
        start = _PREFIX.size + size
        self._body = memoryview(data)[start + -start % _ALIGN :]
        self._source = source
        self._codec = CODECS[header["codec"]]
        self._scans = header["scans"]
        self.codec: str = header["codec"]
        self.key: str = header["key"]
        self.patient: str = header["patient"]
        self.split: str = header["split"]
        self.sentences: list[str] = header["sentences"]
        self.labels: dict[str, float] = header["labels"]
        self.shapes = [tuple(scan["shape"]) for scan in self._scans]
        self.dtypes = [np.dtype(scan["dtype"]) for scan in self._scans]

    def copy_into(self, scan: int, out: np.ndarray, first: int = 0) -> None:
        """Decodes slices `first` .. `first + len(out)` of one scan into `out` (slices, h, w[, c]), same dtype."""
        shape = self.shapes[scan]
        self._decode(scan, (first, *[0] * (len(shape) - 1)), (first + len(out), *shape[1:]), out)

    def voxels(self, scan: int, crop: Crop | None = None) -> np.ndarray:
        """One scan, or the box of it that `crop` (slices for d, h, w, without steps) selects. Do not write to it."""
        shape = self.shapes[scan]
        box = [s.indices(n) for s, n in zip([*(crop or ()), *[slice(None)] * len(shape)], shape)]
        if any(step != 1 for _, _, step in box):
            raise ValueError(f"crop {crop} has a step; crops are contiguous boxes")
        return self._decode(scan, tuple(b[0] for b in box), tuple(max(b[0], b[1]) for b in box), None)

    def _decode(self, scan: int, start, stop, out) -> np.ndarray:
        about = self._scans[scan]
        data = self._body[about["offset"] : about["offset"] + about["size"]]
        try:
            if len(data) != about["size"]:
                raise ValueError(f"{len(data)} of {about['size']} bytes")
            return self._codec.decode(data, self.shapes[scan], self.dtypes[scan], start, stop, out)
        except (RuntimeError, ValueError) as e:
            raise UserError(
                f"{self._source}: study {self.key}, scan {scan} cannot be decoded ({e}); the shard is damaged: "
                "copy it again, or delete it with its .json and run prep again"
            ) from e

    def study(self, scans: Iterable[int] | None = None, crop: Crop | None = None) -> Study:
        """The study as a dict (see `encode`), with the given scans only (default: all), each cropped by `crop`.

        The `affine` of a cropped scan is that of the crop.
        """
        chosen = range(len(self._scans)) if scans is None else scans
        return {
            "key": self.key,
            "patient": self.patient,
            "split": self.split,
            "sentences": list(self.sentences),
            "labels": dict(self.labels),
            "scans": [self._scan(i, crop) for i in chosen],
        }

    def _scan(self, i: int, crop: Crop | None) -> Study:
        about = self._scans[i]
        affine = np.array(about["affine"]).reshape(4, 4)
        corner = [s.indices(n)[0] for s, n in zip(crop or (), self.shapes[i][:3])]
        affine[:, 3] += affine[:, : len(corner)] @ np.array(corner, float)
        return {
            "voxels": self.voxels(i, crop),
            "affine": affine,
            "source_affine": np.array(about["source_affine"]).reshape(4, 4),
            "source_shape": tuple(about["source_shape"]),
            "name": about["name"],
            "meta": dict(about["meta"]),
        }


def decode(data: bytes, scans: Iterable[int] | None = None, crop: Crop | None = None) -> Study:
    """The study in a record's bytes; `scans` and `crop` limit what is decoded. See `encode` and `Record`."""
    return Record(data).study(scans, crop)
