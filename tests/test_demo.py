"""The README's first command, shortened: it must learn, and what it learns must not be in the grey values alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_demo_learns_to_tell_lesions_of_unseen_subjects(tmp_path):
    options = {"source.dir": tmp_path / "data", "source.train": 1200, "source.test": 150, "total_steps": 400}
    options |= {f"evals.{name}.input.dir": tmp_path / "data" for name in ("zeroshot", "retrieval", "baselines")}
    options["input.dir"] = tmp_path / "data"
    flags = [f"--config.{k}={v}" for k, v in options.items()]
    # Compiled with care, on one device: as a user runs it, not as the other tests do.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxmed.main", "--config=configs/hlip.py:demo", f"--workdir={tmp_path}/run", *flags],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["zeroshot/auc_macro"] < 0.65
    assert after["zeroshot/auc_macro"] > 0.75
    assert after["retrieval/image_to_text_R@5_over_chance"] > 3.0
    assert before["baselines/histogram_auc_macro"] < 0.75
    assert before["baselines/histogram_auc_macro"] < after["zeroshot/auc_macro"] - 0.05
    assert before["baselines/metadata_auc_macro"] < 0.6
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000
