"""BERT's weights as Hugging Face publishes them (bert-base, BiomedBERT, CXR-BERT) and ours. numpy only."""

from collections.abc import Mapping

import numpy as np

from jaxmed.core.errors import UserError
from jaxmed.ports.names import Names, Rule, Table, linear, norm, unwrap

_LAYER = "encoder.layer.{i}."
# The linear layers of a block by our names.
LINEARS = {
    "query": _LAYER + "attention.self.query",
    "key": _LAYER + "attention.self.key",
    "value": _LAYER + "attention.self.value",
    "out": _LAYER + "attention.output.dense",
    "fc1": _LAYER + "intermediate.dense",
    "fc2": _LAYER + "output.dense",
}
RULES: tuple[Rule, ...] = (
    Rule("embeddings.word_embeddings.weight", "word_embeddings"),
    Rule("embeddings.position_embeddings.weight", "position_embeddings"),
    Rule("embeddings.token_type_embeddings.weight", "type_embeddings"),
    *norm("embeddings.LayerNorm", "embeddings_norm"),
    *(r for ours, name in LINEARS.items() for r in linear(name, f"blocks_{{i}}/{ours}")),
    *norm(_LAYER + "attention.output.LayerNorm", "blocks_{i}/attention_norm"),
    *norm(_LAYER + "output.LayerNorm", "blocks_{i}/mlp_norm"),
    *linear("pooler.dense", "pooler"),
)
_TABLE = Table(RULES)
# Heads for other tasks, BERT's own pooler (which text towers do not use), and buffers.
_OTHERS = ("cls.", "cls_projection_head.", "classifier.", "qa_outputs.", "lm_head.", "pooler.")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def encoder(state: Mapping[str, np.ndarray], file: str) -> tuple[dict[str, np.ndarray], Names]:
    """{path below the text tower: array} of a BERT with or without its prefix "bert.", and the fate of every name.

    Raises:
      UserError: `file` holds no BERT.
    """
    flat: dict[str, np.ndarray] = {}
    names = Names({}, [], [])
    for full, x in state.items():
        name = unwrap(full).removeprefix("bert.")
        if name.startswith(_OTHERS) or name in _BUFFERS:
            names.ignored.append(full)
            continue
        # The first releases, after TensorFlow.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        found = _TABLE.to_ours(name, x)
        if found is None:
            names.unknown.append(full)
        else:
            flat[found[0]] = found[1]
            names.matched[full] = found[0]
    if "word_embeddings" not in flat or "blocks_0/query/kernel" not in flat:
        raise UserError(f"{file}: no BERT is in it; its tensors are called {', '.join(list(state)[:3])}, ...")
    return flat, names
