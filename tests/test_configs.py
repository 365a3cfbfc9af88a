"""Every config runs: its `:runlocal` form, two steps through the trainer, and every argument that it documents."""

import importlib
from pathlib import Path

import pytest

from configs import common
from jaxmed import train
from jaxmed.core.config import Config

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
