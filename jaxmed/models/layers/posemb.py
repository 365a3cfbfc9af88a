"""Position tables: sine/cosine, resampling as PyTorch does it, and rotary angles."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST


def sincos_1d(n: int, width: int) -> np.ndarray:
    """(n, width) float32: sines, then cosines, of position / 10000^(2i / width). `width` is even."""
    return _sincos(np.arange(n, dtype=np.float64), width)


def _sincos(position: np.ndarray, width: int) -> np.ndarray:
    frequency = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = position[..., None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def sincos_2d(h: int, w: int, width: int) -> np.ndarray:
    """(h, w, width) float32; channels: column, row. `width` is divisible by 4."""
    rows, columns = np.meshgrid(np.arange(h, dtype=np.float64), np.arange(w, dtype=np.float64), indexing="ij")
    return np.concatenate([_sincos(columns, width // 2), _sincos(rows, width // 2)], axis=-1)


def sincos_3d(d: int, h: int, w: int, width: int) -> np.ndarray:
    """(d, h, w, width) float32; channels: column, row, slab. `width` is divisible by 6."""
    axes = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in (d, h, w)), indexing="ij")
    return np.concatenate([_sincos(x, width // 3) for x in reversed(axes)], axis=-1)


def sincos_1d2d(d: int, h: int, w: int, width: int) -> np.ndarray:
    """(d, h, w, width) float32: a table over slabs plus a table over the plane. `width` is divisible by 4."""
    return sincos_1d(d, width)[:, None, None] + sincos_2d(h, w, width)[None]


def linear_weights(index, n_in: int, n_out) -> Float[Array, "... n_in"]:
    """Rows of the matrix that resamples `n_in` points to `n_out`: linear, half-pixel, no antialias.

    `index` (any shape) are the output points and `n_out` the output size (broadcast to them; may be traced).
    With n_out = n_in the rows are exactly those of the identity.
    """
    source = jnp.clip((index + 0.5) * (n_in / n_out) - 0.5, 0.0, n_in - 1.0)[..., None]
    points = jnp.arange(n_in, dtype=jnp.float32).reshape(*[1] * (source.ndim - 1), n_in)
    return jnp.maximum(0.0, 1.0 - jnp.abs(source - points))


def resample_plane(table: Float[Array, "d h w e"], h: int, w: int) -> Float[Array, "d h2 w2 e"]:
    """Bilinear in-plane resampling of every slab; the table itself if the size is right."""
    if table.shape[1] != h:
        weights = linear_weights(jnp.arange(h), table.shape[1], h)
        table = jnp.einsum("yh,dhwe->dywe", weights, table, precision=HIGHEST)
    if table.shape[2] != w:
        weights = linear_weights(jnp.arange(w), table.shape[2], w)
        table = jnp.einsum("xw,dhwe->dhxe", weights, table, precision=HIGHEST)
    return table


def resample_depth(
    table: Float[Array, "d h w e"], n: int, real: Int[Array, "*scans"] | None = None
) -> Float[Array, "*scans n h w e"]:
    """Linear resampling to `n` slabs, or, scan by scan, to its own number of `real` slabs (the rest is padding)."""
    if real is None:
        if table.shape[0] == n:
            return table
        return jnp.einsum("nd,dhwe->nhwe", linear_weights(jnp.arange(n), table.shape[0], n), table, precision=HIGHEST)
    index = jnp.arange(n).reshape(*[1] * real.ndim, n)
    weights = linear_weights(index, table.shape[0], jnp.maximum(real, 1)[..., None])
    return jnp.einsum("...nd,dhwe->...nhwe", weights, table, precision=HIGHEST)


def resample_sequence(
    table: Float[Array, "l e"], index: Int[Array, "#b n"], real: Int[Array, "#b"]
) -> Float[Array, "b n e"]:
    """Rows `index` of the sequence table; with more `real` scans than rows, of the table stretched to their number."""
    weights = linear_weights(index, table.shape[0], jnp.maximum(real, table.shape[0])[:, None])
    return jnp.einsum("bnl,le->bne", weights, table, precision=HIGHEST)


def sample_sequence(
    permutation: Int[Array, "#b m"], rank: Int[Array, "#b n"], real: Int[Array, "#b"], rows: int
) -> Int[Array, "b n"]:
    """Which row each scan (the `rank`-th real one of its study) gets: the first entries of the permutation that exist.

    `permutation` is over max(rows, scans of the bucket); a study with fewer scans than that has max(rows, real) rows
    and skips the entries beyond, as if they had not been drawn.
    """
    beyond = permutation >= jnp.maximum(real, rows)[:, None]
    order = jnp.argsort(beyond, axis=1, stable=True)
    b = max(order.shape[0], rank.shape[0])
    kept = jnp.take_along_axis(jnp.broadcast_to(permutation, (order.shape[0], permutation.shape[1])), order, axis=1)
    kept, rank = (jnp.broadcast_to(x, (b, x.shape[1])) for x in (kept, rank))
    return jnp.take_along_axis(kept, rank, axis=1)


def rotary_table(grid: tuple[int, int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (d*h*w, width) float32 of every patch, for heads of this width.

    A third of the channels (rounded down to pairs) turns with depth, height and width each, by the patch's index;
    pairs are adjacent; the remaining channels do not turn.
    """
    pairs = width // 3 // 2
    frequency = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    axes = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    angle = np.concatenate([np.repeat(x.reshape(-1, 1) * frequency, 2, axis=1) for x in axes], axis=1)
    angle = np.pad(angle, ((0, 0), (0, width - angle.shape[1])))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(
    x: Float[Array, "b n a k"], cosine: Float[Array, "#b n k"], sine: Float[Array, "#b n k"]
) -> Float[Array, "b n a k"]:
    """Turns adjacent pairs of channels; in float32, whatever the dtype of `x`."""
    pair = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pair[..., 1], pair[..., 0]], axis=-1).reshape(x.shape)
    out = x.astype(jnp.float32) * cosine[:, :, None] + turned * sine[:, :, None]
    return out.astype(x.dtype)
