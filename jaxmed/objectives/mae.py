"""Masked autoencoding of images: what was removed is predicted (radiograph MAE spec, section 5).

He et al. 2022 (arXiv 2111.06377). Means are over the whole global batch: whatever the number of devices or of
microbatches, a patch (or an image) counts as much as any other. Padding counts for nothing.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.core import flops
from jaxmed.core.config import Config, call
from jaxmed.core.errors import UserError
from jaxmed.core.load import load, load_model
from jaxmed.core.objective import Objective

LOSSES = ("token_mean", "image_mean", "full")
# Under the root of a patch's variance.
NORM_EPS = 1e-6


def normalised(pixels: Float[Array, "b n p"]) -> Float[Array, "b n p"]:
    """Every patch with mean 0 and (unbiased) standard deviation 1; one of a single value becomes 0."""
    centred = pixels - pixels.mean(-1, keepdims=True)
    variance = jnp.square(centred).sum(-1, keepdims=True) / (pixels.shape[-1] - 1)
    return centred * jax.lax.rsqrt(variance + NORM_EPS)


def patch_errors(prediction: Float[Array, "b n p"], target: Float[Array, "b n p"]) -> Float[Array, "b n"]:
    """The mean squared error of every patch, float32."""
    return jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)).mean(-1)


def _mean(x, weight):
    return jnp.where(weight > 0, x * weight, 0.0).sum() / jnp.maximum(weight.sum(), 1.0)


def token_mean(errors: Float[Array, "b n"], mask: Float[Array, "b n"]) -> Float[Array, ""]:
    """The mean over all patches whose `mask` is 1; the standard loss of a masked autoencoder. 0 if there are none."""
    return _mean(errors, mask.astype(jnp.float32))


def image_mean(
    errors: Float[Array, "b n"], mask: Float[Array, "b n"], image: Int[Array, "b n"], images: int
) -> Float[Array, ""]:
    """The mean over images of the mean over their patches whose `mask` is 1; images without such patches are left out.

    Args:
      image: which of its row's `images` a patch is of.
    """
    member = jax.nn.one_hot(image, images, dtype=jnp.float32) * mask.astype(jnp.float32)[..., None]
    count = member.sum(1)
    total = jnp.einsum("bnk,bn->bk", member, jnp.where(mask > 0, errors, 0.0), precision=jax.lax.Precision.HIGHEST)
    return _mean(total / jnp.maximum(count, 1.0), (count > 0).astype(jnp.float32))


def reconstruction_loss(
    prediction: Float[Array, "b n p"],
    out: Mapping[str, Array],
    keep: Bool[Array, "b n"],
    *,
    loss: str,
    norm_pix: bool = False,
    images: int = 1,
) -> Float[Array, ""]:
    """One of `LOSSES` of what the model returns, over the patches `keep` (not padding) of rows of `images` images."""
    if loss == "full":
        return token_mean(patch_errors(prediction, out["pixels"]), keep)
    errors = patch_errors(prediction, normalised(out["pixels"]) if norm_pix else out["pixels"])
    mask = out["mask"] * keep
    if loss == "image_mean":
        return image_mean(errors, mask, out["image"], images)
    return token_mean(errors, mask)


def make(config: Config, spec: Mapping[Any, Mapping[str, jax.ShapeDtypeStruct]]) -> Objective:
    """See `build` for the options of `config.objective`; `config.model` is that of `models.mae`."""
    return call(build, config.objective, skip=("name",), model=config.model.to_dict(), spec=spec)


def build(
    *,
    model: Mapping[str, Any],
    spec: Mapping[Any, Mapping[str, jax.ShapeDtypeStruct]],
    loss: str = "token_mean",
    norm_pix: bool = False,
) -> Objective:
    """The objective on batches with "patch", "grid", "_mask" (and perhaps "noise", given instead of drawn).

    Args:
      model: {"name": "mae", options}.
      spec: shapes of the global batch of every bucket.
      loss: "token_mean", the mean squared error over all removed patches; "image_mean", over the images' means; "full",
        over all patches, removed or not (what the thesis trained with).
      norm_pix: the target of a removed patch is the patch normalised by its own mean and deviation.

    Raises:
      UserError: an unknown option, or batches without what the loss needs.
    """
    if loss not in LOSSES:
        raise UserError(f"config.objective.loss: {loss!r} is not one of {', '.join(LOSSES)}")
    if norm_pix and loss == "full":
        raise UserError("config.objective.norm_pix: loss 'full' compares pixels as they are; use token_mean")
    for bucket, shapes in spec.items():
        for key in ("patch", "grid", "_mask"):
            if key not in shapes:
                raise UserError(
                    f"config.objective: {key!r} is needed in the batches; bucket {bucket} has {', '.join(shapes)} "
                    "(see config.input.collate)"
                )
    net = load_model("config.model", model)
    frozen = load("models", model["name"]).FROZEN

    def init(rng):
        smallest = min(spec.values(), key=lambda shapes: math.prod(shapes["patch"].shape))
        row = {k: jnp.zeros((1, *smallest[k].shape[1:]), smallest[k].dtype) for k in ("patch", "grid")}
        return net.init({"params": rng, "mask": rng}, row["patch"], row["grid"])["params"], {}

    def apply(params, batch, rng):
        rngs = None if rng is None else {"mask": rng}
        return net.apply({"params": params}, batch["patch"], batch["grid"], noise=batch.get("noise"), rngs=rngs)

    def real(out, batch):
        return out["valid"] & (batch["_mask"] > 0)[:, None]

    def loss_fn(params, aux, batch, rng, step):
        del step
        prediction, out = apply(params, batch, rng)
        keep = real(out, batch)
        images = batch["grid"].shape[1] if batch["grid"].ndim == 3 else 1
        value = reconstruction_loss(prediction, out, keep, loss=loss, norm_pix=norm_pix, images=images)
        removed = jax.lax.stop_gradient(out["mask"] * keep)
        measurements = {"removed": removed.sum() / jnp.maximum(keep.sum(), 1), "tokens_used": keep.mean()}
        return value, (aux, measurements)

    def weight_fn(batch):
        """What a microbatch's mean is the mean of: patches or images."""
        grid = batch["grid"].reshape(batch["grid"].shape[0], -1, 2)
        sizes = grid.prod(-1) * (batch["_mask"] > 0)[:, None]
        n = batch["patch"].shape[1]
        kept = jnp.asarray(load("models.layers", "token_rows").keep_counts(net.mask_ratio, n))[sizes]
        counted = sizes if loss == "full" else sizes - kept
        return (counted > 0).sum() if loss == "image_mean" else counted.sum()

    def features(params, aux, batch):
        """{"cls", "mean"}: (b, e) of every image, or (b, k, e) of packed rows, nothing removed."""
        del aux
        cls, mean, _ = net.apply({"params": params}, batch["patch"], batch["grid"], method="features")
        return {"cls": cls, "mean": mean}

    def reconstruct(params, aux, batch):
        """{"prediction", "pixels" (b, n, p), "mask", "valid" (b, n)}; what is removed follows from `noise`, or is the
        same in every call."""
        del aux
        prediction, out = apply(params, batch, jax.random.key(0))
        return {"prediction": prediction, **{k: out[k] for k in ("pixels", "mask", "valid")}}

    @functools.cache
    def flops_of(shapes):
        rng = jax.eval_shape(lambda: jax.random.key(0))
        params, _ = jax.eval_shape(init, rng)
        return flops.count(lambda *args: apply(*args)[0], params, dict(shapes), rng)

    def flops_fn(shapes):
        return flops_of(tuple(sorted(shapes.items())))

    return Objective(
        init=init,
        loss_fn=loss_fn,
        predict_fns={"features": features, "reconstruct": reconstruct},
        weight_fn=weight_fn,
        flops_fn=flops_fn,
        groups=tuple((pattern, 0.0) for pattern in frozen),
    )
