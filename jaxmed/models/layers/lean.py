"""Elementwise layers whose backward pass keeps little: their input, and recomputes the rest.

Differentiated as written, GELU and LayerNorm keep three or four arrays of the size of their input each, which are most
of a transformer's memory, and on CPUs of its time.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# A model's option `remat`: what the backward pass of a block recomputes (all of it; all but matrix products).
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_ROOT_HALF = math.sqrt(0.5)


def on_one_device() -> bool:
    """Is this traced for a single device? On a mesh, formulations that merge or cut axes would move data."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def dot(x: Float[Array, "*n i"], kernel: Float[Array, "i o"], dimensions, precision=None) -> Float[Array, "*n o"]:
    """What `nn.Dense(dot_general=...)` takes: the last axis of x by the first of the kernel.

    On one CPU the gradient of the kernel is one product of matrices as they lie in memory: as jax differentiates it,
    XLA copies an operand into its transpose, which takes as long as half of the product.
    """
    if jax.default_backend() != "cpu" or precision is not None or not on_one_device():
        return jax.lax.dot_general(x, kernel, dimensions, precision=precision)
    return _flat_dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _flat_dot(x, kernel):
    return x @ kernel


def _flat_dot_backward(saved, dy):
    x, kernel = saved
    return dy @ kernel.T, x.T @ dy


_flat_dot.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _flat_dot_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016, arXiv 1606.08415); not the tanh
    approximation."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * _ROOT_HALF))


def _gelu_backward(x, dy):
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return (dy * (0.5 * (1.0 + jax.lax.erf(x * _ROOT_HALF)) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _statistics(x, eps):
    """Two-pass, in float32: the fast formula loses digits on inputs far from zero."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


def _along_last(weight, x):
    return weight.astype(jnp.float32).reshape(*[1] * (x.ndim - 1), -1)


def _normalise(eps, dtype, x, scale, bias):
    mean, factor = _statistics(x, eps)
    y = (x.astype(jnp.float32) - mean) * (factor * _along_last(scale, x)) + _along_last(bias, x)
    return y.astype(dtype), (x, mean, factor, scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(eps, dtype, x, scale, bias):
    return _normalise(eps, dtype, x, scale, bias)[0]


def _norm_backward(eps, dtype, saved, dy):
    del eps, dtype
    x, mean, factor, scale = saved
    dy = dy.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * factor
    over = tuple(range(x.ndim - 1))
    g = dy * _along_last(scale, x)
    dx = factor * (g - g.mean(-1, keepdims=True) - unit * (g * unit).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (dy * unit).sum(over).astype(scale.dtype), dy.sum(over).astype(scale.dtype)


_norm.defvjp(_normalise, _norm_backward)


class LayerNorm(nn.Module):
    """Over the last axis, statistics in float32; the result has `dtype`."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _norm(self.epsilon, jnp.dtype(self.dtype), x, scale, bias)
