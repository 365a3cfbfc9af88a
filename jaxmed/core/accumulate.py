"""The gradient of one global batch, whole or in microbatches: the same number either way."""

import jax
import jax.numpy as jnp

from jaxmed.core.errors import UserError
from jaxmed.core.objective import Objective


def split_rows(batch, microbatches: int):
    """(b, ...) -> (microbatches, b / microbatches, ...).

    Rows are dealt like cards (row r goes to microbatch r % microbatches), so that on a mesh every microbatch still has
    rows on every device and nothing moves between them.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)


def join_rows(parts):
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def value_and_grad(objective: Objective, params, aux, batch, rng, step, *, microbatches: int = 1):
    """Loss, new aux, measurements and gradient of `objective` on a global batch.

    With microbatches > 1 the activations of only one microbatch are alive at a time:
      * additive objectives: the mean of the microbatch gradients, each weighted by its real rows (`_mask`) or by
        `objective.weight_fn`;
      * others (contrastive): features of all microbatches first, then the loss and its gradient with respect to all
        features (and the scales), then each microbatch once more, with the same random numbers, to carry its
        features' gradient back to the parameters (Gao et al. 2021, arXiv 2101.06983). Nothing is approximated.

    Returns:
      (loss, (aux, measurements)), grads.

    Raises:
      UserError: the batch does not divide, or a non-additive objective has no `features_fn`.
    """
    if microbatches == 1:
        return jax.value_and_grad(objective.loss_fn, has_aux=True)(params, aux, batch, rng, step)

    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % microbatches:
        raise UserError(f"accumulate={microbatches} does not divide the batch of {rows}")
    parts = split_rows(batch, microbatches)
    rngs = jax.random.split(rng, microbatches)

    if objective.additive:
        rows_of = objective.weight_fn or (lambda part: part["_mask"].sum())
        weights = jax.vmap(rows_of)(parts).astype(jnp.float32)
        weights = weights / jnp.maximum(weights.sum(), 1.0)

        def one(carry, x):
            aux, total, grads = carry
            part, part_rng, weight = x
            (loss, (aux, measurements)), g = jax.value_and_grad(objective.loss_fn, has_aux=True)(
                params, aux, part, part_rng, step
            )
            grads = jax.tree.map(lambda a, b: a + weight * b, grads, g)
            return (aux, total + weight * loss, grads), jax.tree.map(lambda m: weight * m, measurements)

        zero = (aux, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (aux, loss, grads), measurements = jax.lax.scan(one, zero, (parts, rngs, weights))
        return (loss, (aux, jax.tree.map(lambda m: m.sum(0), measurements))), grads

    if objective.features_fn is None or objective.loss_from_features is None:
        raise UserError("accumulate > 1 needs an objective that is additive or has features_fn and loss_from_features")

    def features_of(params, part, part_rng):
        return objective.features_fn(params, aux, part, part_rng, step)

    features = jax.lax.map(lambda x: features_of(params, *x), (parts, rngs))

    def from_features(params, features):
        return objective.loss_from_features(params, aux, join_rows(features), batch, step)

    (loss, measurements), (grads, feature_grads) = jax.value_and_grad(from_features, argnums=(0, 1), has_aux=True)(
        params, features
    )

    def back(grads, x):
        part, part_rng, cotangent = x
        _, vjp = jax.vjp(lambda p: features_of(p, part, part_rng), params)
        return jax.tree.map(jnp.add, grads, vjp(cotangent)[0]), None

    grads, _ = jax.lax.scan(back, grads, (parts, rngs, feature_grads))
    return (loss, (aux, measurements)), grads
