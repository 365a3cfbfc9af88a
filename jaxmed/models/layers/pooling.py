"""From tokens to one vector."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxmed.models.layers.attention import attend
from jaxmed.models.layers.transformer import KERNEL_INIT, Mlp, layer_norm


def masked_mean(x: Float[Array, "b n *e"], mask: Bool[Array, "b n"] | None) -> Float[Array, "b *e"]:
    """Mean over the tokens that are there, accumulated in float32; zeros if none is."""
    if mask is None:
        return x.mean(1, dtype=jnp.float32).astype(x.dtype)
    weight = mask.astype(jnp.float32).reshape(*mask.shape, *[1] * (x.ndim - 2))
    total = jnp.where(weight > 0, x.astype(jnp.float32), 0.0).sum(1)
    return (total / jnp.maximum(weight.sum(1), 1.0)).astype(x.dtype)


def _latent_init(key, shape, dtype=jnp.float32):
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) * shape[-1] ** -0.5


class AttentionPool(nn.Module):
    """One learned query attends over the tokens; then x + mlp(norm(x)) (the "MAP" head)."""

    heads: int
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n e"], mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b e"]:
        b, n, width = x.shape
        dense = partial(nn.Dense, kernel_init=KERNEL_INIT, dtype=self.dtype)
        latent = self.param("latent", _latent_init, (1, 1, width))
        q = dense(width, name="q")(latent)
        q = jnp.broadcast_to(q.reshape(1, 1, self.heads, -1), (b, 1, self.heads, width // self.heads))
        k, v = (y.reshape(b, n, self.heads, -1) for y in jnp.split(dense(2 * width, name="kv")(x), 2, axis=-1))
        # One query: there is no matrix of weights that a flash kernel could save.
        y = dense(width, name="proj")(attend(q, k, v, mask=mask).reshape(b, width))
        z = layer_norm(self.eps, self.dtype, "norm")(y)
        return y + Mlp(int(width * self.mlp_ratio), self.dtype, name="mlp")(z)
