"""Volumes to patches."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from jaxmed.core.errors import UserError
from jaxmed.models.layers.transformer import torch_uniform


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, as cutting and one matrix product. What fills no patch is dropped.

    Integer voxels are cut as stored (a quarter of the bytes), then normalised:
    (clip((x - low) / (high - low), 0, 1) - mean) / std. Floats already are.
    """

    patch: tuple[int, int, int]
    width: int
    pixel_range: tuple[float, float] | None = None
    pixel_mean: float = 0.0
    pixel_std: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Num[Array, "b s d h w c"]) -> Float[Array, "b s d2 h2 w2 e"]:
        b, s, *voxels, c = x.shape
        (pd, ph, pw), (d, h, w) = self.patch, (n // p for n, p in zip(voxels, self.patch))
        if min(d, h, w) == 0:
            raise UserError(f"scans of {tuple(voxels)} voxels are smaller than one patch {self.patch}")
        x = x[:, :, : d * pd, : h * ph, : w * pw]
        x = x.reshape(b, s, d, pd, h, ph, w, pw, c).transpose(0, 1, 2, 4, 6, 3, 5, 7, 8)
        x = x.reshape(b, s, d, h, w, pd * ph * pw * c)
        if jnp.issubdtype(x.dtype, jnp.integer):
            if self.pixel_range is None and x.dtype != jnp.uint8:
                raise UserError(f"{x.dtype} voxels need pixel_range=(value that becomes 0, value that becomes 1)")
            low, high = self.pixel_range or (0.0, 255.0)
            x = jnp.clip((x.astype(jnp.float32) - low) / (high - low), 0.0, 1.0)
            x = (x - self.pixel_mean) / self.pixel_std
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (pd, ph, pw, c, self.width)).reshape(-1, self.width)
        bias = self.param("bias", init, (self.width,))
        y = jnp.einsum("bsdhwi,ie->bsdhwe", x.astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype).reshape(1, 1, 1, 1, 1, -1)
