"""The command before a run: its table, its file, its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed import preflight, preflight_plans
from jaxmed.core.command import exit_code
from tests.data.test_plan_modes import population

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module.. method is deprecated:DeprecationWarning"
)  # ml_collections

ROOT = Path(__file__).parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'radiograph_mae.py'}"


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "sizes.npz"
    made = population(4000, seed=9)
    np.savez(path, H=made["height"].astype(np.int16), W=made["width"].astype(np.int16))
    return path


def run(*arguments):
    return exit_code(preflight.main, [CONFIG, "--devices=1", *map(str, arguments)])


def test_the_command(sizes, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxmed.preflight", CONFIG, f"--sizes={sizes}", f"--json={tmp_path / 'out.json'}"],
        cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plans = json.loads((tmp_path / "out.json").read_text())["plans"]
    assert [p["mode"] for p in plans] == ["dbb", "length", "length", "pack", "pack"]
    for plan in plans:
        assert set(plan) == {"mode", "plan", *preflight_plans.COLUMNS}
        assert plan["plan"] in done.stdout and f"{plan['tokens']:.2f}" in done.stdout
    assert [p["shapes"] <= most for p, most in zip(plans, (72, 16, 32, 1, 17))] == [True] * 5


def test_it_fails_when_a_bound_is_exceeded(sizes, capsys):
    assert run(f"--sizes={sizes}") == 0
    assert run(f"--sizes={sizes}", "--config.preflight.bounds.length16.tokens=100.0") == 1
    assert "error: length16: tokens is 10" in capsys.readouterr().err
    assert run(f"--sizes={sizes}", "--config.preflight.bounds.length16.shapes=15") == 1
    assert "length16: shapes is 16" in capsys.readouterr().err


def test_one_point_more_on_other_lists(sizes, monkeypatch):
    with np.load(sizes) as file:
        height, width = (file[k].astype(np.int64) for k in "HW")
    row = next(
        r
        for r in preflight_plans.table(height, width, patch=48, cost={}, budget=65536, devices=1)
        if r["plan"] == "length16"
    )
    bound = f"--config.preflight.bounds.length16.tokens={row['tokens'] - 0.5}"
    assert run(f"--sizes={sizes}", bound) == 0
    monkeypatch.setattr(preflight_plans, "PUBLISHED", preflight_plans.fingerprint(height, width))
    assert run(f"--sizes={sizes}", bound) == 1


@pytest.mark.parametrize(
    "arrays, message",
    [
        (None, "there is no such file"),
        (b"not an archive", "not an npz file"),
        ({"H": [1]}, "it needs the arrays H and W"),
        ({"H": [1, 2], "W": [1]}, "a positive whole number for height and width"),
        ({"H": [1.5], "W": [1.5]}, "a positive whole number"),
        ({"H": [0], "W": [3]}, "a positive whole number"),
        ({"H": np.zeros(0, int), "W": np.zeros(0, int)}, "a positive whole number"),
    ],
)
def test_bad_sizes_are_one_line(tmp_path, capsys, arrays, message):
    path = tmp_path / "sizes.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    assert run(f"--sizes={path}") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--sizes={path}: " in said and message in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--config.preflight.bounds.length16.words=1",), "the config has no field 'words'"),
        (("stray",), "unexpected argument 'stray'"),
        (("--config.input.budget=0",), "config.input.budget=0: give a number of at least 1"),
        (("--config.input.plan_options.cost.width=0",), "cost.width=0: give the size of the model"),
        (("--devices=0",), "--devices=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(sizes, capsys, arguments, message):
    assert run(f"--sizes={sizes}", *arguments) == 2
    assert message in capsys.readouterr().err


def test_other_configs_cannot_be_compared(sizes, capsys):
    for name, message in (("hlip", "the config needs input.patch"), ("nothing", "there is no such file")):
        config = f"--config={ROOT / 'configs' / name}.py"
        assert exit_code(preflight.main, [config, f"--sizes={sizes}"]) == 2
        assert message in capsys.readouterr().err


def test_an_index_of_shards_will_do(tmp_path, capsys):
    np.savez(tmp_path / "index.npz", height=np.full(50, 960), width=np.full(50, 480), key=np.array(["a"] * 50))
    assert run(f"--sizes={tmp_path / 'index.npz'}") == 0
    assert "50 images" in capsys.readouterr().out
