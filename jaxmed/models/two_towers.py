"""An image tower and a text tower with one shared embedding, and the scales of their similarity."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.core.errors import UserError
from jaxmed.core.load import load, load_model

LOG_SCALE_INIT = math.log(1 / 0.07)


def l2_normalize(x: Float[Array, "*n z"]) -> Float[Array, "*n z"]:
    """Unit vectors along the last axis, float32; a vector shorter than 1e-12 is divided by 1e-12 (and has no NaN in
    its gradient, even if it is zero)."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def make_tower(side: str, fields: Mapping[str, Any]) -> nn.Module:
    """`jaxmed.models.<name>.Model` with the fields of one of that module's VARIANTS and the others of `fields`.

    Raises:
      UserError: names the field config.model.<side>.* that is missing or unknown, or does not go with the others.
    """
    return load_model(f"config.model.{side}", fields, name=side)


def _as_wide(text: Mapping[str, Any], image_tower: nn.Module | None) -> Mapping[str, Any]:
    """The text tower's fields; without `out_dim` it is as wide as the image tower, if that says its `features`."""
    if "out_dim" in text or not hasattr(image_tower, "features"):
        return text
    return {**text, "out_dim": image_tower.features}


def make_text_tower(model: Mapping[str, Any]) -> nn.Module:
    """The text tower of a whole `config.model`, in which its width may follow from the image tower's.

    Raises:
      UserError: as `make_tower`.
    """
    tower = make_tower("image", model["image"]) if model.get("image") else None
    return make_tower("text", _as_wide(model["text"], tower))


def frozen(
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    lock_text: str = "none",
    unlocked_text_layers: int = 0,
    lock_text_projection: bool = False,
) -> tuple[tuple[str, float], ...]:
    """What is not trained, as (regex, 0.0) groups for the optimiser: position tables, and the locked text tower.

    Args:
      image, text: the towers as in `Model`.
      lock_text, unlocked_text_layers, lock_text_projection: see `lock_groups` of the text tower's module.

    Raises:
      UserError: a text tower that cannot be locked, or options that it does not have.
    """
    groups = []
    for side, fields in (("image", image), ("text", text)):
        tables = getattr(load("models", fields["name"]), "FROZEN", ())
        groups += [(f"^(?={side}/).*{pattern}", 0.0) for pattern in tables]
    if lock_text == "none" and not lock_text_projection:
        return tuple(groups)
    module = load("models", text["name"])
    if not hasattr(module, "lock_groups"):
        raise UserError(f"config.objective.lock_text: the text tower {text['name']!r} has no locks")
    depth = make_text_tower({"image": image, "text": text}).depth
    options = dict(lock=lock_text, unlocked_layers=unlocked_text_layers, projection=not lock_text_projection)
    return (*groups, *module.lock_groups(depth, **options))


class Model(nn.Module):
    """Normalised features of images and texts, in one parameter tree {"image", "text", "logit_scale", "logit_bias"}.

    Attributes:
      image, text: {"name": module in jaxmed/models, "variant": one of its VARIANTS, or none, and fields that differ}.
        The text tower's `out_dim` is the image tower's, if neither gives it.
      logit_scale_init: log of the scale that multiplies cosines; CLIP starts at ln(1/0.07), SigLIP at ln 10.
      logit_bias_init: initial value of `logit_bias`, or None for no such parameter. SigLIP's bias (-10), or the second
        log-scale of the dual objective (ln(1/0.07)): the published weights keep it under this name.
    """

    image: Mapping[str, Any]
    text: Mapping[str, Any]
    logit_scale_init: float = LOG_SCALE_INIT
    logit_bias_init: float | None = None

    @nn.compact
    def __call__(
        self,
        image: Array | None = None,
        text: Int[Array, "b t"] | None = None,
        scan_depths: Int[Array, "b s"] | None = None,
        *,
        train: bool = False,
        draws: Mapping[str, Any] | None = None,
        inner: bool = True,
    ) -> tuple[tuple[Array | None, Array | None], dict[str, Array]]:
        """Either side may be left out (None comes back in its place).

        Args:
          image, scan_depths, draws, inner: what the image tower takes; without `inner` it may leave out work on
            intermediates that the features do not need.
          text: token ids, 0 = padding.

        Returns:
          ((image features (b, z) or (b, p, z), text features (b, z)), out): float32, of unit length; out has the
          towers' intermediates as "image/..." and "text/...", and "logit_scale" and "logit_bias" as they are stored.

        Raises:
          UserError: a tower that cannot be made, or towers of different output widths.
        """
        out: dict[str, Array] = {}
        zimg = ztxt = None
        tower = make_tower("image", self.image) if self.image else None
        if image is not None:
            zimg, inner = tower(image, scan_depths, train=train, draws=draws, inner=inner)
            zimg = l2_normalize(zimg)
            out |= {f"image/{k}": v for k, v in inner.items()}
        if text is not None:
            ztxt, inner = make_tower("text", _as_wide(self.text, tower))(text, train=train)
            ztxt = l2_normalize(ztxt)
            out |= {f"text/{k}": v for k, v in inner.items()}
        if image is not None and text is not None and zimg.shape[-1] != ztxt.shape[-1]:
            raise UserError(
                f"the image tower gives {zimg.shape[-1]} features, the text tower {ztxt.shape[-1]}: "
                "model.image.out_dim (or its width, without a projection) and model.text.out_dim must be equal"
            )
        out["logit_scale"] = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init), ())
        if self.logit_bias_init is not None:
            out["logit_bias"] = self.param("logit_bias", nn.initializers.constant(self.logit_bias_init), ())
        return (zimg, ztxt), out
