"""`python -m jaxmed.show WORKDIR|DATASET [--out=x.html]`: what a run has learnt, or what is in a dataset, as one HTML
file that needs nothing else (or, with `--out=x.png`, its pictures alone)."""

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed import show_pictures as pictures
from jaxmed.core import metrics
from jaxmed.core.command import exit_code
from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file
from jaxmed.data import shards
from jaxmed.data.record import Study
from jaxmed.evals import examples

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1150px;padding:0 1em;color:#1c2330}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #dde2ea}
td:first-child,th:first-child{text-align:left}.big td{font-size:1.15em}.note{background:#fff4d6;padding:.6em 1em;
border-left:4px solid #e0a800}.study{display:flex;gap:1.2em;border-top:1px solid #dde2ea;padding:1em 0;flex-wrap:wrap}
.study figure{margin:0}figcaption{font-size:.85em;color:#5a6577}.right{color:#0a7d32;font-weight:600}
pre{background:#f5f7fa;padding:1em;overflow:auto;font-size:12px}img{max-width:100%}small{color:#5a6577}
"""


# ---- Pieces of HTML.


def page(title: str, parts: Iterable[str]) -> str:
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return f"{head}<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"


def img(data: bytes, alt: str = "") -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def grid(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), style: str = "") -> str:
    def cells(row, tag):
        return "".join(f"<{tag}>{html.escape(_text(x))}</{tag}>" for x in row)

    lines = [cells(header, "th")] if header else []
    lines += [cells(row, "td") for row in rows]
    return f"<table class='{style}'>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def details(title: str, value: Any) -> str:
    text = html.escape(json.dumps(value, indent=1, default=str))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"


def _text(x: Any) -> str:
    return "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


SYNTHETIC = (
    "<p class=note><b>Synthetic data.</b> These studies are phantoms, drawn by a program; nobody is in them.</p>"
)


# ---- A run.


def report(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Writes `workdir/report.html` (or `out`) from what a run left in `workdir`; reads nothing else.

    Raises:
      UserError: there is no run in `workdir`.
    """
    workdir = Path(workdir)
    lines = metrics.read(workdir)
    if not lines:
        raise UserError(f"{workdir} has no metrics.jsonl with a line in it: is it the --workdir of a run?")
    summary, config = (_json(workdir / name) for name in ("summary.json", "config.json"))
    evals = sorted(p for p in (workdir / "evals").glob("*") if p.is_dir())
    before, after = before_and_after(summary, lines, [p.name for p in evals])
    about = _examples_about(evals)
    parts = [SYNTHETIC] if about.get("synthetic") else []
    parts += [_headline(before, after), "<h2>Curves</h2>", img(pictures.curves(lines, panels(lines)), "curves")]
    if evals:
        parts.append("<h2>Example studies of unseen subjects</h2>")
        parts += [_predictions(p) for p in evals] + [_retrieved(p) for p in evals] + [_baselines(p) for p in evals]
    rows = [(k, before.get(k), v) for k, v in after.items()]
    parts += ["<h2>All results</h2>", grid(rows, ("", "before", "after")), "<h2>The run</h2>"]
    facts = ("steps", "seconds", "num_params", "params_sha256", "plan_hash")
    parts.append(grid([(k, summary[k]) for k in facts if k in summary]))
    parts += [details("config", config), details("versions", summary.get("versions", {}))]
    out = Path(out or workdir / "report.html")
    title = f"jaxmed: {config.get('title') or workdir.name}"
    write_file(out, page(title, parts).encode())
    return out


def before_and_after(summary: Mapping, lines: Sequence[Mapping], names: Sequence[str]) -> tuple[dict, dict]:
    """The first and the last evaluation: from summary.json, or of an unfinished run from its metrics."""
    if summary.get("after"):
        return summary["before"], summary["after"]
    evaluated = [x for x in lines if any(k.split("/")[0] in names for k in x)]
    clean = [{k: v for k, v in x.items() if k.split("/")[0] in names} for x in evaluated]
    return (clean[0], clean[-1]) if clean else ({}, {})


def _headline(before: Mapping, after: Mapping) -> str:
    rows = []
    for key, value in after.items():
        evaluator, _, name = key.partition("/")
        if name == "auc_macro":
            interval = [after.get(f"{key}_{end}") for end in ("low", "high")]
            where = "" if None in interval else " (95 % interval {:.3f} to {:.3f})".format(*interval)
            rows.append((f"{evaluator}: macro AUC{where}", 0.5, before.get(key), value))
        elif name.endswith("_auc_macro"):
            rows.append((f"{evaluator}: macro AUC, logistic regression on the {name[:-10]} alone", 0.5, None, value))
        elif name.endswith("R@5"):
            words = name.replace("_", " ")
            rows.append((f"{evaluator}: {words}", after.get(f"{key}_chance"), before.get(key), value))
    if not rows:
        return ""
    return "<h2>Results</h2>" + grid(rows, ("", "chance", "before training", "after training"), "big")


def panels(lines: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Which metrics go into which picture: losses, what is named alike, and evaluations by evaluator."""
    names = list(dict.fromkeys(k for line in lines for k, v in line.items() if k != "step" and v is not None))
    counts = {n: sum(line.get(n) is not None for line in lines) for n in names}
    result: dict[str, list[str]] = {}
    for name in names:
        group, _, rest = name.partition("/")
        if rest.endswith(("_chance", "studies", "reports", "rank", "fitted", "over_chance")) or counts[name] < 2:
            continue
        if rest.startswith("auc/"):
            group = f"{group}: AUC by class"
        elif "R@" in rest:
            group = f"{group}: R@k"
        result.setdefault(group, []).append(name)
    order = sorted(result, key=lambda g: (g != "loss", not any("/" in n for n in result[g])))
    return {g: result[g] for g in order[:12]} or {"loss": ["loss"]}


def _examples_about(evals: Sequence[Path]) -> dict:
    for folder in evals:
        if (folder / examples.NAME).exists():
            with np.load(folder / examples.NAME) as data:
                return json.loads(str(data["about"]))
    return {}


def _predictions(folder: Path) -> str:
    """Example studies of one evaluator with its scores, if it wrote them."""
    if not (folder / examples.NAME).exists():
        return ""
    steps = sorted(folder.glob("step-*.npz"))
    runs = {}
    for path in dict.fromkeys([steps[0], steps[-1]] if steps else []):
        with np.load(path) as data:
            runs[f"step {int(path.stem[5:])}"] = {k: data[k] for k in ("ids", "labels", "scores", "classes")}
    parts = []
    with np.load(folder / examples.NAME) as data:
        for e, study in enumerate(json.loads(str(data["about"]))["studies"]):
            parts.append(f"<div class=study>{_study(data, e, study)}<div>{_scores(runs, study)}</div></div>")
    return "".join(parts)


def _scores(runs: Mapping[str, Mapping], study: Mapping) -> str:
    found = {}
    for name, run in runs.items():
        at = np.flatnonzero(run["ids"] == study["id"])
        if len(at):
            found[name] = run["scores"][at[0]]
            names, truth = [str(c) for c in run["classes"]], run["labels"][at[0]]
    if not found:
        return ""
    best = names[int(np.argmax(list(found.values())[-1]))]
    right = ", ".join(n for n, t in zip(names, truth) if t > 0.5) or "none"
    mark = "right" if best in right.split(", ") else ""
    text = f"truth <b>{html.escape(right)}</b>, prediction <span class='{mark}'>{html.escape(best)}</span>"
    return f"<p>{text}</p>{img(pictures.bars(names, found, truth), 'scores')}"


def _study(data: Mapping[str, np.ndarray], e: int, study: Mapping) -> str:
    figures = []
    for s, scan in enumerate(study["scans"]):
        key = f"mask/{e}/{s}"
        picture = pictures.strip(data[f"image/{e}/{s}"], data.get(key))
        words = [f"{scan['name']}, {' x '.join(map(str, scan['shape']))}", str(scan["meta"].get("plane", ""))]
        if "cnr" in scan["meta"]:
            words.append(f"CNR {scan['meta']['cnr']:.1f}")
        caption = html.escape(", ".join(w for w in words if w))
        figures.append(f"<figure>{img(pictures.png(picture), scan['name'])}<figcaption>{caption}</figcaption></figure>")
    meta = study["scans"][0]["meta"] if study["scans"] else {}
    size = f"<br><small>lesion {meta['lesion_mm']} mm, {meta['lesion_ml']} ml</small>" if "lesion_mm" in meta else ""
    text = f"<p style='max-width:34em'>{html.escape(' '.join(study['sentences']))}{size}</p>"
    return (
        f"<div>{text}<div style='display:flex;flex-wrap:wrap;gap:.5em;max-width:800px'>{''.join(figures)}</div></div>"
    )


def _retrieved(folder: Path) -> str:
    paths = sorted(folder.glob("step-*.json"))
    if not paths:
        return ""
    got = _json(paths[-1])
    parts = [f"<h2>Reports found for studies ({folder.name}, step {got['step']}, of {got['reports']} reports)</h2>"]
    for query in got["queries"]:
        found = []
        for item in query["found"]:
            mark = "right" if item["report"] == query["report"] else ""
            found.append(f"<li class='{mark}'>{html.escape(item['report'])} <small>{item['cosine']:.3f}</small></li>")
        parts.append(f"<p><b>Own report (rank {query['rank']}):</b> {html.escape(query['report'])}</p>")
        parts.append(f"<ol>{''.join(found)}</ol>")
    return "".join(parts)


def _baselines(folder: Path) -> str:
    if not (folder / "baselines.json").exists():
        return ""
    got = _json(folder / "baselines.json")
    classes = list(next(iter(got["auc"].values())))
    rows = [(f"AUC of the {kind}", *(aucs[c] for c in classes)) for kind, aucs in got["auc"].items()]
    fields = sorted({k for fields in got["meta"].values() for k in fields})
    for field in fields:
        spread = [got["meta"][c].get(field) for c in classes]
        rows.append((field, *("-" if s is None else "{1:.4g} ({0:.4g} to {2:.4g})".format(*s) for s in spread)))
    title = f"<h2>Without a model ({folder.name})</h2><p>Logistic regressions, and what the records say of their scans"
    return f"{title} (median, 10th to 90th percentile).</p>{grid(rows, ('', *classes))}"


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


# ---- A dataset.


def contact_sheet(dataset: shards.Shards, ids: Sequence[int]) -> tuple[list[tuple[Study, np.ndarray]], np.ndarray]:
    """Each study with its picture (one row per scan), and all pictures in one."""
    shown = []
    for study in dataset.read(ids):
        rows = [pictures.strip(*examples.slices_of(scan, 5)) for scan in study["scans"]]
        shown.append((study, pictures.stack(rows)))
    return shown, pictures.stack([picture for _, picture in shown], gap=14)


def dataset_page(dir: Path, split: str | None, count: int) -> tuple[str, np.ndarray]:
    """The HTML of a dataset folder, and its contact sheet."""
    dataset = shards.open_dataset(dir)
    index, manifest = dataset.index, dataset.manifest
    ids = np.arange(len(dataset)) if split is None else shards.split_ids(dataset, split)
    ids = ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)]
    shown, sheet = contact_sheet(dataset, ids)
    parts = [SYNTHETIC] if manifest["recipe"].get("synthetic") else []
    rows = [("studies", len(dataset)), ("scans", int(index["scans"].sum())), ("slices", int(index["slices"].sum()))]
    rows += [(f"split {k!r}", v) for k, v in manifest["splits"].items()]
    rows += [(f"label {c!r}", int(np.nansum(index[f"label/{c}"]))) for c in manifest["classes"]]
    parts += [grid(rows), details("recipe", manifest["recipe"]), "<h2>Studies</h2>"]
    for study, picture in shown:
        names = ", ".join(f"{s['name']} {' x '.join(map(str, s['voxels'].shape))}" for s in study["scans"])
        labels = ", ".join(k for k, v in study["labels"].items() if v > 0.5)
        text = html.escape(" ".join(study["sentences"]) or "no report")
        caption = f"<b>{html.escape(study['key'])}</b> {html.escape(labels)}<br>{text}<br><small>{html.escape(names)}"
        parts.append(f"<div class=study><div>{img(pictures.png(picture))}</div><p>{caption}</small></p></div>")
    dataset.close()
    return page(f"jaxmed: {manifest['name']}", parts), sheet


# ---- The command.


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxmed.show", description=__doc__)
    parser.add_argument("dir", type=Path, help="workdir of a run, or folder of a dataset")
    parser.add_argument("--out", type=Path, help="x.html or x.png [DIR/report.html]")
    parser.add_argument("--split", help="of a dataset: the split to show [all]")
    parser.add_argument("--studies", type=int, default=12, help="of a dataset: how many to show [12]")
    args = parser.parse_args(argv)
    return exit_code(lambda: print(show(args.dir, args.out or args.dir / "report.html", args.split, args.studies)))


def show(dir: Path, out: Path, split: str | None = None, studies: int = 12) -> Path:
    """Writes `out` for a workdir or a dataset folder.

    Raises:
      UserError: `dir` is neither, or `out` is no .html or .png.
    """
    if out.suffix not in (".html", ".png"):
        raise UserError(f"--out={out}: give a name that ends in .html or .png")
    if studies < 1:
        raise UserError(f"--studies={studies}: give a number of at least 1")
    if not (dir / shards.MANIFEST).exists() and not (dir / "metrics.jsonl").exists():
        raise UserError(f"{dir} has neither {shards.MANIFEST} (a dataset) nor metrics.jsonl (a run)")
    out.parent.mkdir(parents=True, exist_ok=True)
    if (dir / shards.MANIFEST).exists():
        text, sheet = dataset_page(dir, split, studies)
        write_file(out, text.encode() if out.suffix == ".html" else pictures.png(sheet))
        return out
    if out.suffix == ".html":
        return report(dir, out)
    lines = metrics.read(dir)
    write_file(out, pictures.curves(lines, panels(lines)))
    return out


if __name__ == "__main__":
    sys.exit(main())
