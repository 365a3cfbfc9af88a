"""The golden runner: the product against tensors recorded from the original systems."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity import case as golden


def check(case, expected, reader, waiting) -> tuple[dict, list[str]]:
    """A row for the table and the list of what is wrong."""
    with jax.default_matmul_precision("highest"):
        produced = reader(case)
    tolerance = case.config["tolerance"]
    row = {"case": case.name, "kind": case.kind, "mode": tolerance["mode"], "compared": 0}
    row |= {"worst": "", "error": 0.0, "tolerance": float(tolerance["output"]), "waiting": {}}
    wrong, ratio = [], -1.0
    for key in sorted(set(produced) - set(expected)):
        wrong.append(f"{key}: the reader gives it, the file has no such tensor")
    for key in sorted(expected):
        if key not in produced:
            prefix = next((p for p in waiting if key.startswith(p)), None)
            if prefix is None:
                wrong.append(f"{key}: missing")
            else:
                row["waiting"][prefix] = (row["waiting"].get(prefix, (0,))[0] + 1, waiting[prefix])
            continue
        row["compared"] += 1
        try:
            bound = float(tolerance[key.partition("/")[0]])
            error, bound = golden.error(produced[key], expected[key], tolerance["mode"], bound)
        except AssertionError as e:
            wrong.append(f"{key}: {e}")
            continue
        if error > bound:
            wrong.append(f"{key}: error {error:.3g} above {bound:.3g} ({tolerance['mode']})")
        this = error / bound if bound else (np.inf if error else 0.0)
        if this > ratio:
            ratio = this
            row |= {"worst": key, "error": error, "tolerance": bound}
    if not row["compared"]:
        wrong.append("nothing was compared")
    row["ok"] = not wrong
    return row, wrong


def test_golden(golden_file, rows):
    case, expected = golden.load(golden_file)
    reader, waiting = golden.find_reader(case)
    row, wrong = check(case, expected, reader, waiting)
    rows.append(row)
    assert not wrong, "\n".join([str(golden_file), *wrong])


# The runner itself.

TOLERANCE = {"mode": "abs+rel", "output": 1e-5, "grad": 1e-4}


def write(path, tensors=None, **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"input/x": np.ones(2, np.float32), "output/y": np.ones(2, np.float32)} if tensors is None else tensors
    save_file(tensors, path, {"config": json.dumps({"kind": "double", "tolerance": TOLERANCE, **config})})
    return path


def module(system, **readers):
    return types.SimpleNamespace(SYSTEM=system, READERS=readers, __name__=system)


def test_runner_finds_the_reader(tmp_path):
    a, b = module("a", double=len, other=abs), module("b", double=min)
    case, _ = golden.load(write(tmp_path / "x" / "c.safetensors"))
    assert golden.find_reader(case, [a])[0] is len
    with pytest.raises(LookupError, match=r"config\.system"):
        golden.find_reader(case, [a, b])
    case, _ = golden.load(write(tmp_path / "b" / "c.safetensors"))
    assert golden.find_reader(case, [a, b])[0] is min
    case, _ = golden.load(write(tmp_path / "b" / "c.safetensors", system="a"))
    assert golden.find_reader(case, [a, b])[0] is len
    with pytest.raises(LookupError, match=r"'unheard'; known: double, other"):
        golden.find_reader(dataclasses.replace(case, kind="unheard"), [a, b])


def test_runner_refuses_what_is_no_golden(tmp_path):
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "sizes_public.npz").write_text("data")
    stray = tmp_path / "stray.npz"
    stray.write_text("?")
    assert golden.files(tmp_path) == [stray]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(golden.NotGolden, match="not a safetensors"):
        golden.load(broken)
    with pytest.raises(golden.NotGolden, match="kind or a tolerance"):
        golden.load(write(tmp_path / "n.safetensors", tolerance=None))
    with pytest.raises(golden.NotGolden, match="none of the groups"):
        golden.load(write(tmp_path / "g.safetensors", {"weight": np.ones(1)}))
    with pytest.raises(golden.NotGolden, match="nothing to produce"):
        golden.load(write(tmp_path / "o.safetensors", {"input/x": np.ones(1)}))


def test_runner_compares_every_tensor(tmp_path):
    ones = np.ones(2, np.float32)
    tensors = {"input/x": ones, "output/y": ones, "output/late/z": ones, "grad/x": ones, "output/n": np.arange(2)}
    case, expected = golden.load(write(tmp_path / "c.safetensors", tensors))
    good = {k: v for k, v in expected.items() if k != "output/late/z"}

    def faults(produced, waiting=None):
        return check(case, expected, lambda _: produced, waiting or {})[1]

    row, wrong = check(case, expected, lambda _: good, {"output/late": "later"})
    assert not wrong and row["compared"] == 3 and row["waiting"] == {"output/late": (1, "later")}
    assert "output/late/z: missing" in faults(good)[0]
    assert "has no such tensor" in faults(dict(expected, **{"output/extra": ones}))[0]
    assert "error" in faults(dict(expected, **{"output/y": ones * 1.001}))[0]
    assert not faults(dict(expected, **{"grad/x": ones * 1.00005}))
    assert "error" in faults(dict(expected, **{"output/n": np.array([0, 2])}))[0]
    assert "dtype" in faults(dict(expected, **{"output/n": np.array([0.0, 1.0])}))[0]
    assert "shape" in faults(dict(expected, **{"output/y": ones[:1]}))[0]
    assert "error" in faults(dict(expected, **{"output/y": ones * np.nan}))[0]


def test_runner_tolerance_modes():
    ref = np.array([0.0, -100.0, np.nan, np.inf])
    near = np.array([1e-5, -100.001, np.nan, np.inf])
    assert golden.error(near, ref, "abs+rel", 1e-5)[0] == pytest.approx(1e-5, rel=0.02)
    assert golden.error(near, ref, "abs", 1e-5)[0] == pytest.approx(1e-3, rel=0.01)
    assert golden.error(near, ref, "scaled", 1e-5)[0] == pytest.approx(1e-5, rel=0.01)
    assert golden.error(np.zeros(4), ref, "abs", 1.0)[0] == np.inf
    assert golden.error(np.zeros(2), np.zeros(2), "scaled", 0.0)[0] == 0.0
    assert golden.error(np.full(2, 1e-9), np.zeros(2), "scaled", 1.0)[0] == np.inf
