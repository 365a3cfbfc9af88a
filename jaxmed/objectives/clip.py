"""Contrastive learning of images and reports: CLIP, SigLIP, and their sentence and dual forms (HLIP spec, section 4).

All losses are of the whole global batch: on a mesh their gradient is the true one, whatever the number of devices.
Radford et al. 2021 (arXiv 2103.00020), Zhai et al. 2023 (arXiv 2303.15343).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxmed.core import flops
from jaxmed.core.config import Config, call
from jaxmed.core.errors import UserError
from jaxmed.core.load import load
from jaxmed.core.objective import Objective
from jaxmed.core.sharding import constrain

LOSSES = ("clip", "siglip", "sentence", "dual")
MAX_LOG_SCALE = math.log(100.0)
# Finite, so that a masked pair has the gradient zero instead of not-a-number.
MASKED = -1e30


# ---- Losses of normalised features.


def _chunks(x: Float[Array, "b z"], chunk_rows: int):
    """[(rows (c, z), their numbers (c,))]: all at once, or (b / c) chunks for a scan.

    Rows are dealt like cards, so that on a mesh every chunk has rows on every device.
    """
    b = x.shape[0]
    rows = jnp.arange(b)
    if not chunk_rows or chunk_rows >= b:
        return x, rows
    if b % chunk_rows:
        raise UserError(f"objective.chunk_rows: {chunk_rows} does not divide the batch of {b}")
    return tuple(jnp.swapaxes(y.reshape(chunk_rows, b // chunk_rows, *y.shape[1:]), 0, 1) for y in (x, rows))


def _over_chunks(body, carry, image, chunk_rows):
    """`body(carry, (rows (c, z), their numbers)) -> carry, y (c,)`: carry and the y of all rows, in their order."""
    x, rows = _chunks(image, chunk_rows)
    if rows.ndim == 1:
        return body(carry, (x, rows))
    # The logits of one chunk are made again in the backward pass: no more than one chunk of them ever exists.
    carry, y = jax.lax.scan(jax.checkpoint(body), carry, (x, rows))
    return carry, jnp.swapaxes(y, 0, 1).reshape(-1)


def similarity(image: Float[Array, "c z"], text: Float[Array, "b z"]) -> Float[Array, "c b"]:
    """Cosines of normalised features, in full float32 on every backend."""
    return jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)


def _pairs(rows, mask, reports):
    """(c, b): which pairs (row, text) are in the loss."""
    own = rows[:, None] == jnp.arange(mask.shape[0])[None, :]
    keep = mask[rows][:, None] & mask[None, :]
    if reports is not None:
        same = (reports[rows][:, None, :] == reports[None, :, :]).all(-1)
        keep &= own | ~same
    return keep, own


def _as_mask(mask, b):
    return jnp.ones((b,), bool) if mask is None else mask > 0


def clip_terms(
    image: Float[Array, "b z"],
    text: Float[Array, "b z"],
    scale: Float[Array, ""] | float,
    *,
    mask: Float[Array, "b"] | None = None,
    reports: UInt[Array, "b k"] | None = None,
    chunk_rows: int = 0,
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """The cross-entropies of every row and of every column of scale * image text^T, the pairs on the diagonal.

    Args:
      image, text: normalised, float32; row i of one belongs to row i of the other.
      scale: exp(logit_scale).
      mask: rows with 0 are no positives (their terms are 0) and no negatives, as if they were not there.
      reports: rows that are equal here have the same report, and are no negatives of each other.
      chunk_rows: 0, or how many rows of logits exist at once (divides b).
    """
    b = image.shape[0]
    mask = _as_mask(mask, b)
    text = constrain(text, None, None)

    def body(columns, x):
        rows_image, rows = x
        keep, _ = _pairs(rows, mask, reports)
        logits = jnp.where(keep, scale * similarity(rows_image, text), MASKED)
        columns = jnp.logaddexp(columns, jax.nn.logsumexp(logits, axis=0))
        return columns, jax.nn.logsumexp(logits, axis=1)

    columns, rows = _over_chunks(body, jnp.full((b,), MASKED), image, chunk_rows)
    right = scale * (image * text).sum(-1)
    return jnp.where(mask, rows - right, 0.0), jnp.where(mask, columns - right, 0.0)


def clip_loss(image, text, scale, *, mask=None, **options) -> Float[Array, ""]:
    """The mean over rows and columns of `clip_terms` (same arguments)."""
    rows, columns = clip_terms(image, text, scale, mask=mask, **options)
    return 0.5 * (rows + columns).sum() / jnp.maximum(_as_mask(mask, image.shape[0]).sum(), 1)


def siglip_terms(
    image: Float[Array, "b z"],
    text: Float[Array, "b z"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    *,
    mask: Float[Array, "b"] | None = None,
    reports: UInt[Array, "b k"] | None = None,
    chunk_rows: int = 0,
) -> Float[Array, "b"]:
    """For every image, -sum log sigmoid(y (scale * cosine + bias)) over all texts, y = 1 for its own and -1 elsewhere.

    Arguments as in `clip_terms`.
    """
    mask = _as_mask(mask, image.shape[0])
    text = constrain(text, None, None)

    def body(carry, x):
        rows_image, rows = x
        keep, own = _pairs(rows, mask, reports)
        logits = scale * similarity(rows_image, text) + bias
        return carry, jnp.where(keep, jax.nn.softplus(jnp.where(own, -logits, logits)), 0.0).sum(1)

    return _over_chunks(body, None, image, chunk_rows)[1]


def siglip_loss(image, text, scale, bias, *, mask=None, **options) -> Float[Array, ""]:
    """The sum of `siglip_terms` (same arguments) over the number of images, not of pairs."""
    rows = siglip_terms(image, text, scale, bias, mask=mask, **options)
    return rows.sum() / jnp.maximum(_as_mask(mask, image.shape[0]).sum(), 1)


def dual_loss(
    image: Float[Array, "b 2 z"],
    sentence: Float[Array, "b z"],
    report: Float[Array, "b z"],
    scale: Float[Array, ""] | float,
    report_scale: Float[Array, ""] | float,
    *,
    sentence_reports: UInt[Array, "b k"] | None = None,
    reports: UInt[Array, "b k"] | None = None,
    **options,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """0.5 CLIP(first image token, sentence, scale) + 0.5 CLIP(second, report, report_scale), and the two by name."""
    of_sentence = clip_loss(image[:, 0], sentence, scale, reports=sentence_reports, **options)
    of_report = clip_loss(image[:, 1], report, report_scale, reports=reports, **options)
    return 0.5 * of_sentence + 0.5 * of_report, {"loss_sentence": of_sentence, "loss_report": of_report}


def same_text(ids: Int[Array, "b t"]) -> UInt[Array, "b 2"]:
    """Two 32-bit hashes per row of token ids. Rows with the same tokens in whatever order agree in both, as reports do
    whose sentences were shuffled; others do not, but for a chance of 2^-64."""
    result = []
    for multiplier in (0x9E3779B1, 0x85EBCA6B):
        mixed = (ids.astype(jnp.uint32) + jnp.uint32(1)) * jnp.uint32(0xC2B2AE35)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(multiplier)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0x27D4EB2F)
        result.append((mixed ^ (mixed >> 16)).sum(1, dtype=jnp.uint32))
    return jnp.stack(result, axis=1)


# ---- Measurements.


def diagonal_accuracy(
    image: Float[Array, "b z"], text: Float[Array, "b z"], *, mask=None, reports=None, chunk_rows: int = 0
) -> dict[str, Float[Array, ""]]:
    """How often a row's own text is strictly nearer than all others ("image_to_text"), and the other way round."""
    image, text = jax.lax.stop_gradient((image, text))
    b = image.shape[0]
    mask = _as_mask(mask, b)
    text = constrain(text, None, None)

    def body(columns, x):
        rows_image, rows = x
        keep, own = _pairs(rows, mask, reports)
        others = jnp.where(keep & ~own, similarity(rows_image, text), MASKED)
        return jnp.maximum(columns, others.max(0)), others.max(1)

    columns, rows = _over_chunks(body, jnp.full((b,), MASKED), image, chunk_rows)
    right = (image * text).sum(-1)
    n = jnp.maximum(mask.sum(), 1)
    return {
        "image_to_text": ((right > rows) & mask).sum() / n,
        "text_to_image": ((right > columns) & mask).sum() / n,
    }


def spread(x: Float[Array, "b z"], mask: Float[Array, "b"] | None = None) -> Float[Array, ""]:
    """The standard deviation of unit vectors over the batch, all directions together: 0 = all equal, 1 = centred."""
    x = jax.lax.stop_gradient(x)
    weight = _as_mask(mask, x.shape[0])[:, None] / jnp.maximum(_as_mask(mask, x.shape[0]).sum(), 1)
    mean = (weight * x).sum(0, keepdims=True)
    return jnp.sqrt((weight * jnp.square(x - mean)).sum())


# ---- The objective.


def make(config: Config, spec: Mapping[Any, Mapping[str, jax.ShapeDtypeStruct]]) -> Objective:
    """See `build` for the options of `config.objective`; `config.model` names the model (see `models.two_towers`)."""
    return call(build, config.objective, skip=("name",), model=config.model.to_dict(), spec=spec)


def build(
    *,
    model: Mapping[str, Any],
    spec: Mapping[Any, Mapping[str, jax.ShapeDtypeStruct]],
    loss: str = "clip",
    chunk_rows: int = 0,
    false_negatives: str = "keep",
    clamp_bias: bool = False,
    legacy_scale_grad: int = 1,
    lock_text: str = "none",
    unlocked_text_layers: int = 0,
    lock_text_projection: bool = False,
) -> Objective:
    """The contrastive objective on batches with "image", "text" and/or "sentence", "_mask" and perhaps "scan_depths"
    (and "draws": random draws given to the image tower instead of drawn, for parity).

    Args:
      model: {"name": module in jaxmed/models, options}; `two_towers`, or one with its contract.
      spec: shapes of the global batch of every bucket.
      loss: "clip" and "siglip" (last image token and report), "sentence" (CLIP of the first image token and one
        sentence of the report) or "dual" (both CLIPs, each with its own image token; `logit_bias` is the second
        log-scale).
      chunk_rows: 0, or how many rows of the b x b logits exist at once.
      false_negatives: "keep", or "ignore": studies whose texts are equal, whatever the order of sentences, do not
        repel each other.
      clamp_bias: clamp SigLIP's bias to [0, ln 100] like a log-scale, as one published branch does by mistake. (Log-
        scales are always clamped, the second one of "dual" too.)
      legacy_scale_grad: with accumulation, multiply the gradient of `logit_scale` and `logit_bias` by this number, as
        the reference does (by the number of microbatches) by mistake.
      lock_text, unlocked_text_layers, lock_text_projection: what of the text tower stays as it is: "none",
        "all_but_norms" (as published for the chest models), "all", "adapters" (LoRA); see `models.bert.lock_groups`.

    Raises:
      UserError: an unknown option, or batches without what the loss needs.
    """
    if loss not in LOSSES:
        raise UserError(f"config.objective.loss: {loss!r} is not one of {', '.join(LOSSES)}")
    if false_negatives not in ("keep", "ignore"):
        raise UserError(f"config.objective.false_negatives: {false_negatives!r} is not keep or ignore")
    needs = {"sentence": ("sentence",), "dual": ("sentence", "text")}.get(loss, ("text",))
    for bucket, shapes in spec.items():
        for key in ("image", "_mask", *needs):
            if key not in shapes:
                raise UserError(
                    f"config.objective.loss: {loss!r} needs {key!r} in the batches; bucket {bucket} has "
                    f"{', '.join(shapes)} (see config.input)"
                )
    if loss in ("siglip", "dual") and model.get("logit_bias_init") is None:
        initial = "-10.0" if loss == "siglip" else "math.log(1 / 0.07)"
        raise UserError(f"config.model.logit_bias_init is missing; loss {loss!r} starts it at {initial}")
    tokens = {"dual": 2}.get(loss)

    module = load("models", model["name"])
    net = call(module.Model, Config(model, "config.model"), skip=("name",))
    locks = dict(lock_text=lock_text, unlocked_text_layers=unlocked_text_layers)
    groups = module.frozen(model["image"], model["text"], **locks, lock_text_projection=lock_text_projection)

    def init(rng):
        smallest = min(spec.values(), key=lambda shapes: math.prod(shapes["image"].shape))
        row = {k: jnp.zeros((1, *x.shape[1:]), x.dtype) for k, x in smallest.items()}
        return net.init(rng, row["image"], row[needs[0]], row.get("scan_depths"))["params"], {}

    def encode(params, batch, rng=None):
        texts = [batch[k] for k in needs]
        length = max(x.shape[1] for x in texts)
        b = texts[0].shape[0]
        # Next to each other rather than one after the other: on a mesh no row moves.
        ids = jnp.stack([jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in texts], axis=1)
        (image, text), _ = net.apply(
            {"params": params},
            batch["image"],
            ids.reshape(b * len(needs), length),
            batch.get("scan_depths"),
            train=rng is not None,
            draws=batch.get("draws"),
            inner=False,
            rngs=None if rng is None else {"dropout": rng},
        )
        if image.ndim == 2:
            image = image[:, None]
        if tokens is not None and image.shape[1] != tokens:
            raise UserError(
                f"config.objective.loss: {loss!r} needs an image tower with {tokens} output tokens, "
                f"this one has {image.shape[1]}"
            )
        text = text.reshape(b, len(needs), -1)
        image, text = (constrain(x, "batch", None, "embed") for x in (image, text))
        return {"image": image, **{k: text[:, i] for i, k in enumerate(needs)}}

    def from_features(params, features, batch):
        mask = batch["_mask"]
        scale = jnp.exp(params["logit_scale"])
        reports = {k: same_text(batch[k]) if false_negatives == "ignore" else None for k in needs}
        options = dict(mask=mask, chunk_rows=chunk_rows)
        token = {"sentence": features["image"][:, 0], "text": features["image"][:, -1]}
        measurements = {"logit_scale": scale}
        if loss == "dual":
            second = jnp.exp(params["logit_bias"])
            value, parts = dual_loss(
                features["image"],
                features["sentence"],
                features["text"],
                scale,
                second,
                sentence_reports=reports["sentence"],
                reports=reports["text"],
                **options,
            )
            measurements |= {"logit_scale_report": second, **parts}
        else:
            (key,) = needs
            pair = (token[key], features[key], scale)
            if loss == "siglip":
                value = siglip_loss(*pair, params["logit_bias"], reports=reports[key], **options)
                measurements["logit_bias"] = params["logit_bias"]
            else:
                value = clip_loss(*pair, reports=reports[key], **options)
        for key in needs:
            accuracy = diagonal_accuracy(token[key], features[key], reports=reports[key], **options)
            prefix = "" if key == "text" else "sentence_"
            measurements |= {f"{prefix}accuracy/{k}": v for k, v in accuracy.items()}
            measurements |= {
                f"{prefix}spread/image": spread(token[key], mask),
                f"{prefix}spread/text": spread(features[key], mask),
            }
        return value, measurements

    def loss_fn(params, aux, batch, rng, step):
        del step
        value, measurements = from_features(params, encode(params, batch, rng), batch)
        return value, (aux, measurements)

    def features_fn(params, aux, batch, rng, step):
        del aux, step
        return encode(params, batch, rng)

    def loss_from_features(params, aux, features, batch, step):
        del aux, step
        if legacy_scale_grad != 1:  # the value stays, the gradient is multiplied
            scales = {k: params[k] for k in ("logit_scale", "logit_bias") if k in params}
            more = legacy_scale_grad - 1
            params = {**params, **{k: x + more * (x - jax.lax.stop_gradient(x)) for k, x in scales.items()}}
        return from_features(params, features, batch)

    def after_update(params, aux, step):
        del step
        clamped = ["logit_scale"]
        if loss == "dual" or (clamp_bias and "logit_bias" in params):
            clamped.append("logit_bias")
        return {**params, **{k: jnp.clip(params[k], 0.0, MAX_LOG_SCALE) for k in clamped}}, aux

    def embed_image(params, aux, batch):
        """{"image": normalised (b, z) or (b, p, z), "scale" (), and for "dual" "scale_report" ()}."""
        del aux
        (image, _), out = net.apply({"params": params}, batch["image"], None, batch.get("scan_depths"))
        scales = {"scale": jnp.exp(out["logit_scale"])}
        if loss == "dual":
            scales["scale_report"] = jnp.exp(out["logit_bias"])
        return {"image": image, **scales}

    def embed_text(params, aux, batch):
        """{"text": normalised (b, z)} of batch["text"], be it a report, a sentence or a prompt."""
        del aux
        return {"text": net.apply({"params": params}, None, batch["text"])[0][1]}

    @functools.cache
    def flops_of(shapes):
        rng = jax.eval_shape(lambda: jax.random.key(0))
        params, _ = jax.eval_shape(init, rng)
        return flops.count(encode, params, dict(shapes), rng)  # a training pass: patch dropout saves work

    def flops_fn(shapes):
        return flops_of(tuple(sorted(shapes.items())))

    return Objective(
        init=init,
        loss_fn=loss_fn,
        after_update=after_update,
        predict_fns={"embed_image": embed_image, "embed_text": embed_text},
        additive=False,
        features_fn=features_fn,
        loss_from_features=loss_from_features,
        flops_fn=flops_fn,
        groups=groups,
    )
