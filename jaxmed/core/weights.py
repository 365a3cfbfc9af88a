"""Weights in safetensors files: names to arrays, without code and without the training state around them."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmed.core.errors import UserError

# The file of parameters in a folder of ported weights; its names are the paths of the parameter tree.
PARAMS = "params.safetensors"
_DTYPES = {
    np.dtype(k): v
    for k, v in {
        "float64": "F64", "float32": "F32", "float16": "F16", ml_dtypes.bfloat16: "BF16",
        "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
        "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    }.items()
}  # fmt: skip


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, one tensor in memory at a time; it appears under its name only when it is whole.

    Raises:
      UserError: a tensor has a dtype that the format does not have, or the file cannot be written.
    """
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise UserError(f"{path}: tensor {name!r} is {x.dtype}, which safetensors files cannot hold")
    # The widest first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {"__metadata__": dict(metadata or {})}, 0
    for name in names:
        x = tensors[name]
        header[name] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                f.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8))
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from None


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file.

    Raises:
      UserError: there is no such file, or it is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="np") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as a safetensors file ({' '.join(str(e).split())})") from None


def shapes(path: str | Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file; raises as `read` does."""
    try:
        with safe_open(path, framework="np") as f:
            return {name: list(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as a safetensors file ({' '.join(str(e).split())})") from None
