"""Contrast of images with texts through two matrices, with noise so that random numbers matter."""

import jax
import jax.numpy as jnp

from jaxmed.core.objective import Objective
from jaxmed.core.sharding import constrain


def make(config, spec) -> Objective:
    width, noise, nan_at = config.model.width, config.objective.noise, config.objective.get("nan_at", -1)
    context = next(iter(spec.values()))["text"].shape[1]

    def init(rng):
        a, b = jax.random.split(rng)
        params = {
            "image": {"kernel": 0.1 * jax.random.normal(a, (64, width)), "bias": jnp.zeros(width)},
            "text": {"kernel": 0.1 * jax.random.normal(b, (context, width))},
        }
        return params, {}

    def embed_image(params, batch):
        real = (batch["scan_depths"] > 0).astype(jnp.float32)
        x = batch["image"].astype(jnp.float32).mean(2) / 255.0
        x = (x.reshape(*x.shape[:2], -1) * real[:, :, None]).sum(1) / jnp.maximum(real.sum(1), 1.0)[:, None]
        return constrain(x @ params["image"]["kernel"] + params["image"]["bias"][None], "batch", "embed")

    def embed_text(params, batch):
        return (batch["text"].astype(jnp.float32) / 30522.0) @ params["text"]["kernel"]

    def features_fn(params, aux, batch, rng, step):
        del aux
        image = embed_image(params, batch)
        image = image + noise * jax.random.normal(rng, image.shape)
        return image * jnp.where(step == nan_at, jnp.nan, 1.0), embed_text(params, batch)

    def loss_from_features(params, aux, features, batch, step):
        del params, aux, step
        image, text = features
        rows = batch["_mask"]
        logits = image @ text.T + jnp.where(rows > 0, 0.0, -1e9)[None]
        loss = -(jnp.diagonal(jax.nn.log_softmax(logits, -1)) * rows).sum() / jnp.maximum(rows.sum(), 1.0)
        return loss, {"rows": rows.sum()}

    def loss_fn(params, aux, batch, rng, step):
        features = features_fn(params, aux, batch, rng, step)
        loss, measurements = loss_from_features(params, aux, features, batch, step)
        return loss, (aux, measurements)

    return Objective(
        init,
        loss_fn,
        predict_fns={"embed_image": lambda params, aux, batch: {"image": embed_image(params, batch)}},
        additive=False,
        features_fn=features_fn,
        loss_from_features=loss_from_features,
        flops_fn=lambda spec: 2.0 * spec["image"].shape[0] * 64 * width,
    )
