"""Every config runs: its `:runlocal` form, two steps through the trainer, and every argument that it documents."""

import importlib
from pathlib import Path

import jax
import pytest

from configs import common
from jaxmed import train
from jaxmed.core.config import Config
from jaxmed.core.load import load

CONFIGS = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py") if p.stem[0] != "_")
CONFIGS.remove("common")


def get(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_of_every_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(get(name, "runlocal").to_dict())
    assert config.get("report") in (None, "show")  # main reads it
    summary = train.run(config, tmp_path / "run", say=lambda line: None)
    assert summary["steps"] == 2 and summary["finished"]


@pytest.mark.parametrize("name", CONFIGS)
def test_headers_are_lab_books(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    for word in ("System", "python -m jaxmed.main", "Hardware", "Expected", "Deviations"):
        assert word in text, f"configs/{name}.py does not say {word}"
    get(name)


def test_arguments_have_the_types_of_their_defaults():
    assert common.parse_arg("demo,lr=0.1,n=3", demo=False, lr=1e-3, n=1) == {"demo": True, "lr": 0.1, "n": 3}
    with pytest.raises(ValueError, match="'dmo' is not one of demo"):
        common.parse_arg("dmo", demo=False)
    with pytest.raises(ValueError, match="give a int"):
        common.parse_arg("n=x", n=1)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("hlip", "siglip_vit_base_singlescan_h2_token2744"),
        ("hlip", "clip_vit_base_slice_scan_dualdinotxt2744"),
        ("hlip", "hlip-2025-10-08"),
        ("hlip", "tiny"),
        ("hlip_brain_published", "hlip-2025-10-08"),
        ("hlip_brain_published", "clip_vit_base_multiscan_h2_token588"),
    ],
)
def test_loss_and_towers_fit_every_kind_of_variant(name, variant):
    config = Config(get(name, f"variant={variant}").to_dict())
    shapes = {"image": (2, 2, 24, 64, 64), "scan_depths": (2, 2), "_mask": (2,), "text": (2, 8), "sentence": (2, 8)}
    keys = {"_mask", "scan_depths", *config.input["keys"]}
    dtypes = {"image": "uint8", "_mask": "float32"}
    spec = {(): {k: jax.ShapeDtypeStruct(shapes[k], dtypes.get(k, "int32")) for k in keys}}
    objective = load("objectives", "clip").make(config, spec)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    assert set(params) >= {"image", "text", "logit_scale"}


def test_quick_says_whether_everything_runs_on_ones_own_shards(tmp_path):
    """As a user tries it: studies of another grid than the model's, few of them."""
    source = load("data.sources", "phantom")
    source.make(tmp_path / "shards", train=6, test=0, size=64, depth=(24, 24), scans=(1, 2))
    config = get("hlip", "quick")
    config.input.dir = str(tmp_path / "shards")
    config.input.batch_size = config.evals.retrieval.input.batch_size = 8  # of the devices that tests simulate
    config.total_steps = 2
    config.schedule.warmup_steps = 1
    del config["report"]  # main reads it
    summary = train.run(Config(config.to_dict()), tmp_path / "run", say=lambda line: None)
    assert summary["finished"] and summary["after"]["retrieval/studies"] == 6
