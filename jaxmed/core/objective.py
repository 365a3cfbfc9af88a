"""The contract between an objective (what is minimised) and the trainer (who minimises it)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Params = Any  # nested dict of arrays
Aux = Any  # everything carried from step to step that is not differentiated (EMA teachers, statistics, queues)
Batch = dict[str, Any]  # arrays with the global batch as leading axis; `_mask (b,)` is 0 for padding rows


def keep(params: Params, aux: Aux, step) -> tuple[Params, Aux]:
    """The `after_update` of objectives that have nothing to do after an update."""
    del step
    return params, aux


class Objective(NamedTuple):
    """Pure functions; `objectives/<name>.py` has `make(config, spec) -> Objective`.

    `spec` is `{bucket: {key: jax.ShapeDtypeStruct}}` for the global batch of every bucket.
    """

    # (rng) -> (params, aux): called once, inside jit.
    init: Callable[[Any], tuple[Params, Aux]]
    # (params, aux, batch, rng, step) -> (loss, (aux, measurements)); measurements are scalars. The loss of a batch
    # without real rows (all of `_mask` 0) is finite.
    loss_fn: Callable[..., tuple[Any, tuple[Aux, dict[str, Any]]]]
    # (params, aux, step) -> (params, aux), after the optimiser: EMA teachers, clamps.
    after_update: Callable[..., tuple[Params, Aux]] = keep
    # name -> (params, aux, batch) -> {name: array}; what evaluators and `predict` call.
    predict_fns: Mapping[str, Callable[..., dict[str, Any]]] = MappingProxyType({})
    # May the loss of a batch be the mean over its microbatches? Contrastive losses may not; they give the two below.
    additive: bool = True
    # (microbatch) -> how much its loss counts in that mean, a scalar; None: its real rows (`_mask`). Give it where the
    # loss is a mean over something else, such as patches.
    weight_fn: Callable[[Batch], Any] | None = None
    # (params, aux, microbatch, rng, step) -> pytree of features, rows first.
    features_fn: Callable[..., Any] | None = None
    # (params, aux, features of the whole batch, batch, step) -> (loss, measurements). Only `params` that are not
    # in the towers (scales, biases) may be differentiated here; the towers' gradients arrive through `features`.
    loss_from_features: Callable[..., tuple[Any, dict[str, Any]]] | None = None
    # ({key: ShapeDtypeStruct}) -> FLOPs of one forward pass over that batch, for the MFU estimate.
    flops_fn: Callable[[dict[str, Any]], float] | None = None
    # (regex on the path, factor on the learning rate) that go with the model: frozen tables, locked towers. Those of
    # config.optim.groups come first; a regex may match nothing.
    groups: tuple[tuple[str, float], ...] = ()
