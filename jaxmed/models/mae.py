"""A masked autoencoder for images of any size: most patches are removed, and predicted from the rest.

He et al. 2022 (arXiv 2111.06377), as the radiograph MAE spec (section 4) has it. Rows hold one image padded to a bucket
or several packed one after the other; padding is neither seen, nor removed, nor predicted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from jaxmed.models import vit
from jaxmed.models.layers import token_rows
from jaxmed.models.layers.lean import LayerNorm
from jaxmed.models.layers.patch_embed import pixels_of
from jaxmed.models.layers.transformer import KERNEL_INIT, Block

DECODER_POSITIONS = ("grid2d", "flat1d")
# Position tables are parameters (they are in every checkpoint), but never trained: for the optimiser's groups.
FROZEN = (r"(^|/)(decoder_)?pos_embed$",)
# Published models and sizes of ours; what is absent is ViT-B for radiographs. Weights that a reference trained at other
# sizes than its table's (the thesis) have learned its decoder's "flat1d" positions.
VARIANTS: dict[str, dict[str, Any]] = {
    "radiograph_base": {},
    "thesis_base": {"decoder_pos": "flat1d"},
    "mae_base": {**vit.VARIANTS["base_patch16_224"]},
    "mae_large": {**vit.VARIANTS["large_patch16_224"]},
    "mae_huge": {**vit.VARIANTS["huge_patch14_224"]},
    "tiny": {**vit.TINY, "decoder_width": 48, "decoder_heads": 3, "decoder_depth": 1, "decoder_mlp_width": 96},
}


class Model(vit.Encoder):
    """Encoder and decoder.

    Raises:
      UserError: fields that do not go together.
    """

    decoder_width: int = 512
    decoder_heads: int = 16
    decoder_depth: int = 8
    decoder_mlp_width: int = 2048
    decoder_pos: str = "grid2d"  # or flat1d: the reference's, resampled along the grid written as one line
    mask_ratio: float = 0.75

    def _check(self) -> None:
        super()._check()
        self._check_width(self.decoder_width, self.decoder_heads, "decoder_")
        known = ", ".join(DECODER_POSITIONS)
        self._need(self.decoder_pos in DECODER_POSITIONS, f"decoder_pos={self.decoder_pos!r} is not one of {known}")
        self._need(0 <= self.mask_ratio < 1, f"mask_ratio={self.mask_ratio} is not in [0, 1)")

    def setup(self):
        super().setup()
        width, init = self.decoder_width, self._kernel_init
        self.decoder_embed = nn.Dense(width, kernel_init=init, dtype=self.dtype)
        self.mask_token = self.param("mask_token", KERNEL_INIT, (1, 1, width))
        table = vit.grid_posemb.initial_table
        self.decoder_pos_embed = self.param("decoder_pos_embed", lambda _: jnp.asarray(table(*self.table, width))[None])
        fields = self._decoder_fields()
        self.decoder_blocks = [Block(**fields) for _ in range(self.decoder_depth)]
        self.decoder_norm = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
        values = self.patch * self.patch * self.channels
        self.decoder_pred = nn.Dense(values, kernel_init=init, dtype=self.dtype)

    def _decoder_fields(self) -> dict[str, Any]:
        return self._block_fields(self.decoder_heads, self.decoder_mlp_width)

    def _table(self):
        return jax.lax.stop_gradient(self.pos_embed)

    def __call__(
        self,
        patch: Num[Array, "b n p"],
        grid: Int[Array, "b *k 2"],
        *,
        noise: Float[Array, "b n"] | None = None,
        mask_ratio: float | None = None,
    ) -> tuple[Float[Array, "b n p"], dict[str, Array]]:
        """Removes patches and predicts all of them.

        Args:
          patch: rows of patches, each (row, column, channel); unsigned integers (largest value = 1) or floats.
          grid: patches (height, width) of each row's image, or of its k images one after the other; 0 x 0: none.
          noise: of every patch; the int(patches * (1 - mask_ratio)) smallest of an image stay. None: drawn from the rng
            stream "mask".
          mask_ratio: other than the model's.

        Returns:
          prediction: float32, as `patch` (what it says of padding means nothing).
          out: pixels (b, n, p) float32, what was to be predicted; mask (b, n) float32, 1 = removed; valid (b, n), not
            padding; image (b, n), which of its row's images a patch is of; rank (b, n) of a patch's noise in its image;
            latent (b, m, e), class token first, then the patches that stayed by ascending noise, image after image;
            blocks_input, blocks_<i>, decoder_blocks_input, decoder_blocks_<i> (the latter n + k tokens).
        """
        x, out = self._images(patch, grid), {}
        b, n = patch.shape[:2]
        k, ratio = x.size.shape[1] - 1, self.mask_ratio if mask_ratio is None else mask_ratio
        if noise is None:
            noise = jax.random.uniform(self.make_rng("mask"), (b, n))
        order = token_rows.by_noise(x, noise)
        counts = jnp.asarray(token_rows.keep_counts(ratio, n))[x.size]
        seen = token_rows.sequence(x, order, counts, k + token_rows.most_kept(ratio, n))
        every = token_rows.sequence(x, token_rows.in_order(x), x.size, k + n)
        latent = self._encode(patch, x, seen, self._table(), out)

        source = token_rows.places_in(every, seen)
        tokens = token_rows.move(self.decoder_embed(latent), source, token_rows.places_in(seen, every))
        tokens = jnp.where((source >= 0)[..., None], tokens, self.mask_token.astype(self.dtype))
        stored_as = "flat1d" if self.decoder_pos == "flat1d" else self.pos
        tokens = tokens + self._places(jax.lax.stop_gradient(self.decoder_pos_embed), stored_as, x, every)
        tokens = self._run(self.decoder_blocks, "decoder_blocks", self._decoder_fields(), tokens, every, out)
        tokens = token_rows.move(self.decoder_norm(tokens), every.place, token_rows.patches_in(every))
        removed = x.valid & (order.rank >= jnp.take_along_axis(counts, x.image, axis=1))
        out |= {"latent": latent, "valid": x.valid, "image": x.image, "rank": order.rank}
        out |= {"mask": removed.astype(jnp.float32), "pixels": pixels_of(patch, self.patch, self.channels)}
        return self.decoder_pred(tokens).astype(jnp.float32), out
