"""An exponential moving average of the parameters, as a wrapper around any objective."""

import jax
import jax.numpy as jnp

from jaxmed.core.objective import Objective


def with_ema(objective: Objective, decay: float) -> Objective:
    """Keeps ema <- decay * ema + (1 - decay) * params in `aux`, and predicts with it.

    The decay starts low, min(decay, (1 + step) / (10 + step)), so that short runs are not dominated by the
    initialisation.
    """

    def init(rng):
        params, aux = objective.init(rng)
        # A copy: the same buffer twice in a donated state is an error.
        return params, {"inner": aux, "ema": jax.tree.map(jnp.copy, params)}

    def loss_fn(params, aux, batch, rng, step):
        loss, (inner, measurements) = objective.loss_fn(params, aux["inner"], batch, rng, step)
        return loss, ({**aux, "inner": inner}, measurements)

    def after_update(params, aux, step):
        params, inner = objective.after_update(params, aux["inner"], step)
        d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda e, p: e + (1.0 - d).astype(e.dtype) * (p - e), aux["ema"], params)
        return params, {"inner": inner, "ema": ema}

    def on_ema(predict):
        return lambda params, aux, batch: predict(aux["ema"], aux["inner"], batch)

    changes = dict(
        init=init,
        loss_fn=loss_fn,
        after_update=after_update,
        predict_fns={name: on_ema(fn) for name, fn in objective.predict_fns.items()},
    )
    if objective.features_fn is not None:
        changes["features_fn"] = lambda params, aux, *rest: objective.features_fn(params, aux["inner"], *rest)
        changes["loss_from_features"] = lambda params, aux, *rest: objective.loss_from_features(
            params, aux["inner"], *rest
        )
    return objective._replace(**changes)
