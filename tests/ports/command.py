"""What tests of `python -m jaxmed.port` share."""

from pathlib import Path

import numpy as np
from safetensors import safe_open

from jaxmed import port

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden(system: str, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Published parameters of a golden, and its other tensors."""
    with safe_open(GOLDENS / system / f"{name}.safetensors", framework="np") as f:
        every = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    params = {k.removeprefix("param/"): x for k, x in every.items() if k.startswith("param/")}
    return params, {k: x for k, x in every.items() if not k.startswith("param/")}


def run(system: str, capsys, *args: str) -> str:
    """The command in this process, which must succeed; what it printed."""
    code = port.main([f"--system={system}", *(word for a in args for word in str(a).split())])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def fails(system: str, capsys, *args: str) -> str:
    """The command in this process, which must fail with one line; that line."""
    code = port.main([f"--system={system}", *(word for a in args for word in str(a).split())])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def same(a: dict, b: dict) -> None:
    """The same names, dtypes and values."""
    assert a.keys() == b.keys()
    for k, x in a.items():
        assert b[k].dtype == x.dtype, k
        np.testing.assert_array_equal(b[k], x, err_msg=k)
