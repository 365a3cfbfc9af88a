"""Masked autoencoders and vision transformers as published, and our parameters, both ways, for any size (radiograph MAE
spec, section 8). numpy only.

Published: any layout of `ports.vit_names`, with or without wrappers. Ours: the tree of `models.mae` or `models.vit`.
Nothing but names and layouts changes, so that there and back is exact.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.core import tree
from jaxmed.core.errors import UserError
from jaxmed.ports import radiograph_mae_model, vit_names
from jaxmed.ports.names import Names, Rule, Table, linear, norm

# Sizes and changes of them, for `python -m jaxmed.port`.
MODEL = radiograph_mae_model
# Its options for the way back.
BACK = {"layout": f"names of --back: {', '.join(vit_names.LAYOUTS)} (default hf4)", "wrapper": "what --back puts first"}
# Tensors of other heads, which no model here has.
_IGNORED = ("pooler.", "embeddings.mask_token")


def _block(published: str, path: str) -> list[Rule]:
    return [
        *norm(f"{published}.norm1", f"{path}/norm1"),
        *linear(f"{published}.attn.qkv", f"{path}/attn/qkv"),
        *linear(f"{published}.attn.proj", f"{path}/attn/proj"),
        *norm(f"{published}.norm2", f"{path}/norm2"),
        *linear(f"{published}.mlp.fc1", f"{path}/mlp/fc1"),
        *linear(f"{published}.mlp.fc2", f"{path}/mlp/fc2"),
    ]


_TABLE = Table(
    [
        Rule("cls_token", "cls_token"),
        Rule("pos_embed", "pos_embed"),
        Rule(
            "patch_embed.proj.weight",
            "patch_embed/kernel",
            lambda x: x.transpose(2, 3, 1, 0),
            lambda x: x.transpose(3, 2, 0, 1),
        ),
        Rule("patch_embed.proj.bias", "patch_embed/bias"),
        *_block("blocks.{i}", "blocks_{i}"),
        *norm("norm", "norm"),
        *linear("head", "head"),
        Rule("mask_token", "mask_token"),
        Rule("decoder_pos_embed", "decoder_pos_embed"),
        *linear("decoder_embed", "decoder_embed"),
        *_block("decoder_blocks.{i}", "decoder_blocks_{i}"),
        *norm("decoder_norm", "decoder_norm"),
        *linear("decoder_pred", "decoder_pred"),
    ]
)


def convert(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Names]:
    """{our path: array} of all published tensors that have a rule, and the fate of every name.

    Raises:
      UserError: two published tensors are one of ours, or one of queries, keys and values is missing.
    """
    flat: dict[str, np.ndarray] = {}
    names = Names({}, [], [])
    for name, (x, sources) in vit_names.to_original(state_dict).items():
        if name.startswith(_IGNORED):
            names.ignored.extend(sources)
            continue
        found = _TABLE.to_ours(name, x)
        if found is None:
            names.unknown.extend(sources)
            continue
        path, flat_value = found
        flat[path] = flat_value
        names.matched.update(dict.fromkeys(sources, path))
    return flat, names


def to_jaxmed(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors as our tree of parameters.

    Raises:
      UserError: names a tensor that has no place in it.
    """
    flat, names = convert(state_dict)
    if names.unknown:
        raise UserError(f"weights: tensor {names.unknown[0]!r} has no place in a masked autoencoder or its classifier")
    return tree.unflatten(flat)


def to_published(params: Any, *, layout: str = "hf4", wrapper: str = "") -> dict[str, np.ndarray]:
    """Our parameters (a tree, or a part of it that keeps its path) in a published layout (`vit_names.LAYOUTS`).

    Args:
      wrapper: a prefix for every name, such as "net.".

    Raises:
      UserError: a parameter that has no published name, or an unknown layout.
    """
    original = {}
    for path, x in tree.flatten(params).items():
        found = _TABLE.to_published(path, x)
        if found is None:
            raise UserError(f"weights: parameter {path!r} has no published name")
        original[found[0]] = found[1]
    return vit_names.from_original(original, layout, prefix=wrapper)
