"""Every published layout of 2D vision transformers and masked autoencoders, to one and back. numpy only.

The one is that of the MAE release (and timm), with fused queries, keys and values. The others are Hugging Face's: "hf4"
(transformers 4), "hf5" (the modules of transformers 5) and "hf5_saved" (what 5.23 writes: an encoder as in 4, and a
decoder whose blocks are called decoder_encoder.layer).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.ports.names import unwrap

LAYOUTS = ("original", "hf4", "hf5", "hf5_saved")
# Prefixes of training code around a model.
WRAPPERS = ("net.", "mae_model.")
PARTS = ("query", "key", "value")
# Names outside the blocks, from Hugging Face's to the original.
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
# Inside a block: the linear layers and norms of transformers 4 and 5.
_INSIDE = {
    "hf4": {
        **{f"attention.attention.{p}": p for p in PARTS},
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    },
    "hf5": {
        **{f"attention.{p[0]}_proj": p for p in PARTS},
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    },
}
_STACKS = {
    "hf4": {"encoder.layer": "blocks", "decoder.decoder_layers": "decoder_blocks"},
    "hf5": {"layers": "blocks", "decoder.decoder_layers": "decoder_blocks"},
    "hf5_saved": {"encoder.layer": "blocks", "decoder.decoder_encoder.layer": "decoder_blocks"},
}
_STACK_NAMES = {theirs: ours for stacks in _STACKS.values() for theirs, ours in stacks.items()}
_BLOCK = re.compile(rf"({'|'.join(map(re.escape, _STACK_NAMES))})\.(\d+)\.(.+)\.(weight|bias)")
_INSIDE_NAMES = {theirs: ours for names in _INSIDE.values() for theirs, ours in names.items()}


def original_name(full: str) -> str:
    """The original name of a tensor in whatever layout and wrapper; of queries, keys and values "...attn.query..." and
    so on. A name without a rule comes back without its wrappers."""
    name = unwrap(full)
    while name.startswith(WRAPPERS):
        name = unwrap(name.partition(".")[2])
    name = name.removeprefix("vit.")
    if block := _BLOCK.fullmatch(name):
        inside = _INSIDE_NAMES.get(block[3])
        if inside is None:
            return name
        inside = f"attn.{inside}" if inside in PARTS else inside
        return f"{_STACK_NAMES[block[1]]}.{block[2]}.{inside}.{block[4]}"
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    stem, _, last = name.rpartition(".")
    return f"{_OUTSIDE[stem]}.{last}" if stem in _OUTSIDE and last in ("weight", "bias") else name


def to_original(
    state: Mapping[str, np.ndarray], file: str = "weights"
) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """{original name: (array, the names of the tensors that it is made of)}; queries, keys and values are fused.

    Raises:
      UserError: two tensors have one name, or one of queries, keys and values is missing.
    """
    out: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}
    parts: dict[str, dict[str, str]] = {}
    for full, x in state.items():
        name = original_name(full)
        part = re.fullmatch(r"(.+\.attn\.)(query|key|value)\.(weight|bias)", name)
        if part:
            mine = parts.setdefault(f"{part[1]}qkv.{part[3]}", {})
        if name in out or (part and part[2] in mine):
            other = mine[part[2]] if part else out[name][1][0]
            raise UserError(f"{file}: tensors {other!r} and {full!r} are the same parameter ({name})")
        if part:
            mine[part[2]] = full
        else:
            out[name] = (x, (full,))
    for name, found in parts.items():
        if missing := [p for p in PARTS if p not in found]:
            raise UserError(f"{file}: {name.replace('qkv', missing[0])} is missing beside {', '.join(found.values())}")
        if name in out:
            raise UserError(
                f"{file}: tensors {out[name][1][0]!r} and {found['query']!r} are the same parameter ({name})"
            )
        shapes = {np.shape(state[found[p]]) for p in PARTS}
        if len(shapes) > 1:
            raise UserError(f"{file}: {', '.join(found.values())} have different shapes: {sorted(shapes)}")
        out[name] = (np.concatenate([np.asarray(state[found[p]]) for p in PARTS]), tuple(found[p] for p in PARTS))
    return out


def from_original(state: Mapping[str, np.ndarray], layout: str, *, prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors by their original names in another of `LAYOUTS`, each name with `prefix` (a wrapper's).

    Raises:
      UserError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "original":
        return {f"{prefix}{k}": np.asarray(x) for k, x in state.items()}
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    inside = {ours: theirs for theirs, ours in _INSIDE["hf5" if layout == "hf5" else "hf4"].items()}
    stacks = {ours: theirs for theirs, ours in _STACKS[layout].items()}
    out = {}
    for name, x in state.items():
        for theirs, array in _unfused(name, np.asarray(x), inside):
            stem, _, last = theirs.rpartition(".")
            if block := re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)", theirs):
                theirs = f"{stacks[block[1]]}.{block[2]}.{block[3]}"
            elif theirs in outside:
                theirs = outside[theirs]
            elif stem in outside:
                theirs = f"{outside[stem]}.{last}"
            in_encoder = not theirs.startswith(("decoder.", "classifier."))
            out[f"{prefix}{'vit.' if in_encoder else ''}{theirs}"] = array
    return out


def _unfused(name: str, x: np.ndarray, inside: Mapping[str, str]) -> Sequence[tuple[str, np.ndarray]]:
    """The tensors of a block by Hugging Face's names inside it: one, or the three that a fused one is made of."""
    block = re.fullmatch(r"((?:decoder_)?blocks\.\d+)\.(.+)\.(weight|bias)", name)
    if not block:
        return [(name, x)]
    if block[2] == "attn.qkv":
        return [(f"{block[1]}.{inside[p]}.{block[3]}", y) for p, y in zip(PARTS, np.split(x, 3))]
    return [(f"{block[1]}.{inside[block[2]]}.{block[3]}", x)]
