"""The published names of HLIP's vision tower (keys below `visual.`) and ours, both ways, for any size.

Source: the state dicts of the released checkpoints (an open_clip model around a timm vision transformer). All changes
are reshapes and transposes of numpy arrays.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """One kind of tensor: a template of its published name, of our path, and the two changes of layout.

    "{i}" in both names is the number of a block. `old` are published names that mean the same.
    """

    published: str
    path: str
    to_ours: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_published: Callable[[np.ndarray], np.ndarray] = np.asarray
    old: tuple[str, ...] = ()


def _linear(published: str, path: str, bias: bool = True) -> list[Rule]:
    """(out, in) -> (in, out)."""
    rules = [Rule(f"{published}.weight", f"{path}/kernel", np.transpose, np.transpose)]
    return rules + ([Rule(f"{published}.bias", f"{path}/bias")] if bias else [])


def _norm(published: str, path: str) -> list[Rule]:
    return [Rule(f"{published}.weight", f"{path}/scale"), Rule(f"{published}.bias", f"{path}/bias")]


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
    *_norm("trunk.blocks.{i}.norm1", "blocks_{i}/norm1"),
    *_linear("trunk.blocks.{i}.attn.qkv", "blocks_{i}/attn/qkv"),
    *_linear("trunk.blocks.{i}.attn.proj", "blocks_{i}/attn/proj"),
    *_norm("trunk.blocks.{i}.norm2", "blocks_{i}/norm2"),
    *_linear("trunk.blocks.{i}.mlp.fc1", "blocks_{i}/mlp/fc1"),
    *_linear("trunk.blocks.{i}.mlp.fc2", "blocks_{i}/mlp/fc2"),
    *_norm("trunk.norm", "norm"),
    Rule("trunk.attn_pool.latent", "attn_pool/latent"),
    *_linear("trunk.attn_pool.q", "attn_pool/q"),
    *_linear("trunk.attn_pool.kv", "attn_pool/kv"),
    *_linear("trunk.attn_pool.proj", "attn_pool/proj"),
    *_norm("trunk.attn_pool.norm", "attn_pool/norm"),
    *_linear("trunk.attn_pool.mlp.fc1", "attn_pool/mlp/fc1"),
    *_linear("trunk.attn_pool.mlp.fc2", "attn_pool/mlp/fc2"),
    *_linear("head.proj", "head", bias=False),
)


def _find(name: str, templates: Mapping[str, Rule]) -> tuple[Rule, str] | None:
    """The rule of a name and the block's number in it (or "")."""
    if name in templates:
        return templates[name], ""
    for number in re.findall(r"\d+", name):
        for found in re.finditer(rf"(?<!\d){number}(?!\d)", name):
            rule = templates.get(name[: found.start()] + "{i}" + name[found.end() :])
            if rule is not None:
                return rule, number
    return None


_BY_PUBLISHED = {n: r for r in RULES for n in (r.published, *r.old)}
_BY_PATH = {r.path: r for r in RULES}


def to_ours(name: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Our path below the image tower and our layout of a published tensor (name without `visual.`); None: unknown."""
    found = _find(name, _BY_PUBLISHED)
    return None if found is None else (found[0].path.replace("{i}", found[1]), found[0].to_ours(np.asarray(x)))


def to_published(path: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
    """The published name (without `visual.`) and layout of one of our parameters, "a/b/c"; None: unknown."""
    found = _find(path, _BY_PATH)
    return (
        None if found is None else (found[0].published.replace("{i}", found[1]), found[0].to_published(np.asarray(x)))
    )
