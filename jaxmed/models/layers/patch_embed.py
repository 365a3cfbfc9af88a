"""Volumes and images to tokens."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from jaxmed.core.errors import UserError
from jaxmed.models.layers.lean import dot
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


def pixels_of(x: Num[Array, "*n p"], patch: int, channels: int) -> Float[Array, "*n q"]:
    """Patches (row, column, channel) as float32 pixels of `channels` channels; one stored channel is repeated.

    Unsigned integers become value / largest value of their type; floats are as they are.

    Raises:
      UserError: signed integers, or patches of another size.
    """
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        x = x.astype(jnp.float32) / jnp.iinfo(x.dtype).max
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"patches are unsigned integers or floats, not {x.dtype}")
    if x.shape[-1] == patch * patch * channels:
        return x.astype(jnp.float32)
    if x.shape[-1] == patch * patch:
        return jnp.repeat(x.astype(jnp.float32), channels, axis=-1)
    raise UserError(
        f"patches have {x.shape[-1]} values: the model's, of {patch} x {patch} pixels and {channels} channels, have "
        f"{patch * patch * channels} (see patch and channels of config.model, and patch of config.input)"
    )


class TokenEmbed(nn.Module):
    """Patches that are cut already, each to one vector: the product of a stride-`patch` convolution."""

    patch: int
    channels: int
    width: int
    kernel_init: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Num[Array, "*n p"]) -> Float[Array, "*n e"]:
        fan_in = self.patch * self.patch * self.channels

        def init(key):
            flat = self.kernel_init(key, (fan_in, self.width), jnp.float32)
            return flat.reshape(self.patch, self.patch, self.channels, self.width)

        kernel = self.param("kernel", init).reshape(fan_in, self.width)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x = pixels_of(x, self.patch, self.channels).astype(self.dtype)
        y = dot(x, kernel.astype(self.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        return y + bias.astype(self.dtype).reshape(*[1] * (y.ndim - 1), -1)


def cut_patches(image: Num[Array, "b h w c"], patch: int) -> Num[Array, "b n p"]:
    """Images whose sides are multiples of `patch` as patches, row-major, each (row, column, channel)."""
    b, h, w, c = image.shape
    if h % patch or w % patch:
        raise UserError(f"an image of {h} x {w} pixels does not divide into patches of {patch}")
    x = image.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w // patch**2, patch * patch * c)


def join_patches(patches: Num[Array, "b n p"], grid: tuple[int, int], patch: int) -> Num[Array, "b h w c"]:
    """The inverse of `cut_patches`, for images of one grid of patches (height, width); more patches are padding."""
    b, (h, w) = patches.shape[0], grid
    x = patches[:, : h * w].reshape(b, h, w, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)
