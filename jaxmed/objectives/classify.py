"""Classification of images: cross entropy of a classifier's scores (radiograph MAE spec, sections 4 and 7)."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.core import flops
from jaxmed.core.config import Config, call
from jaxmed.core.errors import UserError
from jaxmed.core.load import load_model
from jaxmed.core.objective import Objective


def targets(label: Float[Array, "*b k"], classes: int) -> tuple[Float[Array, "*b classes"], Float[Array, "*b"]]:
    """One-hot targets, and 1 where there is a label: one column is the number of the class, `classes` columns are 1 for
    the class and 0 for the others. NaN is no label.

    Raises:
      UserError: another number of columns.
    """
    if label.shape[-1] == 1:
        known = ~jnp.isnan(label[..., 0])
        return jax.nn.one_hot(jnp.where(known, label[..., 0], -1).astype(jnp.int32), classes), known.astype(jnp.float32)
    if label.shape[-1] != classes:
        raise UserError(
            f"config.model.classes={classes}, but batches have {label.shape[-1]} label columns (config.input.labels)"
        )
    known = ~jnp.isnan(label).any(-1)
    return jnp.where(known[..., None], label, 0.0), known.astype(jnp.float32)


def cross_entropy(
    logits: Float[Array, "*b classes"], target: Float[Array, "*b classes"], weight: Float[Array, "*b"]
) -> Float[Array, ""]:
    """The weighted mean of -sum target log softmax(logits); 0 without weight."""
    each = -(target * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)).sum(-1)
    return (each * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def make(config: Config, spec: Mapping[Any, Mapping[str, jax.ShapeDtypeStruct]]) -> Objective:
    """`config.objective` has no options; `config.model` is a classifier such as `models.vit`."""
    return call(build, config.objective, skip=("name",), model=config.model.to_dict(), spec=spec)


def build(*, model: Mapping[str, Any], spec: Mapping[Any, Mapping[str, jax.ShapeDtypeStruct]]) -> Objective:
    """The objective on batches with "patch", "grid", "label" and "_mask"; images without a label count for nothing.

    Raises:
      UserError: batches without what is needed.
    """
    for bucket, shapes in spec.items():
        for key in ("patch", "grid", "label", "_mask"):
            if key not in shapes:
                raise UserError(
                    f"config.objective: {key!r} is needed in the batches; bucket {bucket} has {', '.join(shapes)} "
                    "(see config.input)"
                )
    net = load_model("config.model", model)

    def init(rng):
        smallest = min(spec.values(), key=lambda shapes: math.prod(shapes["patch"].shape))
        row = {k: jnp.zeros((1, *smallest[k].shape[1:]), smallest[k].dtype) for k in ("patch", "grid")}
        return net.init(rng, row["patch"], row["grid"])["params"], {}

    def labelled(batch):
        target, known = targets(batch["label"], net.classes)
        rows = (batch["_mask"] > 0).reshape(-1, *[1] * (known.ndim - 1))
        return target, known * rows * (batch["grid"].prod(-1) > 0)

    def loss_fn(params, aux, batch, rng, step):
        del rng, step
        logits, _ = net.apply({"params": params}, batch["patch"], batch["grid"])
        target, weight = labelled(batch)
        right = (logits.argmax(-1) == target.argmax(-1)) * weight
        measurements = {"accuracy": right.sum() / jnp.maximum(weight.sum(), 1.0)}
        return cross_entropy(logits, target, weight), (aux, measurements)

    def classify(params, aux, batch):
        """{"logits": (b, classes), or (b, k, classes) of packed rows}."""
        del aux
        return {"logits": net.apply({"params": params}, batch["patch"], batch["grid"])[0]}

    def features(params, aux, batch):
        """{"cls", "mean"}: (b, e) of every image, or (b, k, e) of packed rows."""
        del aux
        cls, mean, _ = net.apply({"params": params}, batch["patch"], batch["grid"], method="features")
        return {"cls": cls, "mean": mean}

    @functools.cache
    def flops_of(shapes):
        params, _ = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
        return flops.count(lambda p, b: classify(p, {}, b), params, dict(shapes))

    def flops_fn(shapes):
        return flops_of(tuple(sorted(shapes.items())))

    return Objective(
        init=init,
        loss_fn=loss_fn,
        predict_fns={"classify": classify, "features": features},
        weight_fn=lambda batch: labelled(batch)[1].sum(),
        flops_fn=flops_fn,
    )
