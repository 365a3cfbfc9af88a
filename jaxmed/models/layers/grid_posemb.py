"""Position tables of images of any grid, looked up token by token: no array has the shape of a grid.

A table is (1 + height * width, e): the class token's row, then a stored grid row-major. Resampling to an image's own
grid is that of `torch.nn.functional.interpolate(align_corners=False)` without antialias: bicubic with a = -0.75 whose
taps beyond the border are the border, or bilinear (radiograph MAE spec, section 4). With the stored grid itself the
rows come out unchanged.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.core.errors import UserError
from jaxmed.models.layers.posemb import sincos_2d

KINDS = ("bicubic", "bilinear", "flat1d")
_A = -0.75


def initial_table(height: int, width: int, features: int) -> np.ndarray:
    """(1 + height * width, features) float32: zeros for the class token, then sines and cosines of the column and of
    the row, the column first (an old swap that published weights rely on). `features` is divisible by 4."""
    grid = sincos_2d(height, width, features).reshape(-1, features)
    return np.concatenate([np.zeros((1, features), np.float32), grid])


def _source(index, n_in: int, n_out):
    """Where output point `index` of `n_out` lies among `n_in` points: the point before it and the fraction behind it.

    In integers, so that nothing is lost and n_out = n_in is exact. n_in * n_out < 2^30.
    """
    n_out = jnp.maximum(n_out, 1)
    doubled = (2 * index + 1) * n_in - n_out
    before = jnp.floor_divide(doubled, 2 * n_out)
    return before, (doubled - before * 2 * n_out).astype(jnp.float32) / (2 * n_out).astype(jnp.float32)


def _near(t):
    """The cubic kernel at distance t in [0, 1]."""
    return ((_A + 2) * t - (_A + 3)) * t * t + 1


def _far(t):
    """The cubic kernel at distance t in [1, 2]."""
    return ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A


def cubic_taps(index: Int[Array, "*n"], n_in: int, n_out: Int[Array, "#*n"]) -> list[tuple[Array, Array]]:
    """The four (point, weight) of every output point."""
    before, t = _source(index, n_in, n_out)
    weights = (_far(1 + t), _near(t), _near(1 - t), _far(2 - t))
    return [(jnp.clip(before + k - 1, 0, n_in - 1), w) for k, w in enumerate(weights)]


def linear_taps(index: Int[Array, "*n"], n_in: int, n_out: Int[Array, "#*n"]) -> list[tuple[Array, Array]]:
    """The two (point, weight) of every output point."""
    before, t = _source(index, n_in, n_out)
    return [(jnp.clip(before + k, 0, n_in - 1), w) for k, w in enumerate((1 - t, t))]


def rows_of(
    table: Float[Array, "n e"],
    grid: tuple[int, int],
    kind: str,
    index: Int[Array, "*t"],
    height: Int[Array, "*t"],
    width: Int[Array, "*t"],
) -> Float[Array, "*t e"]:
    """The row of the table for every token: `index` in its image (row-major) of (height, width) patches.

    Args:
      table: with the class token's row.
      grid: the stored grid.
      kind: "bicubic" or "bilinear" over the plane, or "flat1d": bicubic over the grid written as one line (what one
        reference does to its decoder's table; wrong for every grid but the stored one).
      index, height, width: -1 as `index` is the class token: the first row.

    Raises:
      UserError: an unknown `kind`.
    """
    if kind not in KINDS:
        raise UserError(f"positions: {kind!r} is not one of {', '.join(KINDS)}")
    inside = jnp.maximum(index, 0)
    if kind == "flat1d":
        pairs = cubic_taps(inside, grid[0] * grid[1], height * width)
    else:
        taps = cubic_taps if kind == "bicubic" else linear_taps
        row, column = jnp.divmod(inside, jnp.maximum(width, 1))
        rows, columns = taps(row, grid[0], height), taps(column, grid[1], width)
        pairs = [(y * grid[1] + x, a * b) for y, a in rows for x, b in columns]
    # The class token is a token whose whole weight is on the first row.
    points = jnp.stack([jnp.where(index < 0, 0, 1 + point) for point, _ in pairs])
    weights = jnp.stack([jnp.where(index < 0, float(k == 0), weight) for k, (_, weight) in enumerate(pairs)])

    # One lookup after the other: neither 16 rows of every token at once, nor 16 times the program to compile.
    def add(total, one):
        point, weight = one
        return total + weight[..., None] * jnp.take(table, point, axis=0, mode="clip"), None

    return jax.lax.scan(add, jnp.zeros((*index.shape, table.shape[-1]), table.dtype), (points, weights))[0]
