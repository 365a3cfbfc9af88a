"""Published names of HLIP's tensors and ours: there and back is exact, and every misfit is named."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jaxmed.core import tree
from jaxmed.core.errors import UserError
from jaxmed.ports import hlip

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "hlip").glob("*.safetensors"))


def weights(path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as f:
        names = [k for k in f.keys() if k.startswith("param/")]  # noqa: SIM118 (not a dict)
        return {k.removeprefix("param/"): f.get_tensor(k) for k in names}


WEIGHTS = {path.stem: w for path in GOLDENS if (w := weights(path))}


@pytest.mark.parametrize("name", WEIGHTS)
def test_there_and_back(name):
    published = WEIGHTS[name]
    params = hlip.to_jaxmed(published)
    back = hlip.to_published(params)
    assert back.keys() == published.keys()
    for k, x in published.items():
        assert back[k].dtype == x.dtype
        np.testing.assert_array_equal(back[k], x, err_msg=k)
    wrapped = {f"module.{k}": x for k, x in published.items()}
    again = hlip.to_jaxmed(wrapped, like=params)
    assert tree.params_sha256(again) == tree.params_sha256(params)
    assert hlip.to_published(params, wrapper="module.").keys() == wrapped.keys()


def test_every_part_is_there():
    names = " ".join(k for w in WEIGHTS.values() for k in w)
    for part in ("lora_A.default", "base_layer", "text.proj.2.", "text.transformer.pooler", "logit_bias", "attn_pool"):
        assert part in names, part


def test_wrappers_and_buffers():
    state = {
        "module.logit_scale": np.ones((), np.float32),
        "_orig_mod.module.text.proj.weight": np.ones((8, 16), np.float32),
        "module.text.transformer.embeddings.position_ids": np.arange(4)[None],
        "module.text.transformer.base_model.model.embeddings.position_ids": np.arange(4)[None],
    }
    flat, names = hlip.convert(state)
    assert {k: x.shape for k, x in flat.items()} == {"logit_scale": (), "text/proj/kernel": (16, 8)}
    assert names.ignored == list(state)[2:] and names.unknown == []
    with pytest.raises(UserError, match=r"'logit_scale' and 'module\.logit_scale' are the same"):
        hlip.convert({"logit_scale": np.ones(()), "module.logit_scale": np.ones(())})


def test_misfits_are_named():
    published = WEIGHTS["text_lora"]
    like = hlip.to_jaxmed(published)
    name = "text.transformer.base_model.model.encoder.layer.1.intermediate.dense.weight"
    wrong = {**published, name: np.zeros((30, 24), np.float32)}
    with pytest.raises(
        UserError, match=rf"'{name}' has shape \(30, 24\), .* 'text/blocks_1/fc1/kernel' has \(24, 64\)"
    ):
        hlip.to_jaxmed(wrong, like)
    with pytest.raises(UserError, match=r"no tensor for parameter 'text/blocks_1/fc1/kernel' of shape \(24, 64\)"):
        hlip.to_jaxmed({k: x for k, x in published.items() if k != name}, like)
    with pytest.raises(UserError, match="the model has no 'logit_bias'"):
        hlip.to_jaxmed({**published, "logit_bias": np.zeros(())}, like)
    with pytest.raises(UserError, match=r"'text\.decoder\.weight' has no place in HLIP"):
        hlip.to_jaxmed({**published, "text.decoder.weight": np.zeros(3)})
    with pytest.raises(UserError, match="'text/blocks_0/gate' has no published name"):
        hlip.to_published({"text": {"blocks_0": {"gate": np.zeros(3)}}})
