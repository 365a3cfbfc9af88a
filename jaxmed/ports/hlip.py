"""HLIP's published weights and our parameters, both ways, for any size (HLIP spec, section 7). numpy only.

Published: a flat dict of names below `visual.` and `text.`, `logit_scale` and `logit_bias`, perhaps with the prefix
of a wrapper ("module." of data-parallel training). Ours: the tree of `models.two_towers`. Nothing but names and layouts
changes, so that there and back is exact.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.core import tree
from jaxmed.core.errors import UserError
from jaxmed.ports import bert, hlip_model, hlip_visual
from jaxmed.ports.names import Names, Rule, Table, linear, unwrap

# Options, sizes and starts, for `python -m jaxmed.port`.
MODEL = hlip_model
# Buffers that are in some checkpoints and hold no weights.
IGNORED = ("text.transformer.embeddings.position_ids", "text.transformer.embeddings.token_type_ids")
SCALES = ("logit_scale", "logit_bias")
_PEFT = "transformer.base_model.model."


def _adapter(published: str, path: str) -> list[Rule]:
    return [
        Rule(f"{published}.lora_{side.upper()}.default.weight", f"{path}/lora_{side}", np.transpose, np.transpose)
        for side in "ab"
    ]


_TEXT = Table(
    [
        *(r._replace(published=f"transformer.{r.published}") for r in bert.RULES),
        *(r for ours, name in bert.LINEARS.items() for r in _adapter(f"transformer.{name}", f"blocks_{{i}}/{ours}")),
        *linear("proj", "proj", bias=False),
        *linear("proj.0", "proj_0", bias=False),
        *linear("proj.2", "proj_1", bias=False),
    ]
)


def _one_to_ours(name: str, x: np.ndarray) -> tuple[str, np.ndarray] | None:
    if name in SCALES:
        return name, np.asarray(x).reshape(())
    side, _, rest = name.partition(".")
    if side == "visual":
        found = hlip_visual.to_ours(rest, x)
        return None if found is None else (f"image/{found[0]}", found[1])
    if side == "text":
        # Low-rank adaptation renames every tensor of the encoder, and the weights that it adapts once more.
        rest = rest.replace(_PEFT, "transformer.", 1).replace(".base_layer.", ".")
        found = _TEXT.to_ours(rest, x)
        return None if found is None else (f"text/{found[0]}", found[1])
    return None


def convert(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Names]:
    """{our path: array} of all published tensors that have a rule, and the fate of every name.

    Raises:
      UserError: two published tensors are one of ours.
    """
    flat: dict[str, np.ndarray] = {}
    names = Names({}, [], [])
    for full, x in state_dict.items():
        name = unwrap(full)
        if name in IGNORED or name.replace(_PEFT, "transformer.", 1) in IGNORED:
            names.ignored.append(full)
            continue
        found = _one_to_ours(name, x)
        if found is None:
            names.unknown.append(full)
            continue
        path, value = found
        if path in flat:
            other = next(k for k, v in names.matched.items() if v == path)
            raise UserError(f"weights: tensors {other!r} and {full!r} are the same parameter ({path})")
        flat[path] = value
        names.matched[full] = path
    return flat, names


def to_jaxmed(state_dict: Mapping[str, np.ndarray], like: Any = None) -> dict[str, Any]:
    """Published tensors as the parameter tree of `models.two_towers` (or the part of it that they are).

    Args:
      state_dict: names with or without a wrapper's prefix -> arrays.
      like: parameters (or their shapes) of the model that they must fit, or None to take them as they are.

    Raises:
      UserError: names the tensor that has no place in the model, is missing, or has another shape, with both shapes.
    """
    flat, names = convert(state_dict)
    if names.unknown:
        raise UserError(
            f"weights: tensor {names.unknown[0]!r} has no place in HLIP"
            + (f" (nor have {len(names.unknown) - 1} others)" if len(names.unknown) > 1 else "")
        )
    if like is not None:
        theirs = {path: name for name, path in names.matched.items()}
        wanted = tree.flatten(like)
        for path, x in wanted.items():
            if path not in flat:
                raise UserError(f"weights: there is no tensor for parameter {path!r} of shape {tuple(x.shape)}")
        for path, x in flat.items():
            if path not in wanted:
                raise UserError(f"weights: tensor {theirs[path]!r} of shape {x.shape}: the model has no {path!r}")
            if tuple(wanted[path].shape) != x.shape:
                raise UserError(
                    f"weights: tensor {theirs[path]!r} has shape {np.shape(state_dict[theirs[path]])}, which is "
                    f"{x.shape} here, but the model's {path!r} has {tuple(wanted[path].shape)}"
                )
    return tree.unflatten(flat)


def to_published(params: Any, *, wrapper: str = "") -> dict[str, np.ndarray]:
    """Our parameters (a tree, or a part of it that keeps its path) under the published names.

    Where the text tower has adapters, its tensors get the names that low-rank adaptation gives them.

    Args:
      wrapper: a prefix for every name, such as "module.".

    Raises:
      UserError: a parameter that has no published name.
    """
    flat = tree.flatten(params)
    adapted = {path.rpartition("/")[0] for path in flat if path.endswith("/lora_a")}
    result = {}
    for path, x in flat.items():
        side, _, rest = path.partition("/")
        if path in SCALES:
            result[wrapper + path] = np.asarray(x)
            continue
        convert_one = {"image": hlip_visual.to_published, "text": _TEXT.to_published}.get(side)
        found = convert_one(rest, x) if convert_one else None
        if found is None:
            raise UserError(f"weights: parameter {path!r} has no published name")
        name, value = found
        if side == "text" and adapted:
            if path.rpartition("/")[0] in adapted and ".lora_" not in name:
                stem, _, last = name.rpartition(".")
                name = f"{stem}.base_layer.{last}"
            name = name.replace("transformer.", _PEFT, 1) if name.startswith("transformer.") else name
        result[f"{wrapper}{'visual' if side == 'image' else 'text'}.{name}"] = value
    return result
