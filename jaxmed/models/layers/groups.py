"""Tokens in groups: (groups, prefix + patches, width). Groups merge and split; patches keep their order."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmed.core.errors import UserError
from jaxmed.models.layers.pooling import masked_mean


def regroup(x: Shaped[Array, "g n *e"], groups: int) -> Shaped[Array, "{groups} m *e"]:
    """The same patches (or what belongs to them) in another number of groups.

    Raises:
      UserError: they cannot be split evenly (patches were dropped from larger groups than these).
    """
    if x.shape[0] * x.shape[1] % groups:
        raise UserError(f"{x.shape[1]} patches in each of {x.shape[0]} groups cannot be split over {groups} groups")
    return x.reshape(groups, x.shape[0] * x.shape[1] // groups, *x.shape[2:])


def join(prefix: Float[Array, "#g p e"], patches: Float[Array, "g n e"]) -> Float[Array, "g p+n e"]:
    """Prefix tokens (one set for all groups, or one each) before the patches."""
    prefix = jnp.broadcast_to(prefix, (patches.shape[0], *prefix.shape[1:]))
    return jnp.concatenate([prefix, patches], axis=1)


def move(
    x: Float[Array, "g p+n e"], prefix: int, groups: int, mask: Bool[Array, "g n"] | None
) -> Float[Array, "{groups} p+m e"]:
    """Merges or splits groups: prefix tokens are averaged over the groups that have a real patch, or copied.

    Args:
      prefix: number of prefix tokens p.
      groups: of the result.
      mask: 1 = real patch, in the old groups; None: all are.
    """
    old = x.shape[0]
    if old == groups:
        return x
    tokens, patches = x[:, :prefix], regroup(x[:, prefix:], groups)
    if old > groups:
        real = None if mask is None else mask.any(1).reshape(groups, -1)
        tokens = masked_mean(tokens.reshape(groups, -1, *tokens.shape[1:]), real)
    else:
        tokens = jnp.repeat(tokens, groups // old, axis=0)
    return join(tokens, patches)


def keep_patches(
    order: Int[Array, "g n"], mask: Bool[Array, "g n"] | None, rate: float
) -> tuple[Int[Array, "g k"], Bool[Array, "g k"] | None]:
    """The patches of every group that patch dropout keeps, and the mask of those that are real.

    k = max(1, int(n (1 - rate))); a group with fewer than n real patches keeps as many as it would without padding.
    """
    counts = np.array([0] + [max(1, int(n * (1.0 - rate))) for n in range(1, order.shape[1] + 1)])
    if mask is None:
        return order[:, : counts[-1]], None
    padding = jnp.take_along_axis(~mask, order, axis=1)
    order = jnp.take_along_axis(order, jnp.argsort(padding, axis=1, stable=True), axis=1)[:, : counts[-1]]
    return order, jnp.arange(counts[-1])[None] < jnp.asarray(counts)[mask.sum(1)][:, None]
