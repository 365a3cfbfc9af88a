"""Host memory: what the C library keeps of what was freed, and arrays that need no copy."""

import ctypes
import functools
import math

import numpy as np


@functools.cache
def _libc():
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt, libc.malloc_trim  # noqa: B018 (another C library lacks them)
    except (OSError, AttributeError):
        return None  # nothing to tune
    return libc


def keep_freed() -> None:
    """Reuses the buffers of records and batches: by default glibc maps and unmaps each, at 3x the cost of reading.

    All threads that start later share one arena: arenas of their own hold nothing larger than 64 MB.
    """
    if _libc():
        _libc().mallopt(-8, 1)  # M_ARENA_MAX
        _libc().mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped for itself
        _libc().mallopt(-1, -1)  # M_TRIM_THRESHOLD: what is free stays (the peak is the same)


def give_back() -> None:
    """Returns what is free to the system: after work that needed much memory once, such as compiling."""
    if _libc():
        _libc().malloc_trim(0)


def zeros(shape: tuple[int, ...], dtype) -> np.ndarray:
    """`np.zeros` that begins at a multiple of 64 bytes, so that it becomes a jax array on a CPU without being copied.

    Whoever gives the array to jax must not write to it any more.
    """
    return _aligned(np.zeros, shape, dtype)


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """`np.empty`, else as `zeros`: setting hundreds of megabytes to zero takes as long as decoding them."""
    return _aligned(np.empty, shape, dtype)


def _aligned(allocate, shape: tuple[int, ...], dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = allocate(size + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
