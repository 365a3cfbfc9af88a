"""Starting a 3D tower from a vision transformer that was pre-trained on 2D images."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.core.errors import UserError
from jaxmed.models.layers import posemb

INFLATIONS = ("average", "central")


def inflate_kernel(
    kernel: Float[np.ndarray, "e c h w"], patch: tuple[int, int, int], inflation: str = "average", rescale: bool = False
) -> Float[np.ndarray, "e 1 d2 h2 w2"]:
    """A 2D patch kernel (PyTorch's layout) for patches of (d2, h2, w2) one-channel voxels.

    Resized in the plane (bicubic, half-pixel, no antialias), summed over colours, then spread over depth:
    "average" repeats it and divides by the depth, "central" puts it into slice d2 // 2.

    Args:
      rescale: divide by the growth of the area. The published models do not: going from 16 to 24 pixels their patch
        activations start about 2.25 times as large as those of the 2D model.
    """
    if inflation not in INFLATIONS:
        raise UserError(f"inflation={inflation!r} is not one of {', '.join(INFLATIONS)}")
    e, c, h, w = kernel.shape
    x = jnp.asarray(kernel, jnp.float32)
    if (h, w) != tuple(patch[1:]):
        x = jax.image.resize(x, (e, c, *patch[1:]), jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False)
        if rescale:
            x = x * (h * w / (patch[1] * patch[2]))
    x = np.asarray(x.sum(1))[:, None, None]
    if inflation == "average":
        return np.repeat(x, patch[0], axis=2) / np.float32(patch[0])
    out = np.zeros((e, 1, *patch), np.float32)
    out[:, :, patch[0] // 2] = x[:, :, 0]
    return out


def inflate_positions(
    table: Float[np.ndarray, "1 n e"], grid: tuple[int, int, int]
) -> Float[np.ndarray, "1 d2 h2 w2 e"]:
    """A table of a square 2D grid (resized bicubically, with antialias) plus sines and cosines over depth."""
    n, width = table.shape[1:]
    side = math.isqrt(n)
    if side * side != n:
        raise UserError(f"the 2D position table has {n} rows: that is no square grid")
    plane = jnp.asarray(table, jnp.float32).reshape(side, side, width)
    if grid[1:] != (side, side):
        plane = jax.image.resize(plane, (*grid[1:], width), jax.image.ResizeMethod.CUBIC, antialias=True)
    return posemb.sincos_1d(grid[0], width)[None, :, None, None] + np.asarray(plane)[None, None]


def from_2d_mae(
    state: Mapping[str, np.ndarray],
    *,
    patch: tuple[int, int, int],
    grid: tuple[int, int, int],
    inflation: str = "average",
    rescale: bool = False,
) -> dict[str, np.ndarray]:
    """The encoder of a 2D masked autoencoder (or ViT of the same names) as the 3D tower's tensors.

    Args:
      state: published tensors by name: cls_token, pos_embed, patch_embed.proj.*, blocks.*, norm.*; the decoder and
        anything else is left out.
      patch, grid: voxels of a patch and patches of the position table, (d, h, w).

    Returns:
      Published names and layouts below `visual.trunk.`, numpy: what `ports.hlip_visual` reads after adding "trunk.".
      The class token has taken in its row of the position table. Position table of scans and head are not in it.

    Raises:
      UserError: a tensor is missing, or the position table is of no square grid.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    missing = [k for k in needed if k not in state]
    if missing:
        raise UserError(f"the 2D weights lack {', '.join(missing)}: not the encoder of a 2D masked autoencoder")
    out = {k: np.asarray(x) for k, x in state.items() if k.startswith(("blocks.", "norm."))}
    token, table = np.asarray(state["cls_token"]), np.asarray(state["pos_embed"])
    if math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        token, table = token + table[:, :1], table[:, 1:]
    out["cls_token"] = token
    out["spatial_posemb"] = inflate_positions(table, tuple(grid))
    out["patch_embed.proj.weight"] = inflate_kernel(
        np.asarray(state["patch_embed.proj.weight"]), tuple(patch), inflation, rescale
    )
    out["patch_embed.proj.bias"] = np.asarray(state["patch_embed.proj.bias"])
    return out
