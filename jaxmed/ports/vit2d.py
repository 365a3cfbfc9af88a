"""Vision transformers of 2D images (MAE and others) under the names of their first publication. numpy only.

The MAE release and timm have the same names: cls_token, pos_embed, patch_embed.proj, blocks.i.norm1, .attn.qkv,
.attn.proj, .norm2, .mlp.fc1, .mlp.fc2, norm. Hugging Face has others, and three matrices instead of a fused one.
"""

import re
from collections.abc import Mapping

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.ports.names import unwrap

# The decoder of a masked autoencoder, and heads.
_OTHERS = ("decoder", "mask_token", "head.", "fc_norm.", "classifier.", "pooler.", "embeddings.mask_token")
_HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    "layernorm.": "norm.",
}
_PARTS = ("query", "key", "value")
_OURS = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
)


def encoder(state: Mapping[str, np.ndarray], file: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The encoder's tensors by the names above, and the names of tensors that are left out and that are unknown.

    Raises:
      UserError: `file` holds no such encoder.
    """
    out: dict[str, np.ndarray] = {}
    ignored, unknown = [], []
    fused: dict[str, dict[str, np.ndarray]] = {}
    for full, x in state.items():
        name = unwrap(full).removeprefix("vit.")
        if name.startswith(_OTHERS):
            ignored.append(full)
            continue
        for theirs, ours in _HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        part = re.fullmatch(r"(blocks\.\d+\.att)ention\.attention\.(query|key|value)\.(weight|bias)", name)
        if part:
            fused.setdefault(f"{part[1]}n.qkv.{part[3]}", {})[part[2]] = x
        elif _OURS.fullmatch(name):
            out[name] = x
        else:
            unknown.append(full)
    for name, parts in fused.items():
        if missing := [p for p in _PARTS if p not in parts]:
            raise UserError(f"{file}: {name.replace('qkv', missing[0])} is missing beside {', '.join(parts)}")
        out[name] = np.concatenate([parts[p] for p in _PARTS])
    if "patch_embed.proj.weight" not in out or "blocks.0.attn.qkv.weight" not in out:
        raise UserError(
            f"{file}: no 2D vision transformer is in it; its tensors are called {', '.join(list(state)[:3])}, ..."
        )
    if out["patch_embed.proj.weight"].ndim != 4:
        raise UserError(
            f"{file}: its patch kernel has shape {out['patch_embed.proj.weight'].shape}, not that of a 2D one"
        )
    return out, ignored, unknown
