"""A vision transformer on the patches of images of any size, and the classifier that is one.

Takes rows of patches and the grid of every image (`layers.token_rows`): padded to a bucket, or several to a row, with
the same results. Dosovitskiy et al. 2021 (arXiv 2010.11929); details as in the radiograph MAE spec, section 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from jaxmed.core.errors import UserError
from jaxmed.core.sharding import constrain
from jaxmed.models.layers import attention, grid_posemb, token_rows
from jaxmed.models.layers.lean import REMAT, LayerNorm
from jaxmed.models.layers.patch_embed import TokenEmbed
from jaxmed.models.layers.transformer import KERNEL_INIT, Block, recomputed, torch_uniform

INITS = {"normal": KERNEL_INIT, "xavier": nn.initializers.xavier_uniform()}
POSITIONS = ("bicubic", "bilinear")
HIGHEST = jax.lax.Precision.HIGHEST

_IMAGENET = {"patch": 16, "channels": 3, "table": (14, 14)}
LARGE = {"width": 1024, "heads": 16, "depth": 24, "mlp_width": 4096}
HUGE = {"width": 1280, "heads": 16, "depth": 32, "mlp_width": 5120}
TINY = {"width": 64, "heads": 4, "depth": 2, "mlp_width": 128, "patch": 8, "table": (8, 8)}

# Published encoders, and a size for tests; what is absent is ViT-B for radiographs.
VARIANTS: dict[str, dict[str, Any]] = {
    "radiograph_base": {},
    "base_patch16_224": _IMAGENET,
    "large_patch16_224": {**_IMAGENET, **LARGE},
    "huge_patch14_224": {**_IMAGENET, **HUGE, "patch": 14, "table": (16, 16)},
    "tiny": TINY,
}


class Encoder(nn.Module):
    """From rows of patches to normalised tokens. Fields of every model that has it.

    Raises:
      UserError: fields that do not go together.
    """

    width: int = 768
    heads: int = 12
    depth: int = 12
    mlp_width: int = 3072
    patch: int = 48  # pixels of a side
    channels: int = 1  # one stored channel is repeated to these
    table: tuple[int, int] = (64, 64)  # patches (height, width) of the stored position table
    pos: str = "bicubic"  # or bilinear: how the table is resampled to an image's grid
    norm_eps: float = 1e-12  # Hugging Face's; the original MAE files go with 1e-6
    initial: str = "normal"  # kernels from scratch: normal (standard deviation 0.02) or xavier (uniform)
    attn_impl: str = "auto"
    dtype: Any = "float32"  # of activations; parameters are float32
    scan_blocks: bool = False  # lax.scan over the blocks: compiled once (needs remat)
    remat: str = "none"  # what the backward pass recomputes: none, full (each block), dots (all but matrix products)

    def __post_init__(self):
        object.__setattr__(self, "table", tuple(self.table))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self._check()
        super().__post_init__()

    def _need(self, true, message: str) -> None:
        if not true:
            raise UserError(f"{type(self).__module__.rpartition('.')[2]}: {message}")

    def _check(self) -> None:
        self._check_width(self.width, self.heads)
        self._need(len(self.table) == 2 and min(self.table) > 0, f"table={self.table} is no (height, width)")
        self._need(self.pos in POSITIONS, f"pos={self.pos!r} is not one of {', '.join(POSITIONS)}")
        self._need(self.initial in INITS, f"initial={self.initial!r} is not one of {', '.join(INITS)}")
        impls = attention.IMPLS
        self._need(self.attn_impl in impls, f"attn_impl={self.attn_impl!r} is not one of {', '.join(impls)}")
        self._need(self.remat in REMAT, f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        loop = not self.scan_blocks or self.remat != "none"
        self._need(loop, "scan_blocks keeps all residuals: set remat=full or dots")

    def _check_width(self, width: int, heads: int, of: str = "") -> None:
        self._need(width % heads == 0, f"{of}width={width} is not divisible by {of}heads={heads}")
        self._need(width % 4 == 0, f"{of}width={width} is not divisible by 4")

    @property
    def _kernel_init(self):
        return INITS[self.initial]

    def _block_fields(self, heads: int, mlp_width: int) -> dict[str, Any]:
        fields = {"heads": heads, "mlp_width": mlp_width, "eps": self.norm_eps, "impl": self.attn_impl}
        return {**fields, "dtype": self.dtype, "kernel_init": self._kernel_init}

    def setup(self):
        self.patch_embed = TokenEmbed(self.patch, self.channels, self.width, self._kernel_init, self.dtype)
        self.cls_token = self.param("cls_token", KERNEL_INIT, (1, 1, self.width))
        table = grid_posemb.initial_table
        self.pos_embed = self.param("pos_embed", lambda _: jnp.asarray(table(*self.table, self.width))[None])
        self.blocks = [Block(**self._block_fields(self.heads, self.mlp_width)) for _ in range(self.depth)]
        self.norm = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

    def _images(self, patch, grid) -> token_rows.Images:
        if patch.ndim != 3 or grid.shape[:1] != patch.shape[:1] or grid.shape[1:] not in ((2,), (grid.shape[1], 2)):
            raise UserError(
                f"patches (b, n, p) and grids (b, 2) or (b, k, 2) go together, not {patch.shape}, {grid.shape}"
            )
        return token_rows.images(grid[:, None] if grid.ndim == 2 else grid, patch.shape[1])

    def _places(self, table, stored_as: str, x: token_rows.Images, seq: token_rows.Sequence) -> Float[Array, "r m e"]:
        """Positions of all tokens of a sequence."""
        height, width = (jnp.take_along_axis(x.grid[..., i], seq.image, axis=1) for i in range(2))
        return grid_posemb.rows_of(table[0], self.table, stored_as, seq.index, height, width).astype(self.dtype)

    def _run(self, blocks, name: str, fields, x, seq: token_rows.Sequence, out) -> Float[Array, "r m e"]:
        """Blocks over a sequence: no image sees another, and nobody sees padding."""
        ids = seq.image if seq.first.shape[1] > 2 else None
        given = (seq.valid, None, None, None, ids)
        x = constrain(x, "batch", "tokens", "embed")
        out[f"{name}_input"] = x
        if self.remat == "none" or self.is_initializing():
            for i, block in enumerate(blocks):
                x = out[f"{name}_{i}"] = constrain(block(x, *given), "batch", "tokens", "embed")
            return x
        params = [self.variables["params"][f"{name}_{i}"] for i in range(len(blocks))]
        if not self.scan_blocks:
            for i, one in enumerate(params):
                x = constrain(recomputed(fields, one, self.remat)(x, *given), "batch", "tokens", "embed")
                out[f"{name}_{i}"] = x
            return x

        def step(x, one):
            x = recomputed(fields, one, self.remat, prevent_cse=False)(x, *given)
            return constrain(x, "batch", "tokens", "embed"), None

        return jax.lax.scan(step, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *params))[0]

    def _encode(self, patch, x: token_rows.Images, seq: token_rows.Sequence, table, out) -> Float[Array, "r m e"]:
        """The tokens of a sequence; only its patches are ever embedded."""
        taken = jnp.take_along_axis(patch, seq.patch[..., None], axis=1)
        tokens = self.patch_embed(taken)
        out["embedded"] = tokens
        tokens = jnp.where((seq.index < 0)[..., None], self.cls_token.astype(self.dtype), tokens)
        tokens = tokens + self._places(table, self.pos, x, seq)
        tokens = self._run(self.blocks, "blocks", self._block_fields(self.heads, self.mlp_width), tokens, seq, out)
        return self.norm(tokens)

    def _all(self, patch, grid) -> tuple[Float[Array, "r m e"], token_rows.Images, token_rows.Sequence, dict]:
        """Every patch of every image, in its order."""
        x, out = self._images(patch, grid), {}
        places = patch.shape[1] + x.size.shape[1] - 1
        seq = token_rows.sequence(x, token_rows.in_order(x), x.size, places)
        return self._encode(patch, x, seq, self._table(), out), x, seq, out

    def _table(self):
        return self.pos_embed

    def features(
        self, patch: Num[Array, "b n p"], grid: Int[Array, "b *k 2"]
    ) -> tuple[Float[Array, "b *k e"], Float[Array, "b *k e"], Float[Array, "b n e"]]:
        """What the whole of every image is encoded as; nothing is removed, and tokens keep their order.

        Returns:
          The class token of every image, the mean of its patches' tokens (zeros where there is no image), and the
          tokens of all patches (zeros where there is padding). float32.
        """
        tokens, x, seq, _ = self._all(patch, grid)
        tokens = tokens.astype(jnp.float32)
        classes = self._classes(tokens, seq, grid)
        tokens = token_rows.move(tokens, seq.place, token_rows.patches_in(seq))
        k = x.size.shape[1] - 1
        weight = jax.nn.one_hot(x.image, k, dtype=jnp.float32) / jnp.maximum(x.size[:, None, :k], 1)
        mean = jnp.einsum("rnk,rne->rke", weight, tokens, precision=HIGHEST)
        return classes, mean[:, 0] if grid.ndim == 2 else mean, tokens

    def _classes(self, tokens, seq, grid) -> Float[Array, "b *k e"]:
        """The class token of every image; zeros where there is none."""
        first = seq.first[:, :-1, None]
        classes = jnp.where(first >= 0, jnp.take_along_axis(tokens, jnp.maximum(first, 0), axis=1), 0)
        return classes[:, 0] if grid.ndim == 2 else classes


class Model(Encoder):
    """The classifier: a linear layer on the class token of the last norm; the position table is trained too."""

    classes: int = 2

    def _check(self) -> None:
        super()._check()
        self._need(self.classes > 1, f"classes={self.classes}: give at least 2")

    def setup(self):
        super().setup()
        init = torch_uniform(self.width)
        self.head = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=self.dtype)

    def __call__(
        self, patch: Num[Array, "b n p"], grid: Int[Array, "b *k 2"]
    ) -> tuple[Float[Array, "b *k c"], dict[str, Array]]:
        """Scores of images.

        Args:
          patch: rows of patches, each (row, column, channel); unsigned integers (largest value = 1) or floats.
          grid: patches (height, width) of each row's image, or of its k images one after the other; 0 x 0: none.

        Returns:
          logits: float32.
          out: blocks_input and blocks_<i> (b, m, e; class token first), norm, and classes (b, *k, e).
        """
        tokens, _, seq, out = self._all(patch, grid)
        out["norm"] = tokens
        out["classes"] = self._classes(tokens, seq, grid)
        return self.head(out["classes"]).astype(jnp.float32), out
