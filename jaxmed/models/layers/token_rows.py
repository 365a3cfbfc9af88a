"""Rows of tokens that hold one image or several: which token is whose, and where it goes when some are left out.

A row of n patches holds its images one after the other; `grid` (r, k, 2) has the patches (height, width) of each,
(0, 0) where there is none; what follows them is padding. A sequence is what blocks see of a row: of every image its
class token, then some of its patches, image after image. With k = 1 that is a padded image, with k > 1 a packed row
(Dehghani et al. 2023, arXiv 2307.06304): the same numbers either way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def keep_counts(ratio: float, n: int) -> np.ndarray:
    """(n + 1,) int32: how many of 0 .. n patches stay when this share is removed; int(patches * (1 - ratio)), with
    Python's double precision, as published (45 patches: 11; three patches: none)."""
    return np.array([int(k * (1 - ratio)) for k in range(n + 1)], np.int32)


def most_kept(ratio: float, n: int) -> int:
    """How many patches of a row of n can stay, however many images they are of."""
    return int(n * (1 - ratio) + 1e-6)


class Images(NamedTuple):
    """The images of every row. Padding belongs to image k, which has no patches."""

    grid: Int[Array, "r k+1 2"]  # patches (height, width)
    size: Int[Array, "r k+1"]  # patches
    start: Int[Array, "r k+1"]  # the first patch
    image: Int[Array, "r n"]  # of every patch
    index: Int[Array, "r n"]  # of every patch in its image, row-major
    valid: Bool[Array, "r n"]  # not padding


def images(grid: Int[Array, "r k 2"], n: int) -> Images:
    """The images of rows of n patches."""
    grid = jnp.pad(grid.astype(jnp.int32), ((0, 0), (0, 1), (0, 0)))
    size = grid[..., 0] * grid[..., 1]
    end = jnp.cumsum(size, axis=1)
    image = _which(end[:, :-1], n)
    start = end - size
    index = jnp.arange(n)[None] - jnp.take_along_axis(start, image, axis=1)
    return Images(grid, size, start, image, index, image < grid.shape[1] - 1)


def _which(end: Int[Array, "r k"], n: int) -> Int[Array, "r n"]:
    """In which of k stretches with these ends every position is."""
    return (jnp.arange(n)[None, :, None] >= end[:, None, :]).sum(-1, dtype=jnp.int32)


class Order(NamedTuple):
    """An order of the patches of every image among themselves."""

    patch: Int[Array, "r n"]  # first all of the first image, in their order, then all of the second, ...
    rank: Int[Array, "r n"]  # of every patch in its image


def in_order(x: Images) -> Order:
    """As they are."""
    patch = jnp.broadcast_to(jnp.arange(x.index.shape[1], dtype=jnp.int32)[None], x.index.shape)
    return Order(patch, x.index)


def by_noise(x: Images, noise: Float[Array, "r n"]) -> Order:
    """Ascending noise; the order of an image does not depend on what else is in the row."""
    rows = jnp.broadcast_to(jnp.arange(x.index.shape[1], dtype=jnp.int32)[None], x.index.shape)
    _, _, patch = jax.lax.sort((x.image, noise.astype(jnp.float32), rows), num_keys=2)
    rank = jnp.argsort(patch, axis=1).astype(jnp.int32) - jnp.take_along_axis(x.start, x.image, axis=1)
    return Order(patch, rank)


class Sequence(NamedTuple):
    """What blocks see: m places, image after image."""

    image: Int[Array, "r m"]  # of every place; k: nothing is here
    patch: Int[Array, "r m"]  # which patch of the row is here; 0 if none is
    index: Int[Array, "r m"]  # of that patch in its image; -1: the class token
    valid: Bool[Array, "r m"]  # is anything here?
    first: Int[Array, "r k+1"]  # where the class tokens are; -1: no such image
    place: Int[Array, "r n"]  # where every patch is; -1: left out


def sequence(x: Images, order: Order, counts: Int[Array, "r k+1"], m: int) -> Sequence:
    """The sequence of class tokens and the first `counts` patches of every image, in `order`; m places hold it."""
    k = x.size.shape[1] - 1
    there = x.size > 0
    length = jnp.where(there, 1 + counts, 0)
    end = jnp.cumsum(length, axis=1)
    start = end - length
    image = _which(end[:, :-1], m)
    local = jnp.arange(m)[None] - jnp.take_along_axis(start, image, axis=1)
    valid = image < k
    is_patch = valid & (local > 0)
    source = jnp.take_along_axis(x.start, image, axis=1) + local - 1
    patch = jnp.where(is_patch, jnp.take_along_axis(order.patch, jnp.where(is_patch, source, 0), axis=1), 0)
    index = jnp.where(is_patch, jnp.take_along_axis(x.index, patch, axis=1), -1)
    kept = x.valid & (order.rank < jnp.take_along_axis(counts, x.image, axis=1))
    place = jnp.where(kept, jnp.take_along_axis(start, x.image, axis=1) + 1 + order.rank, -1)
    return Sequence(image, patch, index, valid, jnp.where(there, start, -1), place)


def places_in(one: Sequence, other: Sequence) -> Int[Array, "r m"]:
    """For every place of `one`, where its token is in `other`; -1: nowhere."""
    of_class = jnp.take_along_axis(other.first, one.image, axis=1)
    of_patch = jnp.take_along_axis(other.place, one.patch, axis=1)
    return jnp.where(one.valid, jnp.where(one.index < 0, of_class, of_patch), -1)


def patches_in(one: Sequence) -> Int[Array, "r m"]:
    """For every place of `one`, the patch of the row that is there; -1: none."""
    return jnp.where(one.index >= 0, one.patch, -1)


@jax.custom_vjp
def move(x: Float[Array, "r n *e"], source: Int[Array, "r m"], back: Int[Array, "r n"]) -> Float[Array, "r m *e"]:
    """Row by row x[source], zeros where source is -1. `back` is the inverse (-1: unused), so that the gradient is a
    lookup too: no sums into places."""
    return _lookup(x, source)


def _lookup(x, source):
    taken = jnp.take_along_axis(x, jnp.maximum(source, 0)[..., None], axis=1, mode="clip")
    return jnp.where((source >= 0)[..., None], taken, jnp.zeros((), x.dtype))


def _move_backward(back, dy):
    return _lookup(dy, back), None, None


move.defvjp(lambda x, source, back: (_lookup(x, source), back), _move_backward)
