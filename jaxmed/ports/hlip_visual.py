"""The published names of HLIP's vision tower (keys below `visual.`) and ours, both ways, for any size.

Source: the state dicts of the released checkpoints (an open_clip model around a timm vision transformer). All changes
are reshapes and transposes of numpy arrays.
"""

import numpy as np

from jaxmed.ports.names import Rule, Table, linear, norm

# Fused rows are ordered q, k, v (or k, v), then head, then channel, in both layouts.
RULES: tuple[Rule, ...] = (
    Rule("trunk.cls_token", "cls_token"),
    Rule("trunk.reg_token", "reg_token"),
    Rule("trunk.spatial_posemb", "spatial_posemb"),
    Rule("trunk.sequential_posemb", "sequential_posemb", old=("trunk.series_posemb",)),
    Rule(
        "trunk.patch_embed.proj.weight",
        "patch_embed/kernel",
        lambda x: x.transpose(2, 3, 4, 1, 0),
        lambda x: x.transpose(4, 3, 0, 1, 2),
    ),
    Rule("trunk.patch_embed.proj.bias", "patch_embed/bias"),
    *norm("trunk.blocks.{i}.norm1", "blocks_{i}/norm1"),
    *linear("trunk.blocks.{i}.attn.qkv", "blocks_{i}/attn/qkv"),
    *linear("trunk.blocks.{i}.attn.proj", "blocks_{i}/attn/proj"),
    *norm("trunk.blocks.{i}.norm2", "blocks_{i}/norm2"),
    *linear("trunk.blocks.{i}.mlp.fc1", "blocks_{i}/mlp/fc1"),
    *linear("trunk.blocks.{i}.mlp.fc2", "blocks_{i}/mlp/fc2"),
    *norm("trunk.norm", "norm"),
    Rule("trunk.attn_pool.latent", "attn_pool/latent"),
    *linear("trunk.attn_pool.q", "attn_pool/q"),
    *linear("trunk.attn_pool.kv", "attn_pool/kv"),
    *linear("trunk.attn_pool.proj", "attn_pool/proj"),
    *norm("trunk.attn_pool.norm", "attn_pool/norm"),
    *linear("trunk.attn_pool.mlp.fc1", "attn_pool/mlp/fc1"),
    *linear("trunk.attn_pool.mlp.fc2", "attn_pool/mlp/fc2"),
    *linear("head.proj", "head", bias=False),
)


_TABLE = Table(RULES)


def to_ours(name: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Our path below the image tower and our layout of a published tensor (name without `visual.`); None: unknown."""
    return _TABLE.to_ours(name, x)


def to_published(path: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
    """The published name (without `visual.`) and layout of one of our parameters, "a/b/c"; None: unknown."""
    return _TABLE.to_published(path, x)
