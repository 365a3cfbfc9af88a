"""Heat maps: which patches spoke for a class, from the attention of the last block times its gradient.

R = I + mean over heads of max(gradient * attention, 0); of R the row of the class token, without the prefix tokens
(Chefer et al. 2021, arXiv 2012.09838, restricted to the last block, as HLIP's published heat maps are: spec section 6).
The identity only touches the class token's own entry, so it is never formed. Beyond the published map: several prefix
tokens, a last block at any level, padded studies, and models that pool their patches instead of reading a class token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.data import ops

HIDE = 0.25  # of a slice's range: what is less is not shown


def attention_gradient(
    features_fn: Callable[[Array], tuple[Array, Array]],
    probe: Float[Array, "g a r n"],
    score_fn: Callable[[Array], tuple[Array, Any]],
) -> tuple[Array, Any, Float[Array, "g a r n"], Float[Array, "g a r n"]]:
    """One forward pass, and the backward pass through what follows the attention weights of the last block.

    Args:
      features_fn: probe -> (features, attention weights); the probe, zeros, is added to those weights. Groups g are
        studies, scans or slabs, wherever the last block attends.
      score_fn: features (b, ...) -> (scores (b,), anything to pass on); the score of a study depends on its own
        features only. What is passed on may have chosen the score (the most likely class).

    Returns:
      features, what was passed on, weights, gradient of the scores by the weights.
    """
    features, back, weights = jax.vjp(features_fn, probe, has_aux=True)
    by_features, passed = jax.grad(lambda z: _total(score_fn(z)), has_aux=True)(features)
    return features, passed, weights, back(by_features)[0]


def _total(scored):
    scores, passed = scored
    return scores.sum(), passed


def of_patches(
    weights: Float[Array, "g a r n"], gradient: Float[Array, "g a r n"], *, prefix: int, row: int | None
) -> Float[Array, "g n-prefix"]:
    """The relevance of every patch in its group; padding has none.

    Args:
      weights, gradient: of all rows, or of the first ones.
      prefix: class and register tokens before the patches.
      row: the prefix token that the features are read from; None: they are pooled from the patches, whose rows are
        then added up.
    """
    spoke = jnp.maximum(gradient * weights, 0.0).mean(1)
    return spoke[:, prefix:, prefix:].sum(1) if row is None else spoke[:, row, prefix:]


def on_grid(relevance: Float[Array, "g m"], scans: int, grid: tuple[int, int, int]) -> Float[Array, "b s d h w"]:
    """Groups of patches, whatever they are, as (b, s, d, h, w): groups are consecutive, depth-major."""
    return relevance.reshape(-1, scans, *grid)


def on_voxels(
    relevance: Float[np.ndarray, "d h w"], patch: Sequence[int], shape: Sequence[int]
) -> Float[np.ndarray, "D H W"]:
    """Patches of one scan to its voxels: trilinear, half-pixel.

    Args:
      relevance: of the scan's whole patches.
      patch: voxels of a patch.
      shape: of the scan; voxels at its ends that fill no patch were never seen and get 0.
    """
    seen = [g * p for g, p in zip(relevance.shape, patch)]
    voxels, _ = ops.resize(relevance, seen)
    return np.pad(voxels, [(0, n - m) for n, m in zip(shape, seen)])


def to_show(voxels: Float[np.ndarray, "d h w"]) -> tuple[Float[np.ndarray, "d h w"], Bool[np.ndarray, "d h w"]]:
    """Each slice from its minimum to its maximum as 0 to 1, and where that is at least `HIDE`.

    A slice of one value shows nothing.
    """
    low, high = (f(voxels, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    scaled = np.divide(voxels - low, high - low, out=np.zeros_like(voxels), where=high > low)
    return scaled, scaled >= HIDE
