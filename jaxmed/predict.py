"""`python -m jaxmed.predict`: embeddings, zero-shot classes and heat maps of raw DICOM, NIfTI, NRRD and BIDS.

OUT/embeddings.npz                      keys, paths, features (n, z) or (n, p, z), scans, scan_names
OUT/predictions.csv                     zero-shot: a row per study, a column per class
OUT/heatmaps/KEY.png                    with --heatmap: the map over the slices that the model saw
OUT/heatmaps/KEY/00_t1w.nii.gz          ... and by voxel of each scan as it was acquired (float32, its own affine)
OUT/predict_report.json                 what was done, in which order, how long it took, and what was left out
OUT/.prep/salt                          secret of the keys, unless given (see python -m jaxmed.prep --help)
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
from absl import logging
from tqdm import tqdm

from jaxmed import predict_model, predict_prompts, predict_studies
from jaxmed.core.command import exit_code
from jaxmed.core.errors import UserError
from jaxmed.core.files import is_full, write_arrays, write_file
from jaxmed.core.load import load
from jaxmed.core.metrics import table
from jaxmed.core.tree import params_sha256
from jaxmed.data import ops
from jaxmed.evals import relevance
from jaxmed.evals.prompts import Prompts
from jaxmed.predict_studies import Study
from jaxmed.prep import recipes
from jaxmed.prep.convert import where

REPORT = "predict_report.json"
TASKS = ("embed", "zeroshot")


class Asker:
    """The compiled programs, one per bucket.

    Args:
      prompts, classifier: of zero-shot, else None.
      target: the class whose heat map is made, None = the most likely one.
    """

    def __init__(self, loaded, prompts=None, classifier=None, *, target: int | None = None):
        self._loaded, self._prompts, self._target = loaded, prompts, target
        self._token = predict_model.token_of(loaded.loss, prompts.token if prompts else None)
        self._classifier = None if classifier is None else jnp.asarray(classifier)
        self._embed, self._explain = jax.jit(self._embed_fn), jax.jit(self._explain_fn)

    def __call__(self, batch: dict[str, Any], heatmap: bool) -> dict[str, np.ndarray]:
        """Of a batch (padding rows too): features, and for zero-shot values (b, classes), and with `heatmap`
        relevance (b, s, d, h, w) by patch and target (b,)."""
        out = (self._explain if heatmap else self._embed)(self._loaded.params, batch, self._classifier)
        out = {k: np.asarray(x) for k, x in out.items()}
        if "logits" in out:
            out["values"] = self._prompts.values(out.pop("logits"), float(out["scale"]))
        return out

    def _logits(self, features, out, classifier):
        """Scaled cosines with every prompt, by the scale that belongs to the token."""
        last = features.ndim == 3 and self._token in (-1, features.shape[1] - 1)
        scale = out["scale_report"] if last and "scale_report" in out else out["scale"]
        features = features[:, self._token] if features.ndim == 3 else features
        return scale * jnp.matmul(features, classifier, precision="highest"), scale

    def _embed_fn(self, params, batch, classifier):
        out = self._loaded.predict_fns["embed_image"](params, {}, batch)
        if classifier is None:
            return {"features": out["image"]}
        logits, scale = self._logits(out["image"], out, classifier)
        return {"features": out["image"], "logits": logits, "scale": scale}

    def _explain_fn(self, params, batch, classifier):
        scales = self._loaded.predict_fns["embed_image"](params, {}, batch)  # the compiler leaves its image out
        k = len(self._prompts.names)

        def score_fn(features):
            logits, scale = self._logits(features, scales, classifier)
            likely = logits[:, :k] - logits[:, k:] if self._prompts.score == "pair" else logits
            target = jnp.argmax(likely, 1) if self._target is None else jnp.full(len(likely), self._target)
            chosen = jnp.take_along_axis(logits, target[:, None], 1)[:, 0]
            return chosen, {"logits": logits, "scale": scale, "target": target}

        features, passed, _, _, patches = predict_model.explain(
            self._loaded.tower, params["image"], batch, score_fn, token=self._token
        )
        return {"features": features, "relevance": patches, **passed}


def maps_of(study: Study, patches: np.ndarray, patch: Sequence[int]) -> list[np.ndarray]:
    """Relevance by patch (s, d, h, w) of one study as a volume on the stored grid of each of its scans."""
    maps = []
    for one, found in zip(study.scans, patches):
        shape = one["voxels"].shape
        slabs = shape[0] // patch[0]
        maps.append(relevance.on_voxels(found[:slabs], patch, shape) if slabs else np.zeros(shape, np.float32))
    return maps


def write_map(path: Path, values: np.ndarray, one: dict[str, Any]) -> None:
    """A volume on the stored grid of a scan as NIfTI on the grid of the scan as it was acquired."""
    values = ops.back_to_source(values, one["affine"], one["source_affine"], one["source_shape"])
    # NIfTI's first axis is our last one.
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.asarray(one["source_affine"])[:, [2, 1, 0, 3]])
    image.set_sform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


@dataclasses.dataclass
class Output:
    """What is written when all studies are done; heat maps are written as they come."""

    out: Path
    asker: Asker
    names: tuple[str, ...]
    score: str
    patch: tuple[int, int, int]
    heatmap: bool
    rows: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seconds: Counter = dataclasses.field(default_factory=Counter)
    buckets: Counter = dataclasses.field(default_factory=Counter)

    def ask(self, group: list[Study], rows: int, failed: list[dict[str, str]]) -> None:
        """Predicts studies of one bucket; what fails as a group is tried alone, what fails alone is noted."""
        started = time.perf_counter()
        new = group[0].bucket not in self.buckets
        answer, memory, text = {}, False, ""
        try:
            answer = self.asker(predict_studies.stack(group, rows), self.heatmap)
        except (jax.errors.JaxRuntimeError, MemoryError, UserError) as e:
            text = " ".join(str(e).split())[:200] or type(e).__name__
            memory = isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
        self.seconds["compile and first run" if new else "model"] += time.perf_counter() - started
        if text:
            if rows == 1:
                self._fail(failed, group[0], "too-large" if memory else "does-not-fit", text)
                return
            for one in group:
                self.ask([one], 1, failed)
            return
        self.buckets[group[0].bucket] += len(group)
        for i, study in enumerate(group):
            answers = {k: x[i] for k, x in answer.items() if k != "scale"}
            if not np.isfinite(answers["features"]).all():
                self._fail(failed, study, "not-finite", "the model gives features that are no numbers")
                continue
            try:
                self._keep(study, answers)
            except Exception as e:
                if is_full(e):
                    raise UserError(f"cannot write {self.out}: the disk is full; free space and start again") from None
                self._fail(failed, study, "failed", where(e))

    def _fail(self, failed, study: Study, reason: str, detail: str) -> None:
        failed.append({"key": study.key, "path": study.path, "reason": reason, "detail": detail})

    def _keep(self, study: Study, answers: dict[str, np.ndarray]) -> None:
        started = time.perf_counter()
        scans = [
            {
                "name": s["name"],
                "shape": list(s["voxels"].shape),
                "source_shape": list(s["source_shape"]),
                "axes": ops.axis_codes(s["affine"]),
                "seen": bool(len(s["voxels"]) >= self.patch[0]),
            }
            for s in study.scans
        ]
        row = {"key": study.key, "path": study.path, "features": answers["features"], "scans": scans}
        if "values" in answers:
            row["values"] = answers["values"]
        if self.heatmap:
            target = self.names[int(answers["target"])]
            row["heatmap"] = {"target": target, "png": f"heatmaps/{study.key}.png"}
            folder = self.out / "heatmaps" / study.key
            folder.mkdir(parents=True, exist_ok=True)
            maps = maps_of(study, answers["relevance"], self.patch)
            for i, (one, voxels) in enumerate(zip(study.scans, maps)):
                name = f"{i:02d}_{one['name']}.nii.gz"
                write_map(folder / name, voxels, one)
                scans[i]["heatmap"] = f"heatmaps/{study.key}/{name}"
            title = f"{target}: {row['values'][self.names.index(target)]:.3f} ({self.score})"
            load("", "show_overlay").overlay(self.out / row["heatmap"]["png"], study.scans, maps, title)
        self.rows[study.number] = row
        self.seconds["write"] += time.perf_counter() - started

    def write(self) -> list[dict[str, Any]]:
        """embeddings.npz and predictions.csv, in the order of keys; returns the rows."""
        rows = [self.rows[i] for i in sorted(self.rows)]
        arrays = {
            "keys": np.array([r["key"] for r in rows]),
            "paths": np.array([r["path"] for r in rows]),
            "features": np.stack([r["features"] for r in rows]),
            "scans": np.array([len(r["scans"]) for r in rows], np.int32),
            "scan_names": np.array(["|".join(s["name"] for s in r["scans"]) for r in rows]),
        }
        write_arrays(self.out / "embeddings.npz", arrays)
        if self.names:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            best = [] if self.score == "pair" else ["predicted"]
            writer.writerow(["key", "path", "scans", *best, *self.names])
            for r in rows:
                top = [self.names[int(np.argmax(r["values"]))]] if best else []
                writer.writerow([r["key"], r["path"], len(r["scans"]), *top, *(f"{v:.6g}" for v in r["values"])])
            write_file(self.out / "predictions.csv", text.getvalue().encode())
        return rows


def predict(
    sources: Sequence[str],
    out: str | os.PathLike,
    *,
    ckpt: str,
    task: str,
    prompts: str | None = None,
    suite: str | None = None,
    vocab: str | None = None,
    recipe: str | None = None,
    recipe_options: Sequence[tuple[str, str]] = (),
    read_options: Sequence[tuple[str, str]] = (),
    heatmap: bool = False,
    target: str | None = None,
    batch: int = 1,
    workers: int = 0,
    salt_file: str | None = None,
    manifest: Sequence[str] | None = None,
    study: str = "",
    paths: str = "redact",
) -> dict[str, Any]:
    """From raw scans to embeddings, and for "zeroshot" to class scores and heat maps.

    Args:
      sources, manifest, study, paths, salt_file: as for `prep.run.prepare`.
      recipe: of prep, with options; None = that of the training.
      ckpt: see `predict_model.load_model`.
      prompts, suite: see `predict_prompts.find`; vocab: of the text tower, None = that of the training.
      target: class of the heat maps, None = the most likely of each study.
      batch: studies per call of the model.
      workers: processes that read; 0 = this one.

    Returns:
      The content of `predict_report.json`.

    Raises:
      UserError: an argument is wrong, or no study could be used.
    """
    begun = time.perf_counter()
    for given in sources:
        if Path(out).resolve().is_relative_to(Path(given).resolve()):
            raise UserError(f"--out={out}: lies inside the source {given}; choose a folder outside of the scans")
    if task not in TASKS:
        raise UserError(f"--task={task}: choose one of {', '.join(TASKS)}")
    if task == "embed" and (heatmap or prompts or suite or target):
        flag = "--heatmap" if heatmap else "--prompts" if prompts else "--suite" if suite else "--target"
        raise UserError(f"{flag} needs --task=zeroshot: it is about a class")
    if target is not None and not heatmap:
        raise UserError("--target names the class of the heat maps: it needs --heatmap")
    chosen = recipes.get(recipe, recipe_options) if recipe else None
    loaded = predict_model.load_model(ckpt, value_range=chosen.options.get("value_range") if chosen else None)
    tower = loaded.tower
    chosen = predict_studies.choose_recipe(loaded.recipe, recipe, recipe_options, tower.img_size)
    read = recipes.read_options(chosen, read_options)

    asked, classifier, names = None, None, ()
    if task == "zeroshot":
        asked = predict_prompts.find(prompts, suite, loaded.zeroshot, loaded.text.get("prefix", ""))
        names = asked.names
        if target is not None and target not in names:
            raise UserError(f"--target={target}: there is no such class; choose one of {', '.join(names)}")
        classifier = _classifier(loaded, asked, vocab)
    remarks = predict_studies.remarks(loaded.recipe, chosen, tower.img_size)
    remarks += predict_prompts.doubts(loaded.path, loaded.text, vocab) if asked else []
    out = Path(out)
    try:
        (out / ".prep").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror}); choose another folder") from None
    places = dict(salt_file=salt_file, manifest=manifest, study=study, paths=paths)
    reader = predict_studies.find(sources, read, out=out, **places)
    asker = Asker(loaded, asked, classifier, target=None if target is None else names.index(target))
    output = Output(out, asker, names, asked.score if asked else "", tuple(tower.patch), heatmap)
    output.seconds["start"] = time.perf_counter() - begun

    waiting: dict[predict_studies.Bucket, list[Study]] = defaultdict(list)
    mark = time.perf_counter()
    studies = predict_studies.studies(reader, chosen, read, patch=tower.patch, workers=workers)
    with tqdm(total=len(reader.found), desc=task, unit="study", mininterval=0.5, file=sys.stderr) as bar:
        for one in studies:
            output.seconds["read"] += time.perf_counter() - mark
            waiting[one.bucket].append(one)
            # Rare shapes wait for company, but not for ever: their voxels are in memory.
            full = max(waiting, key=lambda b: len(waiting[b]))
            if len(waiting[full]) == batch or sum(map(len, waiting.values())) >= 4 * batch:
                output.ask(waiting.pop(full), batch, reader.failed)
            bar.update(len(output.rows) + len(reader.failed) - bar.n)
            mark = time.perf_counter()
        output.seconds["read"] += time.perf_counter() - mark
        for group in waiting.values():
            output.ask(group, batch, reader.failed)
        bar.update(len(output.rows) + len(reader.failed) - bar.n)

    rows = output.write() if output.rows else []
    report = {
        "schema": 1,
        "task": task,
        "checkpoint": loaded.path,
        "params_sha256": params_sha256(jax.device_get(loaded.params)),
        "recipe": chosen.describe(),
        "remarks": remarks,
        "read": read,
        "prompts": dict(zip([*names, *(f"not {n}" for n in names)], asked.texts)) if asked else {},
        "score": output.score,
        "studies": [{k: v for k, v in r.items() if k not in ("features", "values")} for r in rows],
        "failed": reader.failed,
        "rejects": reader.rejects,
        "notes": reader.notes,
        "buckets": [{**b._asdict(), "studies": n} for b, n in sorted(output.buckets.items())],
        "seconds": {**output.seconds, "total": time.perf_counter() - begun},
        "peak_memory_mb": _peak_memory(),
    }
    write_file(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    if not rows:
        top = Counter(r["reason"] for r in [*reader.failed, *reader.rejects]).most_common(3)
        why = ", ".join(f"{reason} ({n})" for reason, n in top) or "no file at all"
        raise UserError(f"no study could be used: {why}; {out / REPORT} says which file and why")
    return report


def _classifier(loaded, asked: Prompts, vocab: str | None) -> np.ndarray:
    text = load("models", loaded.model["name"]).make_text_tower(loaded.model)
    tokenizer = predict_prompts.tokenizer(loaded.text, vocab, text.vocab_size)
    embed = jax.jit(lambda params, ids: loaded.predict_fns["embed_text"](params, {}, {"text": ids})["text"])

    def features(ids: np.ndarray) -> np.ndarray:
        rows = min(64, len(ids))
        padded = np.pad(ids, ((0, -len(ids) % rows), (0, 0)))
        parts = [embed(loaded.params, part) for part in np.split(padded, len(padded) // rows)]
        return np.concatenate([np.asarray(x) for x in parts])[: len(ids)]

    return asked.classifier(features, tokenizer, text.max_positions)


def _peak_memory() -> dict[str, float]:
    """MB: this process, the largest reader process, and the accelerator, if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if (status := Path("/proc/self/status")).exists():
        # On Linux getrusage gives a new process the peak of the one that started it, such as a notebook's.
        own = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        peaks["process"] = int(own[0]) * 1024 if own else peaks["process"]
    if readers := resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss:
        peaks["reader"] = readers * unit
    if device := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        peaks["device"] = device
    return {k: round(v / 1e6, 1) for k, v in peaks.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    """Runs the command in this process; returns the exit code."""
    return exit_code(_main, argv)


def _main(argv: list[str]) -> int:
    parser = _Parser(
        prog="python -m jaxmed.predict",
        description=__doc__,
        epilog="--recipe.OPTION=VALUE and --read.OPTION=VALUE change how scans are prepared and read, and keys are "
        "made from a salt, all as for python -m jaxmed.prep.\n\nprompts: " + predict_prompts.FORM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SRC", help="folder, zip or image file; a DICOM study, a BIDS session, or the "
        "NIfTI files of one folder are a study")  # fmt: skip
    add("--ckpt", required=True, metavar="PATH", help="a run, one of its checkpoints, or ported weights")
    add("--task", required=True, help=f"one of {', '.join(TASKS)}")
    add("--out", required=True, metavar="DIR")
    add("--prompts", metavar="FILE", help="JSON, see below (default: those that the run was evaluated with)")
    add("--suite", metavar="NAME", help="built-in prompts instead, see python -m jaxmed.evaluate suites")
    add("--vocab", metavar="FILE", help="of the text tower (default: that of the training)")
    add("--recipe", metavar="NAME", help="of python -m jaxmed.prep (default: that of the training data, or "
        "what python -m jaxmed.port stored)")  # fmt: skip
    add("--heatmap", action="store_true", help="which voxels spoke for the class")
    add("--target", metavar="CLASS", help="of the heat maps (default: the most likely one of each study)")
    add("--batch", type=int, default=1, metavar="N", help="studies per call of the model (default: 1)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read; 0 (default): this one")
    add("--salt-file", metavar="FILE", help="secret of the keys; the same one gives the keys of a prep")
    add("--manifest", action="append", metavar="FILE", help="a table that says which files are one study, as for prep")
    add("--study", default="", metavar="REGEX", help="what it matches in a file's place names its study, as for prep")
    add(
        "--paths", default="redact", choices=("redact", "hash", "keep"), help="places in tables and report, as for prep"
    )
    args, rest = parser.parse_known_args(argv)
    options: dict[str, list[tuple[str, str]]] = {"recipe": [], "read": []}
    for extra in rest:
        key, equals, value = extra.removeprefix("--").partition("=")
        group, _, option = key.partition(".")
        if not extra.startswith("--") or group not in options or not option or not equals:
            parser.error(f"unknown argument {extra}")
        options[group].append((option, value))
    if args.batch < 1 or args.workers < 0:
        parser.error("--batch must be 1 or more, --workers 0 or more")
    logging.set_verbosity(logging.FATAL)  # orbax logs what checkpoint.py says in one line
    report = predict(recipe_options=options["recipe"], read_options=options["read"], **vars(args))
    _print(report, args.out)
    return 0


def _print(report: dict[str, Any], out: str) -> None:
    n, took = len(report["studies"]), report["seconds"]
    rows = [("studies", str(n)), ("scans", str(sum(len(s["scans"]) for s in report["studies"])))]
    rows += [("recipe", report["recipe"]["name"]), ("programs compiled", str(len(report["buckets"])))]
    rows += [(f"seconds, {k}", f"{v:.2f}") for k, v in took.items()]
    rows += [("seconds per study", f"{(took['total'] - took['start']) / n:.2f}")]
    rows += [(f"peak memory, {k}, MB", f"{v:.0f}") for k, v in report["peak_memory_mb"].items()]
    rows += [(f"left out: {reason}", str(k)) for reason, k in Counter(r["reason"] for r in report["rejects"]).items()]
    rows += [(f"study without a prediction: {r['path']}", r["reason"]) for r in report["failed"]]
    print(table([("", out), *rows]))
    for remark in report["remarks"]:
        print(f"note: {remark}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
