"""`python -m jaxmed.evaluate`: how good is a model on prepared, labelled studies? Zero-shot, probe, k-NN, retrieval.

OUT/results.json     metrics with 95 % bootstrap intervals (patients drawn again), and what they were computed from
OUT/scores.csv       a row per study: its key, its labels, its scores
OUT/features/        embeddings; the next call with the same weights and data reads no image (--cache: another folder)

python -m jaxmed.evaluate suites [NAME]      the named suites: prompts, where the data are, how to prepare them
python -m jaxmed.evaluate labels TABLE... --suite=NAME --out=labels.csv
                                             a manifest for prep from a published table of labels
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxmed import predict_prompts
from jaxmed.core.command import exit_code
from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file
from jaxmed.core.metrics import table
from jaxmed.evals import label_tables, prompts, suites
from jaxmed.evaluate_features import Embedder
from jaxmed.evaluate_tasks import PROTOCOLS, TASKS, Options

_SHOWN = ("auc", "average_precision", "balanced_accuracy", "weighted_f1", "recall", "precision")


def evaluate(
    *,
    ckpt: str,
    data: str,
    task: str,
    out: str | Path,
    cache: str | None = None,
    batch: int = 8,
    vocab: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs one task and writes OUT.

    Args:
      ckpt: see `predict_model.load_model`.
      data: folder of shards.
      task: one of `evaluate_tasks.TASKS`.
      cache: of embeddings [OUT/features].
      batch: studies per call of the model, at least one per device.
      vocab: of the text tower [that of the training].
      options: of `evaluate_tasks.Options`.

    Returns:
      The content of results.json.

    Raises:
      UserError: an argument is wrong, or the data lack what the task needs; nothing is written then.
    """
    begun, out = time.perf_counter(), Path(out)
    if task not in TASKS:
        raise UserError(f"--task={task}: choose one of {', '.join(TASKS)}")
    chosen = Options(**options)
    if chosen.protocol not in PROTOCOLS:
        raise UserError(f"--protocol={chosen.protocol}: choose one of {', '.join(PROTOCOLS)}")
    _refuse_unused(task, chosen)
    if chosen.suite:
        suites.get(chosen.suite)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror}); choose another folder") from None
    embedder = Embedder(ckpt, data, cache or out / "features", batch=batch, vocab=vocab)
    answer = TASKS[task](embedder, chosen)
    dataset, notes = embedder.dataset, []
    recipe, trained = dataset.manifest["recipe"].get("name"), (embedder.loaded.recipe or {}).get("name")
    for whose, other in (("the model's training data", trained), (f"suite {chosen.suite}", _recipe(chosen.suite))):
        if other and other != recipe:
            notes.append(f"the data were prepared with recipe {recipe!r}, those of {whose} with {other!r}")
    if task in ("zeroshot", "retrieval"):
        notes += predict_prompts.doubts(embedder.loaded.path, embedder.loaded.text, vocab)
    results = {
        "schema": 1,
        "task": task,
        "protocol": chosen.protocol,
        "options": dataclasses.asdict(chosen),
        "checkpoint": embedder.loaded.path,
        "params_sha256": embedder.params_sha256,
        "data": {"dir": str(data), "name": dataset.name, "fingerprint": dataset.fingerprint, "split": chosen.split},
        **answer.results,
        "notes": notes,
        "features": {"computed": embedder.computed, "reused": embedder.reused},
        "seconds": time.perf_counter() - begun,
    }
    results = _plain(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "patient", *answer.columns])
    for i, id in enumerate(answer.ids):
        cells = (_cell(x[i]) for x in answer.columns.values())
        writer.writerow([dataset.index["key"][id], dataset.index["patient"][id], *cells])
    write_file(out / "scores.csv", text.getvalue().encode())
    write_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def _refuse_unused(task: str, o: Options) -> None:
    """An option that would do nothing is a mistake."""
    only = {
        "prompts": ("zeroshot",),
        "protocol": ("zeroshot",),
        "shots": ("probe",),
        "seeds": ("probe",),
        "k": ("knn",),
        "train_split": ("probe", "knn"),
        "suite": ("zeroshot", "probe", "knn"),
        "classes": ("zeroshot", "probe", "knn"),
        "threshold_split": ("zeroshot", "probe", "knn"),
        "calibrate_split": ("zeroshot", "probe", "knn"),
    }
    for field in dataclasses.fields(Options):
        given = getattr(o, field.name) != field.default
        if given and task not in only.get(field.name, (task,)):
            raise UserError(f"--{field.name.replace('_', '-')} does not go with --task={task}")
    if task in ("probe", "knn") and o.train_split == o.split:
        raise UserError(f"--train-split={o.split}: is the split that is reported on; choose another")
    if o.seeds != Options.seeds and not o.shots:
        raise UserError("--seeds needs --shots")
    for name, numbers in (("shots", o.shots), ("k", o.k), ("seeds", (o.seeds,))):
        if any(n < 1 for n in numbers) or (name == "k" and not numbers):
            raise UserError(f"--{name}: give numbers of 1 or more")


def _recipe(suite: str | None) -> str | None:
    return suites.get(suite).recipe if suite else None


def _plain(x: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x


def _cell(x: np.number) -> str:
    return "" if np.isnan(x) else f"{x:.9g}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    """Runs the command in this process; returns the exit code."""
    commands = {"suites": _suites, "labels": _labels}
    if argv[:1] and argv[0] in commands:
        return exit_code(commands[argv[0]], argv[1:])
    return exit_code(_evaluate, argv)


def _evaluate(argv: list[str]) -> int:
    parser = _Parser(
        prog="python -m jaxmed.evaluate",
        description=__doc__,
        epilog=f"suites: {', '.join(suites.SUITES)}\n\nprompts: " + predict_prompts.FORM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = Options()
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help="a run, one of its checkpoints, or ported weights")
    add("--data", required=True, metavar="DIR", help="shards with labels")
    add("--task", required=True, help=f"one of {', '.join(TASKS)}")
    add("--out", required=True, metavar="DIR")
    add("--split", default=default.split, help="the studies to report on (default: test)")
    add("--suite", metavar="NAME", help="named prompts and classes; for probe and knn only the classes")
    add("--prompts", metavar="FILE", help="zeroshot: JSON, see below (default: those that the run was evaluated with)")
    add(
        "--classes",
        type=_words,
        default=(),
        metavar="A,B",
        help="only these (default: all of the suite, or of the data)",
    )
    add("--token", type=int, metavar="N", help="image token, 0: sentences, -1: reports (default: what the suite or the "
        "loss says; probe and knn: all, side by side)")  # fmt: skip
    add("--protocol", default=default.protocol, help="held-out (default): the labels that are reported on choose "
        "nothing; published: beside that, the numbers as the suite's publication computes them, if need be with "
        "thresholds searched on the test labels")  # fmt: skip
    add("--threshold-split", metavar="SPLIT", help="choose each class's threshold there (default: 0.5)")
    add("--calibrate-split", metavar="SPLIT", help="fit a temperature there; calibration is reported before and after")
    add("--train-split", default=default.train_split, metavar="SPLIT", help="probe, knn: studies to learn from")
    add("--shots", type=_numbers, default=(), metavar="1,2,4", help="probe: also with so many studies per class ...")
    add("--seeds", type=int, default=default.seeds, metavar="N", help="... drawn so often (default: 5)")
    add("--k", type=_numbers, default=default.k, metavar="5,20", help="knn: neighbours; the first gives the table "
        "(default: 20)")  # fmt: skip
    add("--bootstrap", type=int, default=default.bootstrap, metavar="N", help="resamplings (default: 1000; 0: none)")
    add("--seed", type=int, default=default.seed, metavar="N", help="of everything that is drawn")
    add("--batch", type=int, default=8, metavar="N", help="studies per call of the model (default: 8)")
    add("--vocab", metavar="FILE", help="of the text tower (default: that of the training)")
    add("--cache", metavar="DIR", help="of embeddings (default: OUT/features)")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.bootstrap < 0:
        parser.error("--batch must be 1 or more, --bootstrap 0 or more")
    logging.set_verbosity(logging.FATAL)  # orbax logs what checkpoint.py says in one line
    results = evaluate(**vars(args))
    print(show(results))
    print(f"{args.out}: results.json, scores.csv; embeddings "
          + ", ".join(f"{k}: {'; '.join(v)}" for k, v in results["features"].items() if v))  # fmt: skip
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _words(text))


def show(results: dict[str, Any]) -> str:
    """The results as a table."""
    macro, lines = results["metrics"]["macro"], []
    if results["task"] == "retrieval":
        lines.append(table([("retrieval", "value (95 %)"), *((k, _interval(v)) for k, v in macro.items())]))
    else:
        shown = [m for m in _SHOWN if m in macro]
        rows = [("class", "with / known", *shown)]
        for name, metrics in results["metrics"]["classes"].items():
            count = f"{metrics['positives']} / {metrics['studies']}"
            rows.append((name, count, *(_interval(metrics.get(m)) for m in shown)))
        rows.append(("all", str(results["studies"]), *(_interval(macro[m]) for m in shown)))
        lines.append(table(rows))
        lines.append(f"{results['kind']}; thresholds: {results['thresholds']}; 95 % intervals over patients")
    for name in ("calibration", "calibration_after"):
        if values := results.get(name):
            numbers = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            lines.append(f"{name.replace('_', ', ')}: {numbers}")
    for k, values in results.get("few_shot", {}).items():
        spread = ", ".join(f"{m} {values[m]['mean']:.3f} ± {values[m]['std']:.3f}" for m in _SHOWN if m in values)
        lines.append(f"{k} per class: {spread}")
    if len(results.get("by_k", {})) > 1:
        lines += [f"k={k}: auc {_interval(v['auc'])}" for k, v in results["by_k"].items()]
    lines += [f"{k}: {v:.4f}" for k, v in results.get("tasks", {}).items() if v is not None]
    if published := results.get("published"):
        lines.append(published["protocol"])
        for at in ("at_argmax", "at_thresholds_searched_on_test_labels"):
            if at in published:
                numbers = ", ".join(f"{k} {v:.4f}" for k, v in published[at]["macro"].items())
                lines.append(f"{at.replace('_', ' ')}: {numbers}")
    return "\n".join(lines + [f"note: {note}" for note in results["notes"]])


def _interval(entry: dict[str, float | None] | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    if entry.get("low") is None:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def _suites(argv: list[str]) -> int:
    parser = _Parser(prog="python -m jaxmed.evaluate suites", description="Lists the suites, or shows one.")
    parser.add_argument("name", nargs="?")
    args = parser.parse_args(argv)
    if args.name is None:
        width = max(map(len, suites.SUITES))
        print("\n".join(f"{s.name:{width}}  {s.about}" for s in suites.SUITES.values()))
        return 0
    suite = suites.get(args.name)
    asked = prompts.make({"suite": suite.name}, suite.name)
    print(f"{suite.name}: {suite.about}\nscore    {suite.score}, image token {suite.token}\ndata     {suite.data}")
    print(f"labels   {suite.table}\nprep     {_prep(suite, 'labels.csv')}\nclasses")
    for i, name in enumerate(asked.names):
        print(f"  {name}: " + " | ".join(asked.texts[i]))
        if suite.negatives:
            print(f"    against: {' | '.join(asked.texts[len(asked.names) + i])}")
    for label, pair in suite.merge:
        print(f"  {' and '.join(pair)} become {label}: the larger score where either exceeds 0.5, else the smaller")
    return 0


def _prep(suite: suites.Suite, manifest: str) -> str:
    return f"python -m jaxmed.prep {suite.prep.replace('labels.csv', manifest)} --out=shards/{suite.name}"


def _labels(argv: list[str]) -> int:
    parser = _Parser(
        prog="python -m jaxmed.evaluate labels",
        description="A manifest for python -m jaxmed.prep from published tables of labels.",
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--suite", required=True, metavar="NAME")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--split", default="test", help="of all studies (default: test)")
    parser.add_argument(
        "--join", metavar="PATH", help="a second table (or folder), see python -m jaxmed.evaluate suites"
    )
    args = parser.parse_args(argv)
    n = label_tables.convert(args.suite, args.tables, args.out, split=args.split, joined=args.join)
    print(f"{args.out}: {n} rows; next: {_prep(suites.get(args.suite), args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
