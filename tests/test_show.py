"""`show`: a run or a dataset as one file that needs nothing else."""

import json
import re

import numpy as np
import pytest

from jaxmed import show
from jaxmed.core import sharding
from jaxmed.core.errors import UserError
from jaxmed.data.shards import open_dataset
from jaxmed.data.sources import phantom
from jaxmed.evals import baselines, examples


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return phantom.make(tmp_path_factory.mktemp("show") / "data", train=12, test=5, size=24, step_mm=8.0)


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory):
    """What a run leaves, without running one."""
    dir = tmp_path_factory.mktemp("run")
    names = list(phantom.CLASSES)
    before = {"zeroshot/auc_macro": 0.5, "retrieval/image_to_text_R@5": 0.02}
    after = {
        "zeroshot/auc_macro": 0.93, "zeroshot/auc_macro_low": 0.9, "zeroshot/auc_macro_high": 0.95,
        "zeroshot/auc/mass": 0.91, "retrieval/image_to_text_R@5": 0.4, "retrieval/image_to_text_R@5_chance": 0.02,
        "baselines/histogram_auc_macro": 0.61,
    }  # fmt: skip
    lines = [{"step": 0, **before}]
    lines += [{"step": s, "loss": 3.0 / s, "accuracy/image_to_text": 0.1 * s, "grad_norm": None} for s in (1, 2, 3)]
    lines += [{"step": 3, **after}]
    (dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (dir / "config.json").write_text(json.dumps({"title": "<toy>", "seed": 0}))
    (dir / "summary.json").write_text(json.dumps({"before": before, "after": after, "steps": 3, "seconds": 1.5}))
    data = open_dataset(dataset)
    ids = np.flatnonzero(data.index["split"] == "test")
    examples.save(dir / "evals" / "zeroshot", data, ids)
    labels = np.stack([data.index[f"label/{c}"][ids] for c in names], axis=1)
    for step, value in ((0, np.full_like(labels, 0.2)), (3, labels)):
        columns = dict(ids=ids, labels=labels, scores=value, classes=np.array(names))
        np.savez(dir / "evals" / "zeroshot" / f"step-{step:08d}.npz", **columns)
    query = {"study": "k", "report": "a <b> mass", "rank": 2}
    query["found"] = [{"report": "none", "cosine": 0.5}, {"report": "a <b> mass", "cosine": 0.4}]
    (dir / "evals" / "retrieval").mkdir()
    found = {"step": 3, "reports": 9, "queries": [query]}
    (dir / "evals" / "retrieval" / "step-00000003.json").write_text(json.dumps(found))
    evaluator = baselines.Evaluator(
        {}, mesh=sharding.make_mesh(), outdir=dir / "evals" / "baselines", input={"dir": str(dataset)}
    )
    dict(evaluator.run({"step": 0}))
    return dir


def check_self_contained(text):
    assert text.startswith("<!doctype html>")
    assert not re.findall(r'(?:src|href)=(?!"data:)', text)
    assert text.count("data:image/png;base64,") >= 3


def test_report_of_a_run(workdir, capsys):
    path = show.report(workdir)
    assert path == workdir / "report.html"
    text = path.read_text()
    check_self_contained(text)
    assert "Synthetic data" in text and "&lt;toy&gt;" in text and "<toy>" not in text
    assert "0.900 to 0.950" in text and "logistic regression on the histogram alone" in text
    assert "a &lt;b&gt; mass" in text and "rank 2" in text and "lesion_ml" in text
    assert text.count("class=study") == 5 and "prediction <span class='right'>" in text
    for field in ("0.93", "0.02", "step 3"):
        assert field in text
    assert show.main([str(workdir), f"--out={workdir / 'x.png'}"]) == 0
    assert (workdir / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_report_of_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert "curves" in show.report(tmp_path).read_text()


def test_contact_sheet_of_a_dataset(dataset, tmp_path, capsys):
    out = tmp_path / "sheet.html"
    assert show.main([str(dataset), f"--out={out}", "--split=train", "--studies=3"]) == 0
    text = out.read_text()
    check_self_contained(text)
    assert text.count("class=study") == 3 and "Synthetic data" in text and "label &#x27;mass&#x27;" in text
    assert show.main([str(dataset), f"--out={tmp_path / 'sheet.png'}", "--studies=2"]) == 0
    capsys.readouterr()


def test_bad_input_is_one_line(tmp_path, dataset, capsys):
    for args in (
        [str(tmp_path)],
        [str(dataset), "--out=x.pdf"],
        [str(dataset), f"--out={tmp_path / 'x.html'}", "--split=no"],
    ):
        assert show.main(args) == 2
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        show.report(tmp_path)
