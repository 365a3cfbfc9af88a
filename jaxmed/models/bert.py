"""BERT as a text tower: post-norm encoder, pooler, projection into the shared embedding.

Devlin et al. 2018 (arXiv 1810.04805); poolers and projections as CLIP wrappers of Hugging Face encoders have them.
Numerics: LayerNorm epsilon 1e-12, erf GELU, token type 0 always added, attention to ids != 0 only.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmed.core.errors import UserError
from jaxmed.core.sharding import constrain
from jaxmed.models.layers.attention import IMPLS, attend
from jaxmed.models.layers.lean import REMAT, LayerNorm, gelu
from jaxmed.models.layers.lora import Linear, uniform_fan_in

_BASE = dict(vocab_size=30_522, width=768, depth=12, heads=12, mlp_width=3072, max_positions=512)
VARIANTS: dict[str, dict[str, Any]] = {
    # BiomedBERT, abstracts and full texts: the text tower of the brain models.
    "bert_base": dict(**_BASE, hidden_dropout=0.1, attention_dropout=0.1),
    # The BERT inside CXR-BERT-specialized: the text tower of the chest models.
    "cxr_bert": dict(**_BASE, hidden_dropout=0.25, attention_dropout=0.25),
    "small": dict(vocab_size=30_522, width=192, depth=4, heads=3, mlp_width=768, max_positions=256),
    "tiny": dict(vocab_size=30_522, width=64, depth=2, heads=2, mlp_width=256, max_positions=128),
}
POOLERS = ("cls_last_hidden_state", "cls", "mean", "max")
PROJECTIONS = ("linear", "mlp", "none")
LORA_TARGETS = ("query", "key", "value", "out", "fc1", "fc2")


class Block(nn.Module):
    """Attention and MLP, each followed by the sum and then the norm (post-norm)."""

    heads: int
    mlp_width: int
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 8.0
    lora_targets: Sequence[str] = ()
    attn_impl: str = "xla"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t e"], keep: Bool[Array, "b t"], train: bool) -> Float[Array, "b t e"]:
        b, t, e = x.shape

        def linear(name, features):
            rank = self.lora_rank if name in self.lora_targets else 0
            return Linear(features, rank=rank, alpha=self.lora_alpha, dtype=self.dtype, name=name)

        norm = partial(LayerNorm, epsilon=1e-12)
        dropout = nn.Dropout(self.hidden_dropout, deterministic=not train)

        def split(y):
            return constrain(y.reshape(b, t, self.heads, e // self.heads), "batch", None, "heads", None)

        q, k, v = (split(linear(name, e)(x)) for name in ("query", "key", "value"))
        if train and self.attention_dropout:
            y = _attend_with_dropout(q, k, v, keep, self.attention_dropout, self.make_rng("dropout"))
        else:
            y = attend(q, k, v, mask=keep, impl=self.attn_impl)
        y = dropout(linear("out", e)(y.reshape(b, t, e)))
        x = norm(name="attention_norm")(x + y).astype(self.dtype)
        y = constrain(gelu(linear("fc1", self.mlp_width)(x)), "batch", None, "mlp")
        y = dropout(linear("fc2", e)(y))
        return constrain(norm(name="mlp_norm")(x + y).astype(self.dtype), "batch", None, "embed")


def _attend_with_dropout(q, k, v, keep, rate, rng):
    """Attention with dropout on its weights, which no fused kernel offers."""
    logits = jnp.einsum("bqak,bsak->baqs", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(keep[:, None, None, :], logits, jnp.finfo(jnp.float32).min), axis=-1)
    kept = jax.random.bernoulli(rng, 1.0 - rate, weights.shape)
    weights = jnp.where(kept, weights / (1.0 - rate), 0.0).astype(v.dtype)
    return jnp.einsum("baqs,bsak->bqak", weights, v)


class Model(nn.Module):
    """ids (b, t) -> features (b, z), not normalised.

    Attributes:
      vocab_size, width, depth, heads, mlp_width, max_positions: sizes of the encoder; `heads` divides `width`.
      out_dim: z; with projection "none" it must be `width`.
      pooler: "cls_last_hidden_state" (hidden state of token 0), "cls" (the same through BERT's tanh pooler), "mean" or
        "max" over the tokens with ids != 0.
      projection: "linear", "mlp" (linear to (width + out_dim) // 2, GELU, linear) or "none"; all without bias.
      hidden_dropout, attention_dropout: rates, active with train=True (flax rng stream "dropout").
      lora_rank, lora_alpha, lora_targets: low-rank adapters on these linear layers (see `LORA_TARGETS`); rank 0 is
        none. To train them alone, see `lock_groups`.
      scan_blocks: one compiled block for all (parameters stay unstacked); needs `remat`.
      remat: what the backward pass recomputes: "none", "full" (each block) or "dots" (all but matrix products).
      attn_impl: see `layers.attention.attend`; not used where attention_dropout is active.
      dtype: of activations; norms, softmax and features are float32.

    Raises:
      UserError: fields that do not go together.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_positions: int
    out_dim: int
    pooler: str = "cls_last_hidden_state"
    projection: str = "linear"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 8.0
    lora_targets: Sequence[str] = ("query", "value")
    scan_blocks: bool = False
    remat: str = "none"
    attn_impl: str = "auto"
    dtype: Any = "float32"

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # a list, where it comes from JSON
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        def need(true, message):
            if not true:
                raise UserError(f"bert: {message}")

        need(self.pooler in POOLERS, f"pooler={self.pooler!r} is not one of {', '.join(POOLERS)}")
        need(self.projection in PROJECTIONS, f"projection={self.projection!r} is not one of {', '.join(PROJECTIONS)}")
        unknown = sorted(set(self.lora_targets) - set(LORA_TARGETS))
        need(not unknown, f"lora_targets={unknown} must be among {', '.join(LORA_TARGETS)}")
        need(self.width % self.heads == 0, f"width={self.width} is not divisible by heads={self.heads}")
        need(
            self.projection != "none" or self.out_dim == self.width,
            f"out_dim={self.out_dim}, but projection='none' gives the width, {self.width}",
        )
        need(self.remat in REMAT, f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        need(
            not self.scan_blocks or self.remat != "none", "scan_blocks keeps every residual: set remat to full or dots"
        )
        need(self.attn_impl in IMPLS, f"attn_impl={self.attn_impl!r}: use {', '.join(IMPLS)}")

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b t"], *, train: bool = False
    ) -> tuple[Float[Array, "b z"], dict[str, Float[Array, "..."]]]:
        """Features, and {"hidden_0" (embeddings) .. "hidden_<depth>" (b, t, e), "pooled" (b, e)}.

        With `scan_blocks` only the last hidden state is given.

        Raises:
          UserError: the text is longer than `max_positions`.
        """
        if ids.shape[1] > self.max_positions:
            raise UserError(
                f"texts of {ids.shape[1]} tokens are longer than model.text.max_positions={self.max_positions}; "
                "shorten the texts of the input or use a tower with more positions"
            )
        keep = ids != 0
        x = self._embed(ids, train).astype(self.dtype)
        x = constrain(x, "batch", None, "embed")
        out = {"hidden_0": x}
        block = Block(
            self.heads,
            self.mlp_width,
            self.hidden_dropout,
            self.attention_dropout,
            self.lora_rank,
            self.lora_alpha,
            self.lora_targets if self.lora_rank else (),
            self.attn_impl,
            self.dtype,
            parent=None,
        )
        # A block is a pure function here, so that the same parameters can be looped over or stacked and scanned.
        params = [self._block_params(f"blocks_{i}", block, x, keep) for i in range(self.depth)]
        drawing = train and bool(self.hidden_dropout or self.attention_dropout)
        rngs = jax.random.split(self.make_rng("dropout"), self.depth) if drawing else None

        def apply(params, x, rng):
            return block.apply({"params": params}, x, keep, train, rngs=None if rng is None else {"dropout": rng})

        if self.remat != "none":
            apply = jax.checkpoint(apply, prevent_cse=not self.scan_blocks, policy=REMAT[self.remat])
        if self.scan_blocks:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            x, _ = jax.lax.scan(lambda x, p: (apply(p[0], x, p[1]), None), x, (stacked, rngs))
            out[f"hidden_{self.depth}"] = x
        else:
            for i in range(self.depth):
                x = apply(params[i], x, None if rngs is None else rngs[i])
                out[f"hidden_{i + 1}"] = x

        out["pooled"] = self._pool(x.astype(jnp.float32), keep)
        return self._project(out["pooled"]), out

    def _block_params(self, name, block, x, keep):
        if self.has_variable("params", name):  # `self.param` would trace `block.init` again to compare shapes
            return self.get_variable("params", name)
        return self.param(name, lambda rng: block.init(rng, x[:1], keep[:1], False)["params"])

    def _embed(self, ids, train):
        init = nn.initializers.normal(0.02)
        words = self.param("word_embeddings", init, (self.vocab_size, self.width))
        positions = self.param("position_embeddings", init, (self.max_positions, self.width))
        types = self.param("type_embeddings", init, (2, self.width))
        x = jnp.take(words, ids, axis=0) + (positions[: ids.shape[1]] + types[:1])[None]
        x = LayerNorm(epsilon=1e-12, name="embeddings_norm")(x)
        return nn.Dropout(self.hidden_dropout, deterministic=not train)(x)

    def _pool(self, x: Float[Array, "b t e"], keep: Bool[Array, "b t"]) -> Float[Array, "b e"]:
        if self.pooler == "cls_last_hidden_state":
            return x[:, 0]
        if self.pooler == "cls":
            return jnp.tanh(Linear(self.width, name="pooler")(x[:, 0]))
        # A row without any token (a padding example) pools to finite values, so that masking it out is enough.
        keep = keep[..., None]
        if self.pooler == "mean":
            return jnp.where(keep, x, 0.0).sum(1) / jnp.maximum(keep.sum(1), 1)
        return jnp.where(keep | ~keep.any(1, keepdims=True), x, -jnp.inf).max(1)

    def _project(self, x: Float[Array, "b e"]) -> Float[Array, "b z"]:
        linear = partial(Linear, use_bias=False, kernel_init=uniform_fan_in)
        if self.projection == "linear":
            x = linear(self.out_dim, name="proj")(x)
        elif self.projection == "mlp":
            x = linear((self.width + self.out_dim) // 2, name="proj_0")(x)
            x = linear(self.out_dim, name="proj_1")(gelu(x))
        return x


def lock_groups(
    depth: int,
    *,
    lock: str = "none",
    unlocked_layers: int = 0,
    projection: bool = True,
    prefix: str = "text/",
) -> tuple[tuple[str, float], ...]:
    """Which parameters of the tower stay fixed, as (regex, 0.0) groups for `core.optim.make`.

    A config holds the result: `config.optim.groups`. As published for the chest models ("all_but_norms"), it is
    ((r"^(?!.*(?:_norm/|^text/proj(_[01])?/))text/", 0.0),).

    Args:
      depth: number of blocks.
      lock: "none"; "all_but_norms", everything but the LayerNorms (as published, for the chest models); "all";
        "adapters", everything but the LayerNorms and the low-rank adapters; "lora_as_published", the reference's
        adapter mode, which by mistake freezes the adapters as well and so is "all_but_norms" under another name.
      unlocked_layers: so many of the last blocks train whatever `lock` says (and BERT's own pooler with them).
      projection: does the projection train (the newest reference release freezes it)?
      prefix: path of the tower in the parameter tree.

    Raises:
      UserError: an unknown lock, or more unlocked layers than blocks.
    """
    free = {
        "all_but_norms": ("_norm/",),
        "lora_as_published": ("_norm/",),
        "adapters": ("_norm/", "/lora_[ab]$"),
        "all": (),
    }
    if lock != "none" and lock not in free:
        raise UserError(f"lock: {lock!r} is not one of none, {', '.join(free)}")
    if not 0 <= unlocked_layers <= depth:
        raise UserError(f"unlocked_layers: {unlocked_layers} is not within the {depth} blocks of the tower")
    groups: list[tuple[str, float]] = []
    if not projection:
        groups.append((f"^{prefix}proj(_[01])?/", 0.0))
    if lock == "none":
        return tuple(groups)
    open_ = [*free[lock], *(f"^{prefix}blocks_{i}/" for i in range(depth - unlocked_layers, depth))]
    if unlocked_layers:
        open_.append(f"^{prefix}pooler/")
    if projection:
        open_.append(f"^{prefix}proj(_[01])?/")
    # One regex: whatever is in the tower and not open. (`groups` insists that every regex matches something.)
    closed = "|".join(open_)
    groups.append((f"^(?!.*(?:{closed})){prefix}" if closed else f"^{prefix}", 0.0))
    return tuple(groups)
