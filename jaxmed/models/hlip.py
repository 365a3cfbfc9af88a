"""HLIP's vision tower: one ViT over every scan of a study, attending inside slices, scans and the whole study by turns.

Source: Zhao et al., "Towards Scalable Language-Image Pre-training for 3D Medical Imaging" (arXiv 2505.21862), and its
released models. A "slice" is one slab of patches (6-16 images). Tokens are (groups, prefix + patches, width) with
groups = studies x scans x slabs, studies x scans or studies; when groups merge, their prefix tokens are averaged, when
they split, copied. Ragged studies are padded to a bucket and masked: results are those of the unpadded study.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from jaxmed.core.errors import UserError
from jaxmed.core.sharding import constrain
from jaxmed.models.layers import attention, posemb
from jaxmed.models.layers.groups import join, keep_patches, move, regroup
from jaxmed.models.layers.lean import REMAT
from jaxmed.models.layers.patch_embed import PatchEmbed
from jaxmed.models.layers.pooling import AttentionPool, masked_mean
from jaxmed.models.layers.transformer import Block, layer_norm, recomputed, torch_uniform

LEVELS = ("slice", "scan", "study")
POOLS = ("token", "map", "dinotxt")
# Position tables are parameters (they are in every checkpoint), but never trained: for the optimiser's groups.
FROZEN = (r"(^|/)spatial_posemb$", r"(^|/)sequential_posemb$")
_CHEST = {"img_size": (112, 336, 336), "patch": (8, 24, 24), "levels": ("slice", "slice", "scan")}
_BRAIN = {"img_size": (48, 224, 224), "levels": ("scan", "scan", "study"), "max_num_scans": 40}
_SLICE_SCAN_STUDY = ("slice", "scan", "study")
_DINOTXT = {"pool": "dinotxt", "out_dim": 768, "keep_token_axis": True, "posemb_init": "1d2d"}
_DUAL = {**_DINOTXT, "reg_tokens": 1, "max_num_scans": 0}
_LARGE = {"width": 1024, "heads": 16, "depth": 24}

# Published models by the names of their configurations (trunk widths that are absent are ViT-B), then sizes of ours.
VARIANTS: dict[str, dict[str, Any]] = {
    "clip_vit_base_singlescan_h2_token2744": _CHEST,
    "siglip_vit_base_singlescan_h2_token2744": {**_CHEST, "pool": "map", "out_dim": 768, "proj": "none"},
    "clip_vit_base_multiscan_h2_token588": {**_BRAIN, "patch": (16, 16, 16)},
    "clip_vit_base_multiscan_h2_token1176": {**_BRAIN, "patch": (8, 16, 16)},
    "clip_vit_base_multiscan_h2_token1568": {**_BRAIN, "patch": (6, 16, 16)},
    "clip_vit_base_multiscan_h3_token1176": {**_BRAIN, "patch": (8, 16, 16), "levels": _SLICE_SCAN_STUDY},
    "clip_vit_base_multiscan_h2_dinotxt1176": {**_BRAIN, **_DINOTXT, "patch": (8, 16, 16)},
    "clip_vit_base_multiscan_h2_dinotxt1568": {**_BRAIN, **_DINOTXT, "patch": (6, 16, 16)},
    # The release of 2025-10-08.
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dinotxt1568": {
        **_BRAIN, **_DINOTXT, "patch": (6, 16, 16), "max_num_scans": 0,
    },
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568": {**_BRAIN, **_DUAL, "patch": (6, 16, 16)},
    "ablate_seqposemb_clip_vit_base_multiscan_h3_dualdinotxt1568": {
        **_BRAIN, **_DUAL, "patch": (6, 16, 16), "levels": _SLICE_SCAN_STUDY,
    },
    "ablate_seqposemb_clip_vit_large_multiscan_h2_dualdinotxt1568": {
        **_BRAIN, **_DUAL, **_LARGE, "patch": (6, 16, 16), "levels": (*["scan"] * 5, "study"),
    },
    "ablate_seqposemb_clip_vit_large_multiscan_h3_dualdinotxt1568": {
        **_BRAIN, **_DUAL, **_LARGE, "patch": (6, 16, 16), "levels": (*["slice"] * 4, "scan", "study"),
    },
    "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568": {
        **_BRAIN, **_DINOTXT, "patch": (6, 16, 16), "max_num_scans": 0, "rope": True,
    },
    "vit_small_h3": {
        "width": 384, "heads": 6, "img_size": (48, 224, 224), "patch": (8, 16, 16), "levels": _SLICE_SCAN_STUDY,
    },
    "tiny": {
        "width": 96, "heads": 3, "depth": 6, "img_size": (16, 64, 64), "patch": (4, 16, 16), "out_dim": 96,
        "levels": _SLICE_SCAN_STUDY,
    },
}  # fmt: skip
# Names on the model hub.
VARIANTS["hlip-2025-10-08"] = VARIANTS["ablate_seqposemb_clip_vit_base_multiscan_h2_dinotxt1568"]
VARIANTS["clip_vit_base_scan_study_dualdinotxt1568"] = VARIANTS[
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568"
]
VARIANTS["clip_vit_base_slice_scan_study_dualdinotxt1568"] = VARIANTS[
    "ablate_seqposemb_clip_vit_base_multiscan_h3_dualdinotxt1568"
]
VARIANTS["clip_vit_large_scan_study_dualdinotxt1568"] = VARIANTS[
    "ablate_seqposemb_clip_vit_large_multiscan_h2_dualdinotxt1568"
]
VARIANTS["clip_vit_large_slice_scan_study_dualdinotxt1568"] = VARIANTS[
    "ablate_seqposemb_clip_vit_large_multiscan_h3_dualdinotxt1568"
]
VARIANTS["clip_vit_base_slice_scan_dualdinotxt2744"] = {**_CHEST, **_DUAL, "out_dim": 512}


class Sizes(NamedTuple):
    """Of one batch, in units of groups: b studies of s scans of d slabs."""

    b: int
    s: int
    d: int

    def groups(self, level: str) -> int:
        return {"slice": self.b * self.s * self.d, "scan": self.b * self.s, "study": self.b}[level]


class Model(nn.Module):
    """The vision tower; by default ViT-B on brain studies.

    Raises:
      UserError: fields that do not go together.
    """

    img_size: tuple[int, int, int] = (48, 224, 224)  # voxels (d, h, w) that the stored position table is for
    patch: tuple[int, int, int] = (8, 16, 16)  # voxels (d, h, w); what does not fill a patch is dropped
    channels: int = 1
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    levels: tuple[str, ...] = _SLICE_SCAN_STUDY  # of the first blocks; repeated to `depth`
    depth: int = 12
    max_num_scans: int = 0  # rows of the table of scan positions; 0 or 1: no table
    reg_tokens: int = 0  # prefix tokens beside the class token
    pool: str = "token"  # token: class token; map: attention pooling; dinotxt: [prefix, mean of patches]
    proj: str = "linear"  # linear (bias-free, to out_dim) or none (out_dim is the pooled width)
    out_dim: int = 512
    keep_token_axis: bool = False  # (b, p, z) instead of (b, z)
    rope: bool = False  # rotary angles on top of the position table
    patch_drop: float = 0.0  # share of patches left out in training
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0
    scan_positions: str = "batch"  # training draws scan positions once per "batch" (as published) or per "study"
    legacy_positions: bool = False  # published behaviour: drawn whenever the batch is not 1, in evaluation too
    init_std: float = 0.02  # of the blocks' kernels; width ** -0.5 (0.1 for 96) lets narrow towers start much faster
    posemb_init: str = "3d"  # from scratch: 3d (width divisible by 6) or 1d2d (by 4) sines and cosines
    pixel_range: tuple[float, float] | None = None  # stored integers that become 0 and 1; None: (0, 255), uint8 only
    pixel_mean: float = 0.449
    pixel_std: float = 0.226
    attn_impl: str = "auto"
    dtype: Any = "float32"  # of activations; parameters are float32
    scan_blocks: bool = False  # lax.scan over the repeats of the level pattern (needs remat)
    remat: str = "none"  # what the backward pass recomputes: none, full (each block), dots (all but matrix products)

    @property
    def block_levels(self) -> tuple[str, ...]:
        """The attention level of every block."""
        return self.levels * (self.depth // len(self.levels))

    @property
    def prefix_tokens(self) -> int:
        return 1 + self.reg_tokens

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches (d, h, w) of the stored position table."""
        return tuple(n // p for n, p in zip(self.img_size, self.patch))

    @property
    def features(self) -> int:
        """Width of the output."""
        return self.out_dim if self.proj == "linear" else self.width * (2 if self.pool == "dinotxt" else 1)

    def __post_init__(self):
        for name in ("levels", "img_size", "patch", "pixel_range"):  # lists, where they come from JSON
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        def need(true, message):
            if not true:
                raise UserError(f"hlip: {message}")

        bad = [x for x in self.levels if x not in LEVELS]
        need(self.levels and not bad, f"levels={self.levels} must be made of {', '.join(LEVELS)}")
        need(self.depth % len(self.levels) == 0, f"depth={self.depth} is no multiple of the {len(self.levels)} levels")
        need(self.width % self.heads == 0, f"width={self.width} is not divisible by heads={self.heads}")
        need(not self.rope or self.width // self.heads % 2 == 0, "rope needs an even width of heads")
        need(min(self.grid) > 0, f"img_size={self.img_size} is smaller than patch={self.patch}")
        need(self.pool in POOLS, f"pool={self.pool!r} is not one of {', '.join(POOLS)}")
        need(self.proj in ("linear", "none"), f"proj={self.proj!r} is not one of linear, none")
        need(
            self.features == self.out_dim,
            f"out_dim={self.out_dim}, but proj='none' with pool={self.pool!r} gives {self.features}",
        )
        need(
            self.pool != "dinotxt" or self.keep_token_axis or self.prefix_tokens == 1,
            "pool='dinotxt' with several prefix tokens needs keep_token_axis=True",
        )
        divisor = {"3d": 6, "1d2d": 4}.get(self.posemb_init)
        need(divisor, f"posemb_init={self.posemb_init!r} is not one of 3d, 1d2d")
        need(self.width % divisor == 0, f"posemb_init={self.posemb_init!r} needs a width divisible by {divisor}")
        need(0 <= self.patch_drop < 1, f"patch_drop={self.patch_drop} is not in [0, 1)")
        need(0 <= self.drop_path < 1, f"drop_path={self.drop_path} is not in [0, 1)")
        need(self.scan_positions in ("batch", "study"), f"scan_positions={self.scan_positions!r}: use batch or study")
        need(self.attn_impl in attention.IMPLS, f"attn_impl={self.attn_impl!r}: use {', '.join(attention.IMPLS)}")
        need(self.remat in REMAT, f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        need(not self.scan_blocks or self.remat != "none", "scan_blocks keeps all residuals: set remat=full or dots")

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "b s d h w *c"],
        scan_depths: Int[Array, "b s"] | None = None,
        *,
        train: bool = False,
        draws: dict[str, Array] | None = None,
        probe: Float[Array, "b a n n"] | None = None,
        inner: bool = True,
    ) -> tuple[Float[Array, "b *p z"], dict[str, Array]]:
        """Encodes studies.

        Args:
          image: voxels; integers are normalised here (`pixel_range`, `pixel_mean`, `pixel_std`), floats already are.
            With `channels` > 1 they are the last axis.
          scan_depths: real slices of every scan, in any position; the rest is padding. Slices that do not fill a slab
            are dropped, as without padding; a scan without a whole slab is absent. None: everything is real.
          train: draw scan positions, patch dropout and drop-path from the rng stream "dropout".
          draws: instead of drawing, use these: "seq_perm" (m,) or (b, m), a permutation of max(max_num_scans, s);
            "patch_order" (groups of the first level, patches): the first kept ones survive, in that order;
            "drop_path_mask/block_XX_1" and "_2" (groups,): 1 keeps the attention or MLP branch of block XX.
            What is absent is not random: positions in order, nothing dropped.
          probe: zeros, added to the attention weights of the last block (whose gradient it gets);
            the weights are then in `out["attention"]`. For heat maps.
          inner: False: only the result is wanted. Where it is made of prefix tokens (`pool="token"`), the last block is
            computed for these alone, and its outputs and "norm" have no patches (not with `scan_blocks`).

        Returns:
          z: float32, (b, z), or (b, p, z) with `keep_token_axis`; not normalised.
          out: patch_embed (b, s, d, h, w, e), block_00_in, block_XX (groups, prefix + patches, e; not with
            `scan_blocks`), norm (b, prefix + patches, e), pooled, features; keep_count: patches kept per group.
        """
        if image.ndim == 5 and self.channels == 1:
            image = image[..., None]
        if image.ndim != 6 or image.shape[-1] != self.channels:
            raise UserError(f"hlip: images are (b, s, d, h, w[, {self.channels}]), got {image.shape}")
        out: dict[str, Array] = {}
        pixels = (self.pixel_range, self.pixel_mean, self.pixel_std)
        x = PatchEmbed(self.patch, self.width, *pixels, dtype=self.dtype, name="patch_embed")(image)
        out["patch_embed"] = x
        sizes, grid = Sizes(*x.shape[:3]), x.shape[2:5]
        slabs = None if scan_depths is None else jnp.minimum(scan_depths // self.patch[0], grid[0])
        levels = self.block_levels
        first, patches = levels[0], int(np.prod(x.shape[1:5])) * sizes.b // sizes.groups(levels[0])
        if draws is None and (train or self.legacy_positions):
            draws = self._draw(sizes, patches, train)
        draws = draws or {}

        x = x + self._positions(sizes, grid, slabs, draws).astype(x.dtype)
        x = x.reshape(sizes.groups(first), patches, self.width)
        mask = None
        if slabs is not None:
            mask = jnp.arange(grid[0])[None, None] < slabs[..., None]
            mask = jnp.repeat(mask[..., None], grid[1] * grid[2], axis=-1).reshape(x.shape[:2])
        order = None
        if "patch_order" in draws:
            order, mask = keep_patches(draws["patch_order"], mask, self.patch_drop)
            x = jnp.take_along_axis(x, order[..., None], axis=1)
        out["keep_count"] = jnp.int32(x.shape[1])
        masks = {k: None if mask is None else regroup(mask, sizes.groups(k)) for k in {*levels, "study"}}
        rotary = self._rotary(sizes, grid, order) if self.rope else dict.fromkeys(LEVELS)
        x = self._blocks(x, sizes, masks, rotary, self._drops(draws), probe, inner, out)
        x = layer_norm(1e-6, self.dtype, "norm")(x)
        out["norm"] = x

        pooled = self._pool(x, masks["study"])
        out["pooled"] = pooled
        if self.proj == "linear":
            init = torch_uniform(pooled.shape[-1])
            pooled = nn.Dense(self.out_dim, use_bias=False, kernel_init=init, dtype=self.dtype, name="head")(pooled)
        out["features"] = pooled.astype(jnp.float32)
        return out["features"], out

    def _draw(self, sizes: Sizes, patches: int, train: bool) -> dict[str, Array]:
        """The random draws of one forward pass, in the format of `draws`."""
        sample = self.max_num_scans > 1 and (sizes.b != 1 if self.legacy_positions else train)
        if not (sample or (train and (self.patch_drop or self.drop_path))):
            return {}
        if not self.has_rng("dropout"):
            raise UserError("hlip: this pass draws random numbers: give rngs={'dropout': key} (or `draws`)")
        rng_scans, rng_patches, rng_paths = jax.random.split(self.make_rng("dropout"), 3)
        draws = {}
        if sample:
            rows = max(self.max_num_scans, sizes.s)
            shape = (sizes.b, rows) if self.scan_positions == "study" else (rows,)
            draws["seq_perm"] = jnp.argsort(jax.random.uniform(rng_scans, shape), axis=-1)
        if train and self.patch_drop:
            noise = jax.random.uniform(rng_patches, (sizes.groups(self.levels[0]), patches))
            draws["patch_order"] = jnp.argsort(noise, axis=-1)
        if train and self.drop_path:
            # One draw for all blocks: a generator for each would be most of the program.
            counts = [sizes.groups(level) if rate else 0 for level, rate in zip(self.block_levels, self._rates())]
            noise = jnp.split(jax.random.uniform(rng_paths, (2 * sum(counts),)), np.cumsum(np.repeat(counts, 2))[:-1])
            for i, rate in enumerate(self._rates()):
                for j in (1, 2) if rate else ():
                    draws[f"drop_path_mask/block_{i:02d}_{j}"] = (noise[2 * i + j - 1] >= rate).astype(jnp.float32)
        return draws

    def _rates(self) -> list[float]:
        """The drop-path rate of every block."""
        return np.linspace(0.0, self.drop_path, self.depth).tolist()

    def _drops(self, draws) -> list[tuple[Array, Array] | None]:
        """What the two branches of every block are multiplied by."""
        drops = []
        for i, rate in enumerate(self._rates()):
            pair = [draws.get(f"drop_path_mask/block_{i:02d}_{j}") for j in (1, 2)]
            one = next((x for x in pair if x is not None), None)
            if one is not None:
                pair = [jnp.ones_like(one) if x is None else x / (1.0 - rate) for x in pair]
            drops.append(None if one is None else tuple(pair))
        return drops

    def _positions(self, sizes: Sizes, grid, slabs, draws) -> Float[Array, "#b #s d h w e"]:
        """Where a patch is in its scan (which has its own grid, if it has fewer slabs), and which scan it is in."""
        init = posemb.sincos_3d if self.posemb_init == "3d" else posemb.sincos_1d2d
        table = self.param("spatial_posemb", lambda _: jnp.asarray(init(*self.grid, self.width))[None])
        table = posemb.resample_plane(jax.lax.stop_gradient(table)[0], *grid[1:])
        spatial = posemb.resample_depth(table, grid[0], slabs)
        spatial = spatial if slabs is not None else spatial[None, None]
        if self.max_num_scans <= 1:
            return spatial
        rows = self.max_num_scans
        table = self.param("sequential_posemb", lambda _: jnp.asarray(posemb.sincos_1d(rows, self.width))[None])
        real, rank = jnp.array([sizes.s]), jnp.arange(sizes.s)[None]
        if slabs is not None:
            real = (slabs > 0).sum(-1)
            rank = jnp.maximum(jnp.cumsum(slabs > 0, axis=-1) - 1, 0)
        if "seq_perm" in draws:
            perm = jnp.asarray(draws["seq_perm"])
            if perm.shape[-1] < max(rows, sizes.s):
                raise UserError(f"hlip: seq_perm has {perm.shape[-1]} entries, {max(rows, sizes.s)} scans are possible")
            rank = posemb.sample_sequence(jnp.atleast_2d(perm), rank, real, rows)
        sequence = posemb.resample_sequence(jax.lax.stop_gradient(table)[0], rank, real)
        return spatial + sequence[:, :, None, None, None]

    def _rotary(self, sizes: Sizes, grid, order) -> dict[str, tuple[Array, Array]]:
        """Cosines and sines by level. An angle belongs to a patch's place in its scan and travels with it."""
        n = int(np.prod(grid))
        if order is not None:
            ids = regroup(jnp.tile(jnp.arange(n), (sizes.groups("scan"), 1)), sizes.groups(self.levels[0]))
            ids = jnp.take_along_axis(ids, order, axis=1)
            ids = {k: regroup(ids, sizes.groups(k)) for k in set(self.levels)}
        else:
            one = jnp.arange(n)
            ids = {"scan": one[None], "study": jnp.tile(one, (1, sizes.s))}
            ids["slice"] = jnp.tile(one.reshape(grid[0], -1), (sizes.groups("scan"), 1))
        tables = posemb.rotary_table(grid, self.width // self.heads)
        # Prefix tokens do not turn.
        rest = [jnp.full((1, self.prefix_tokens, self.width // self.heads), x, jnp.float32) for x in (1.0, 0.0)]
        return {k: tuple(join(r, jnp.asarray(t)[i]) for t, r in zip(tables, rest)) for k, i in ids.items()}

    def _blocks(self, x, sizes: Sizes, masks, rotary, drops, probe, inner, out) -> Float[Array, "b p+n e"]:
        """All blocks, from patches in the groups of the first level to tokens in studies."""
        prefix = [self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))]
        if self.reg_tokens:
            prefix.append(self.param("reg_token", nn.initializers.normal(1e-6), (1, self.reg_tokens, self.width)))
        prefix = jnp.concatenate(prefix, axis=1).astype(x.dtype)
        p, levels = self.prefix_tokens, self.block_levels
        fields = {"heads": self.heads, "mlp_ratio": self.mlp_ratio, "impl": self.attn_impl, "dtype": self.dtype}
        fields["init_std"] = self.init_std
        # Prefix tokens are always keys: no row of attention is empty, not even in a group of padding.
        keys = {k: None if m is None else jnp.pad(m, ((0, 0), (p, 0)), constant_values=True) for k, m in masks.items()}

        def go(x, old, new):
            return constrain(move(x, p, sizes.groups(new), masks[old]), "batch", "tokens", "embed")

        looped = self.is_initializing() or probe is not None
        if self.scan_blocks and not looped:
            return self._scan(join(prefix, regroup(x, sizes.groups(levels[-1]))), go, keys, rotary, drops, fields)
        x, level = join(prefix, x), levels[0]
        out["block_00_in"] = x
        wanted = p if self.pool == "token" and probe is None and not inner else None
        for i, new in enumerate(levels):
            x, level = go(x, level, new), new
            if self.remat == "none" or looped:
                block = Block(**fields, name=f"blocks_{i}")
            else:
                block = recomputed(fields, self.variables["params"][f"blocks_{i}"], self.remat)
            if probe is not None and i == self.depth - 1:
                x, out["attention"] = block(x, keys[new], rotary[new], drops[i], probe)
            else:
                x = block(x, keys[new], rotary[new], drops[i], queries=wanted if i == self.depth - 1 else None)
            out[f"block_{i:02d}"] = x
        return go(x, level, "study")

    def _scan(self, x, go, keys, rotary, drops, fields):
        """The same blocks compiled once for all repeats of the level pattern; parameters are stacked here only.

        Between repeats tokens are in the groups of the last level (prefix tokens start equal in all groups, so that
        the first split is exact).
        """
        levels, params = self.block_levels, self.variables["params"]
        periods = (n for n in range(1, self.depth + 1) if self.depth % n == 0)
        period = next(n for n in periods if levels == levels[:n] * (self.depth // n))

        def stack(*xs):
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *xs)

        repeated = []
        for j in range(period):
            scales = drops[j::period]
            some = next((d for d in scales if d is not None), None)
            if some is not None:
                ones = jax.tree.map(jnp.ones_like, some)
                scales = stack(*(ones if d is None else d for d in scales))
            blocks = stack(*(params[f"blocks_{i}"] for i in range(j, self.depth, period)))
            repeated.append((blocks, None if some is None else scales))

        def repeat(x, one):
            level = levels[-1]
            for new, (block, drop) in zip(levels[:period], one):
                x, level = go(x, level, new), new
                x = recomputed(fields, block, self.remat, prevent_cse=False)(x, keys[new], rotary[new], drop)
            return x, None

        return go(jax.lax.scan(repeat, x, repeated)[0], levels[-1], "study")

    def _pool(self, x: Float[Array, "b p+n e"], mask) -> Float[Array, "b *p e"]:
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        if self.pool == "dinotxt":
            mean = jnp.broadcast_to(masked_mean(patches, mask)[:, None], prefix.shape)
            pooled = jnp.concatenate([prefix, mean], axis=-1)
            return pooled if self.keep_token_axis else pooled[:, 0]
        pooled = prefix[:, 0]
        if self.pool == "map":
            pooled = AttentionPool(self.heads, self.mlp_ratio, dtype=self.dtype, name="attn_pool")(patches, mask)
        return pooled[:, None] if self.keep_token_axis else pooled
