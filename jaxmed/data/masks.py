"""Masks as run lengths: small enough for the header of a record, so that they never sit beside a model's input."""

import numpy as np
from jaxtyping import Bool

Array = np.ndarray


def to_runs(mask: Bool[Array, "*shape"]) -> list[int]:
    """Alternating lengths of 0s and 1s (first 0s, perhaps none), in C order."""
    flat = np.asarray(mask, bool).ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat.size and flat[0] else lengths


def from_runs(lengths: list[int], shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """The mask that `to_runs` wrote.

    Raises:
      ValueError: the lengths do not add up to the size of `shape`.
    """
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(shape)
