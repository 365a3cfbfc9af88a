"""PyTorch's files (.pt, .pth, .bin, .ckpt) without PyTorch and without running anything that is in them.

Both formats of `torch.save`: the zip archive (since 1.6) and the stream of pickles before it. Tensors are views of the
memory-mapped file (zip) with their own strides and shared storages, so that reading one part costs one part.
"""

import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.ports import safe_pickle
from jaxmed.ports.safe_pickle import Damaged, Refused, Unknown, Word

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ALIGN = 64
_DTYPES = {
    "float64": np.float64, "double": np.float64, "float32": np.float32, "float": np.float32,
    "float16": np.float16, "half": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64, "long": np.int64, "int32": np.int32, "int": np.int32, "int16": np.int16, "short": np.int16,
    "int8": np.int8, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "bool": np.bool_, "complex64": np.complex64, "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
_STORAGES = {
    "Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128, "Untyped": np.uint8,
}  # fmt: skip
# Configurations, counters and statistics that lie beside weights: known to hold none, and not built.
_HARMLESS = ("argparse", "datetime", "easydict", "ml_collections", "numpy", "omegaconf", "pathlib", "yacs")


class _Storage(NamedTuple):
    dtype: np.dtype
    size: int
    bytes_: Callable[[], np.ndarray]  # all of them, as uint8


class Tensor(NamedTuple):
    """A tensor that is still in its file."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def numpy(self) -> np.ndarray:
        """Its values: a read-only view of the file where possible.

        Raises:
          Damaged: the storage is shorter than the tensor.
        """
        data = self.storage.bytes_()
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        whole = len(data) // self.dtype.itemsize
        if len(self.shape) != len(self.strides) or min((*self.shape, *self.strides, self.offset), default=0) < 0:
            raise Damaged(f"a tensor of shape {self.shape} and strides {self.strides}")
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if self.offset + last >= whole:
            raise Damaged(f"a tensor of shape {self.shape} in a storage of {whole} numbers")
        flat = data[: whole * self.dtype.itemsize].view(self.dtype)[self.offset :]
        steps = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


class State(NamedTuple):
    """The tensors of a file by name, the dict in it that they are from, and the keys beside it."""

    tensors: dict[str, np.ndarray]
    key: str
    others: list[str]


# Where training scripts keep the weights, the most usual first; and where they keep tensors that are none.
_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_NOT_WEIGHTS = ("optim", "sched", "scaler", "state", "loss", "amp", "rng", "callbacks")


def read(path: str | Path, key: str | None = None) -> State:
    """The weights in a file, as read-only arrays.

    Args:
      key: which dict of the file, with dots for dicts in dicts; None: the file itself, or the one that is called
        "state_dict", "model" or the like.

    Raises:
      UserError: the file is damaged, has no weights or several, or asks for an object of Python that is neither a
        tensor nor a plain container (names it): nothing is ever imported or run for a file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            head = f.read(4)
            f.seek(0)
            found = _read_zip(f) if head[:2] == b"PK" else _read_legacy(f)
            key, chosen = _choose(path, dict(_dicts(found)), key)
            # While the file is open: compressed entries are read now, others stay in it.
            tensors = {k: x.numpy() for k, x in chosen.items() if isinstance(x, Tensor)}
        return State(tensors, key, [str(k) for k in found if k != key.split(".")[0]] if key else [])
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Refused as e:
        raise UserError(
            f"{path}: it asks for {e}, which weights do not need, and nothing in such a file is run. If you trust it, "
            "save only its tensors with PyTorch: torch.save(model.state_dict(), 'weights.pt')"
        ) from None
    except (Damaged, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as e:
        raise UserError(
            f"{path}: no whole PyTorch file ({' '.join(str(e).split())[:200]}); download or copy it again"
        ) from None


def _choose(path: Path, dicts: dict[str, dict], key: str | None) -> tuple[str, dict]:
    if key is None:
        tops = [k for k in ("", *_KEYS) if k in dicts]
        key = tops[0] if tops else next(iter(dicts), None) if len(dicts) == 1 else None
    if key not in dicts:
        named = ", ".join(k or "the file itself" for k in dicts)
        asked = "it does not say which of its dicts are the weights" if key is None else f"no weights under {key!r}"
        raise UserError(f"{path}: {asked}; --key can name {named}" if dicts else f"{path}: it has no tensors")
    return key, dicts[key]


def _dicts(x: Any, key: str = "", depth: int = 3):
    """(key, dict) of all dicts with tensors that may be weights."""
    if not isinstance(x, dict) or not all(isinstance(k, str) for k in x):
        return
    if any(isinstance(v, Tensor) for v in x.values()):
        yield key, x
    elif depth:
        for k, v in x.items():
            if k in _KEYS or not any(word in k.lower() for word in _NOT_WEIGHTS):
                yield from _dicts(v, f"{key}.{k}" if key else k, depth - 1)


# ---- What the pickles may name.


def _tensor(storage, offset, shape, strides, *_) -> Tensor:
    return _tensor_of(getattr(storage, "dtype", None), storage, offset, shape, strides)


def _tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> Tensor:
    return _tensor_of(dtype.data, storage, offset, shape, strides)


def _tensor_of(dtype, storage, offset, shape, strides) -> Tensor:
    if (
        not isinstance(storage, _Storage)
        or not isinstance(dtype, np.dtype)
        or not all(type(i) is int for i in (offset, *shape, *strides))
    ):
        raise Damaged("a tensor without a storage or with sizes that are no numbers")
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _first(x, *_):
    return x


def _from_type(function, kind, args, state) -> Any:
    return safe_pickle.call(function, args)


def _dict(items=(), *_) -> dict:
    return {} if isinstance(items, Word) else dict(items)


_WORDS = safe_pickle.words(
    {
        "torch._utils _rebuild_tensor": _tensor,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch._utils _rebuild_tensor_v3": _tensor_v3,
        "torch._utils _rebuild_parameter": _first,
        "torch._utils _rebuild_parameter_with_state": _first,
        "torch._tensor _rebuild_from_type_v2": _from_type,
        "torch Tensor": None,
        "torch.nn.parameter Parameter": None,
        "torch device": None,
        "torch Size": tuple,
        "torch.torch_version TorchVersion": None,
        "collections OrderedDict": _dict,
        "collections defaultdict": _dict,
        "collections Counter": _dict,
        "_codecs encode": None,
        **{f"{m} {k}": v for m in ("builtins", "__builtin__") for k, v in {"set": set, "frozenset": frozenset}.items()},
        **{f"{m} {k}": None for m in ("builtins", "__builtin__") for k in ("dict", "list", "int", "float", "bool")},
        **{f"{m} {k}": None for m in ("builtins", "__builtin__") for k in ("bytearray", "complex", "slice", "str")},
    }
)
_WORDS |= {f"torch {k}": Word(f"torch {k}", data=np.dtype(v)) for k, v in _DTYPES.items()}
_WORDS |= {
    f"{module} {k}Storage": Word(f"{module} {k}Storage", data=np.dtype(v))
    for module in ("torch", "torch.cuda", "torch.storage")
    for k, v in _STORAGES.items()
}


def _find(name: str) -> Word | None:
    if name.split(" ")[0].split(".")[0] in _HARMLESS:
        return Word(name)
    return _WORDS.get(name)


def _id(pid: Any) -> tuple[np.dtype, str, int]:
    """(dtype, key, numbers) of a persistent id."""
    if len(pid) < 5 or pid[0] != "storage":
        raise Refused("a whole module, with its code" if pid[:1] == ("module",) else "something beside storages")
    _, kind, key, _, size, *view = pid
    dtype = kind.data if isinstance(kind, Word) else None
    if dtype is None or type(size) is not int or any(v is not None for v in view):
        raise Damaged("a storage of an unknown kind")
    return dtype, str(key), size


def _swapped(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bytes of numbers from a machine of the other byte order."""
    width = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return np.ascontiguousarray(data.reshape(-1, width)[:, ::-1]).reshape(-1)


# ---- The zip format.


def _read_zip(f: BinaryIO) -> Any:
    archive = zipfile.ZipFile(f)
    whole = np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    names = {i.filename.partition("/")[2]: i for i in archive.infolist()}
    if "constants.pkl" in names or any(n.startswith("code/") for n in names):
        raise Refused("a compiled program (TorchScript)")
    if "data.pkl" not in names:
        raise Damaged("a zip archive without data.pkl")

    def content(name: str, check: bool) -> np.ndarray:
        info = names.get(name)
        if info is None:
            raise Damaged(f"{name} is missing")
        if info.compress_type != zipfile.ZIP_STORED:  # packed again by someone
            return np.frombuffer(archive.read(info), np.uint8)
        # The data stand behind the entry's own header, whose two variable fields may differ from the directory's.
        header = bytes(whole[info.header_offset : info.header_offset + 30])
        start = info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        data = whole[start : start + info.file_size]
        if len(data) != info.file_size:
            raise Damaged(f"{name} is cut off")
        if check and zlib.crc32(data) != info.CRC:
            raise Damaged(f"{name} has a wrong checksum")
        return data

    pickled = content("data.pkl", check=False)
    # PyTorch can be told to write no true checksums.
    check = zlib.crc32(pickled) == names["data.pkl"].CRC
    swap = "byteorder" in names and bytes(content("byteorder", check)) == b"big"
    storages: dict[str, np.ndarray] = {}

    def storage(pid) -> _Storage:
        dtype, key, size = _id(pid)

        def data() -> np.ndarray:
            if key not in storages:
                x = content(f"data/{key}", check)
                storages[key] = _swapped(x, dtype) if swap else x
            return storages[key]

        return _Storage(dtype, size, data)

    return safe_pickle.load(pickled.tobytes(), _find, storage)


# ---- The format before it: pickles one after the other, then the storages.


def _read_legacy(f: BinaryIO) -> Any:
    start = f.read(20)
    f.seek(0)
    try:
        magic = safe_pickle.load(f, _find)
    except Unknown:
        raise
    except (Damaged, Refused):
        magic = None
    if magic != _LEGACY_MAGIC:
        raise Damaged(f"it starts with {start!r}, like none of PyTorch's formats")
    safe_pickle.load(f, _find)  # the version of the protocol, 1001 ever since
    swap = not safe_pickle.load(f, _find).get("little_endian", True)
    storages: dict[str, np.ndarray] = {}
    dtypes: dict[str, np.dtype] = {}

    def storage(pid) -> _Storage:
        dtype, key, size = _id(pid)
        dtypes[key] = dtype
        return _Storage(dtype, size, lambda: storages[key])

    found = safe_pickle.load(f, _find, storage)
    for key in safe_pickle.load(f, _find):
        if key not in dtypes:
            raise Damaged(f"nobody needs storage {key}")
        n = int.from_bytes(f.read(8), "big" if swap else "little") * dtypes[key].itemsize
        data = np.fromfile(f, np.uint8, n)
        if len(data) != n:
            raise Damaged(f"storage {key} is cut off")
        storages[key] = _swapped(data, dtypes[key]) if swap else data
    if missing := dtypes.keys() - storages.keys():
        raise Damaged(f"storage {min(missing)} is missing")
    return found


# ---- Writing.


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes {name: array} so that `torch.load` (also with weights_only=True) gives an ordered dict of tensors.

    Raises:
      UserError: an array has a dtype that PyTorch's files do not have here, or the file cannot be written.
    """
    path = Path(path)
    names = {np.dtype(v): k for k, v in _STORAGES.items() if k != "Untyped"} | {np.dtype(np.uint8): "Byte"}
    pickled = [b"\x80\x02", _EMPTY, b"("]
    for i, (name, x) in enumerate(tensors.items()):
        if x.dtype not in names:
            raise UserError(f"{path}: tensor {name!r} is {x.dtype}, for which PyTorch's files have no storage")
        strides = [math.prod(x.shape[j + 1 :]) for j in range(x.ndim)]
        pickled += [_text(name), _word("torch._utils _rebuild_tensor_v2"), b"("]
        pickled += [b"(", _text("storage"), _word(f"torch {names[x.dtype]}Storage"), _text(str(i)), _text("cpu")]
        pickled += [_number(x.size), b"tQ", _number(0), _numbers(x.shape), _numbers(strides), b"\x89", _EMPTY, b"tR"]
    pickled.append(b"u.")
    part = path.with_name(path.name + ".part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _add(archive, "data.pkl", b"".join(pickled))
            _add(archive, "byteorder", b"little")
            for i, x in enumerate(tensors.values()):
                _add(archive, f"data/{i}", np.ascontiguousarray(x).reshape(-1).view(np.uint8))
            _add(archive, "version", b"3\n")
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from None


def _add(archive: zipfile.ZipFile, name: str, data) -> None:
    """One entry whose data start at a multiple of 64 bytes, as PyTorch wants it to map files into memory."""
    info = zipfile.ZipInfo(f"archive/{name}")
    gap = -(archive.fp.tell() + 30 + len(info.filename) + 4) % _ALIGN
    info.extra = b"FB" + gap.to_bytes(2, "little") + b"Z" * gap
    archive.writestr(info, data)


def _text(x: str) -> bytes:
    x = x.encode()
    return b"X" + len(x).to_bytes(4, "little") + x


def _word(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _number(x: int) -> bytes:
    """A pickled integer below 2**63."""
    return b"\x8a\x08" + x.to_bytes(8, "little", signed=True)


def _numbers(xs) -> bytes:
    return b"(" + b"".join(_number(x) for x in xs) + b"t"


_EMPTY = _word("collections OrderedDict") + b")R"
