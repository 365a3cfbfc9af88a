"""Pre-norm transformer blocks as vision transformers have them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmed.core.sharding import constrain
from jaxmed.models.layers.attention import attend, attend_with_weights
from jaxmed.models.layers.lean import REMAT, LayerNorm, dot, gelu
from jaxmed.models.layers.posemb import rotate

# PyTorch's trunc_normal_(std=0.02) cuts at +-2, a hundred standard deviations: a plain normal.
INIT_STD = 0.02
KERNEL_INIT = nn.initializers.normal(INIT_STD)


def layer_norm(eps: float, dtype, name: str) -> LayerNorm:
    return LayerNorm(epsilon=eps, dtype=dtype, name=name)


def torch_uniform(fan_in: int):
    """PyTorch's default initialiser of linear and convolution kernels and biases: uniform in +-1/sqrt(fan in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Mlp(nn.Module):
    """Linear, GELU (erf), linear."""

    hidden: int
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    kernel_init: Any = None  # None: normal with `init_std`

    @nn.compact
    def __call__(self, x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        width, init = x.shape[-1], self.kernel_init or nn.initializers.normal(self.init_std)
        x = nn.Dense(self.hidden, kernel_init=init, dtype=self.dtype, dot_general=dot, name="fc1")(x)
        x = gelu(x)
        return nn.Dense(width, kernel_init=init, dtype=self.dtype, dot_general=dot, name="fc2")(x)


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values."""

    heads: int
    impl: str = "xla"
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    kernel_init: Any = None  # None: normal with `init_std`

    @nn.compact
    def __call__(self, x: Float[Array, "b n e"], *, mask=None, rotary=None, probe=None, segment_ids=None, queries=None):
        """`rotary` = (cosine, sine) by token; with `probe` (added to the weights) also returns the weights;
        `segment_ids` (b n) as in `attend`; `queries`: only of so many first tokens."""
        b, n, width = x.shape
        init = self.kernel_init or nn.initializers.normal(self.init_std)
        qkv = nn.Dense(3 * width, kernel_init=init, dtype=self.dtype, dot_general=dot, name="qkv")(x)
        q, k, v = (
            constrain(y.reshape(b, n, self.heads, -1), "batch", None, "heads", None) for y in jnp.split(qkv, 3, axis=-1)
        )
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, n = q[:, :queries], queries or n
        weights = None
        if probe is None:
            y = attend(q, k, v, mask=mask, segment_ids=segment_ids, impl=self.impl)
        else:
            y, weights = attend_with_weights(q, k, v, mask=mask, add=probe)
        y = nn.Dense(width, kernel_init=init, dtype=self.dtype, dot_general=dot, name="proj")(y.reshape(b, n, width))
        return (y, weights) if probe is not None else y


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `drop` is what each of the two branches is multiplied by, per row: 0, or 1 / keep probability.
    `queries`: the result has only so many first tokens (all are seen by them).
    """

    heads: int
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    impl: str = "xla"
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    mlp_width: int = 0  # 0: width * mlp_ratio
    kernel_init: Any = None  # None: normal with `init_std`

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n e"],
        mask: Bool[Array, "b n"] | None = None,
        rotary: tuple[Float[Array, "#b n k"], Float[Array, "#b n k"]] | None = None,
        drop: tuple[Float[Array, "b"], Float[Array, "b"]] | None = None,
        probe: Float[Array, "b a n n"] | None = None,
        segment_ids: Int[Array, "b n"] | None = None,
        *,
        queries: int | None = None,
    ):
        def branch(y, i):
            return y if drop is None else y * drop[i][:, None, None].astype(y.dtype)

        y = layer_norm(self.eps, self.dtype, "norm1")(x)
        inner = (self.dtype, self.init_std, self.kernel_init)
        attention = Attention(self.heads, self.impl, *inner, name="attn")
        y = attention(y, mask=mask, rotary=rotary, probe=probe, segment_ids=segment_ids, queries=queries)
        y, weights = y if probe is not None else (y, None)
        x = x[:, :queries] + branch(y, 0)
        y = layer_norm(self.eps, self.dtype, "norm2")(x)
        x = x + branch(Mlp(self.mlp_width or int(x.shape[-1] * self.mlp_ratio), *inner, name="mlp")(y), 1)
        return (x, weights) if probe is not None else x


def recomputed(fields: Mapping[str, Any], params, remat: str, prevent_cse: bool = True) -> Callable:
    """A block of these fields as a function whose inner values the backward pass computes again, by a policy of
    `lean.REMAT`. (Inside a loop `prevent_cse` is not needed.)"""

    def block(*args, queries=None):
        def apply(params, *args):
            return Block(**fields, parent=None).apply({"params": params}, *args, queries=queries)

        return jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=prevent_cse)(params, *args)

    return block
