"""A linear layer that can carry a low-rank adapter."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling
from jaxtyping import Array, Float

# What `torch.nn.Linear` draws: uniform in +-1/sqrt(fan_in).
uniform_fan_in = variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Linear(nn.Module):
    """x W + b, plus (alpha / rank) x A B if rank > 0 (Hu et al. 2021, arXiv 2106.09685).

    Parameters `kernel (i, o)`, `bias (o,)`, `lora_a (i, rank)`, `lora_b (rank, o)`; B starts at zero, so that the
    adapter changes nothing until it is trained. Which of them train is the optimiser's business (parameter groups).
    """

    features: int
    use_bias: bool = True
    rank: int = 0
    alpha: float = 8.0
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        width = x.shape[-1]
        weights = [self.param("kernel", self.kernel_init, (width, self.features))]
        if self.rank:
            weights.append(self.param("lora_a", uniform_fan_in, (width, self.rank)))
            weights.append(self.param("lora_b", nn.initializers.zeros, (self.rank, self.features)))
        x, kernel, *adapter = (w.astype(self.dtype) for w in (x, *weights))
        y = x @ kernel
        if adapter:
            y = y + (self.alpha / self.rank) * ((x @ adapter[0]) @ adapter[1])
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y
