"""Every notebook runs from top to bottom, its parameters set to a tiny untrained checkpoint of the demo's model."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmed.core.checkpoint import Checkpoints
from jaxmed.core.config import Config
from jaxmed.data.sources import phantom_raw
from jaxmed.objectives import clip

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def write_run(folder: Path, data: Path) -> None:
    """A workdir as `--config=configs/hlip.py:runlocal` leaves it, but for the two steps of training."""
    config = runpy.run_path(str(ROOT / "configs/hlip.py"))["get_config"]("runlocal").to_dict()
    config["input"]["dir"] = str(data)
    drawn = {"size": config["source"]["size"], "depth": config["source"]["depth"]}
    recipe = {"name": "phantom", "synthetic": True, "value_range": [0, 255], "config": drawn}
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps({"recipe": recipe}))
    tower = config["model"]["image"]
    spec = {"image": jax.ShapeDtypeStruct((1, 1, *tower["img_size"]), "uint8")}
    spec |= {"text": jax.ShapeDtypeStruct((1, 8), "int32"), "_mask": jax.ShapeDtypeStruct((1,), "float32")}
    abstract = jax.eval_shape(clip.make(Config(config), {"any": spec}).init, jax.random.key(0))[0]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.2, x.shape), "float32"), abstract)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(2, {"params": params, "aux": {}}, {"seed": 0})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    write_run(tmp_path / "run", tmp_path / "data")
    phantom_raw.write_raw(tmp_path / "raw", 2)
    given = {"CKPT": tmp_path / "run", "SOURCE": tmp_path / "raw", "GALLERY": tmp_path / "raw", "OUT": tmp_path / "out"}
    program, parameters = [], 0
    for cell in cells(path):
        if cell["cell_type"] != "code":
            continue
        program.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", ()):
            names = {line.split("=")[0].strip() for line in cell["source"] if not line.startswith((" ", "#", "}"))}
            assert given.keys() <= names
            program.append("\n".join(f"{k} = {str(v)!r}" for k, v in given.items()))
            parameters += 1
    assert parameters == 1
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "\n\n".join(program)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "has seen phantoms (synthetic brains) only" in done.stdout

    out = tmp_path / "out"
    rows = list(csv.DictReader((out / "zeroshot/predictions.csv").read_text().splitlines()))
    assert len(rows) == 2
    for row in rows:
        classes = [float(v) for k, v in row.items() if k not in ("key", "path", "scans", "predicted")]
        assert len(classes) == 5 and sum(classes) == pytest.approx(1, abs=1e-4)
        assert (out / f"zeroshot/heatmaps/{row['key']}.png").read_bytes()[:4] == b"\x89PNG"
        assert list((out / f"zeroshot/heatmaps/{row['key']}").glob("*.nii.gz"))
    nearest = list(csv.DictReader((out / "neighbours.csv").read_text().splitlines()))
    assert [r["neighbour"] for r in nearest if r["rank"] == "1"] == list(dict.fromkeys(r["study"] for r in nearest))
    assert all(float(r["cosine"]) == pytest.approx(1, abs=2e-3) for r in nearest if r["rank"] == "1")
    assert len((out / "embeddings.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_not_kept(path):
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells(path) if c["cell_type"] == "code")
