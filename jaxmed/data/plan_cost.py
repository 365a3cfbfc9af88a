"""What a masked autoencoder costs on one image of n patches (spec: radiograph MAE, section 3): FLOPs, forward."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from jaxmed.core.errors import UserError


@dataclass(frozen=True)
class Cost:
    """Sizes of the model; the defaults are those of the thesis (ViT-B, patch 48, one channel).

    Raises:
      UserError: a size is not positive, or the ratio not in [0, 1).
    """

    width: int = 768
    depth: int = 12
    mlp_width: int = 3072
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_mlp_width: int = 2048
    patch_dim: int = 48 * 48
    mask_ratio: float = 0.75

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            ratio = field.name == "mask_ratio"
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (0 <= value < 1 if ratio else value >= 1)
            ):
                raise UserError(f"input.plan_options.cost.{field.name}={value!r}: give the size of the model")

    def visible(self, n: Any) -> Any:
        """Tokens of the encoder: the visible patches of n, and the class token."""
        return np.floor(np.asarray(n, np.float64) * (1.0 - self.mask_ratio)) + 1.0

    def linear(self, n: Any, visible: Any, decoded: Any) -> Any:
        """FLOPs of everything but attention, for n patches, and tokens of encoder and decoder with class tokens."""
        encoder = 4 * self.width**2 + 2 * self.width * self.mlp_width
        decoder = 4 * self.decoder_width**2 + 2 * self.decoder_width * self.decoder_mlp_width
        around = n * self.patch_dim * self.width + visible * self.width * self.decoder_width
        around = around + decoded * self.decoder_width * self.patch_dim
        return 2.0 * (self.depth * encoder * visible + self.decoder_depth * decoder * decoded + around)

    def attention(self, visible_pairs: Any, decoded_pairs: Any) -> Any:
        """FLOPs of the two matrix products of attention, for pairs of tokens in encoder and decoder."""
        return 4.0 * (
            self.depth * self.width * np.asarray(visible_pairs, np.float64)
            + self.decoder_depth * self.decoder_width * np.asarray(decoded_pairs, np.float64)
        )

    def image_attention(self, n: Any) -> Any:
        """FLOPs of attention in one image of n patches."""
        return self.attention(self.visible(n) ** 2, (np.asarray(n, np.float64) + 1.0) ** 2)

    def image(self, n: Any) -> Any:
        """FLOPs of one image of n patches."""
        n = np.asarray(n, np.float64)
        return self.linear(n, self.visible(n), n + 1.0) + self.image_attention(n)
