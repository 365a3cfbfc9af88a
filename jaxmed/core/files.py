"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed."""

import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxmed.core.errors import UserError


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` so that the file is whole or absent.

    Raises:
      UserError: the disk is full or not writable; names the file.
    """
    path = Path(path)
    unfinished = temporary(path)
    try:
        unfinished.write_bytes(data)
        commit(unfinished, path)
    except OSError as e:
        unfinished.unlink(missing_ok=True)
        raise cannot_write(path, e) from e


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """A .npz file by `write_file`."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    write_file(path, buffer.getvalue())


def temporary(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def commit(unfinished: Path, path: Path) -> None:
    """Flushes a finished temporary file to disk and gives it its name."""
    with open(unfinished, "rb") as f:
        os.fsync(f.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Is this the disk being full (or a quota, or a size limit)?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    forbidden = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
    fix = "choose another folder" if forbidden else "free space or choose another folder"
    return UserError(f"cannot write {path}: {reason}; {fix}, then run the same command again")
