"""What no model is needed for: logistic regression on each study's histogram, and on its metadata.

A test set that such a baseline solves says nothing about a model.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from jaxmed.core.errors import UserError
from jaxmed.core.files import write_file
from jaxmed.data.record import Study
from jaxmed.data.shards import split_ids
from jaxmed.evals import features, scores

Array = np.ndarray


class Evaluator:
    """Fits on one split, scores on another; the values are computed once and repeated at every evaluation.

    Args:
      predict_fns, mesh: not used.
      outdir: gets `baselines.json` with the AUC per class, and a summary of the studies' meta by class.
      input: {"dir": dataset folder, perhaps "source" and "source_options"}.
      fit, split: names of the splits to fit on and to score.
      classes: label names [those of the dataset].
      bins: of the histogram over all voxels of a study.
    """

    def __init__(
        self,
        predict_fns,
        *,
        mesh,
        outdir: str | os.PathLike | None = None,
        input: Mapping[str, Any],
        fit: str = "train",
        split: str = "test",
        classes: Sequence[str] | None = None,
        bins: int = 64,
    ):
        del predict_fns, mesh
        self._outdir = Path(outdir) if features.writes(outdir) else None
        self._dataset = features.open_dataset(input)
        self._ids = {name: split_ids(self._dataset, name) for name in (fit, split)}
        self._fit, self._split, self._bins = fit, split, bins
        known = self._dataset.manifest["classes"]
        self._classes = list(known if classes is None else classes)
        if missing := [c for c in self._classes if c not in known]:
            raise UserError(f"evals.classes: {self._dataset.name} has no label {missing[0]!r}; it has {known}")
        self._values: dict[str, float] | None = None

    def run(self, train_state):
        """Yields histogram_auc_macro and metadata_auc_macro, with the number of studies that were fitted and scored."""
        del train_state
        if self._values is None:
            self._values = self._compute()
        yield from self._values.items()

    def _compute(self) -> dict[str, float]:
        inputs, labels, metas = {}, {}, []
        sequences: list[str] = []
        for name, ids in self._ids.items():
            histograms, tables = [], []
            for id in ids:
                study = self._dataset.record(int(id)).study()
                histograms.append(histogram(study, self._bins, self._dataset.manifest["recipe"].get("value_range")))
                tables.append([(s["name"], s["voxels"].shape, s["affine"]) for s in study["scans"]])
                if name == self._split:
                    metas.append([s["meta"] for s in study["scans"]])
            if name == self._fit:
                sequences = sorted({scan[0] for t in tables for scan in t})
            inputs[name] = (histograms, tables)
            labels[name] = np.stack([self._dataset.index[f"label/{c}"][ids] for c in self._classes], axis=1)
        most = max(len(t) for t in inputs[self._fit][1])
        values, per_class = {}, {}
        for kind in ("histogram", "metadata"):
            x = {
                name: np.stack(h if kind == "histogram" else [metadata(t, sequences, most) for t in tables])
                for name, (h, tables) in inputs.items()
            }
            per_class[kind] = self._auc(x, labels)
            values[f"{kind}_auc_macro"] = float(np.nanmean(list(per_class[kind].values())))
        values["fitted"], values["studies"] = (float(len(self._ids[k])) for k in (self._fit, self._split))
        if self._outdir is not None:
            self._outdir.mkdir(parents=True, exist_ok=True)
            content = {"auc": per_class, "meta": meta_table(metas, labels[self._split], self._classes)}
            write_file(self._outdir / "baselines.json", (json.dumps(content, indent=1) + "\n").encode())
        return values

    def _auc(self, x: Mapping[str, Array], labels: Mapping[str, Array]) -> dict[str, float]:
        result = {}
        for j, name in enumerate(self._classes):
            y, truth = labels[self._fit][:, j], labels[self._split][:, j]
            known = ~np.isnan(y)
            if min((y[known] > 0.5).sum(), (y[known] <= 0.5).sum()) < 3:
                result[name] = float("nan")
                continue
            with threadpool_limits(1):
                model = fit_logistic(x[self._fit][known], y[known] > 0.5)
            result[name] = scores.auc(truth, model.decision_function(x[self._split]))
        return result


def fit_logistic(x: Float[Array, "n f"], y: Array, strengths: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0)):
    """Logistic regression on standardised features; its regularisation is the best one in three-fold validation."""
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)) for c in strengths]
    aucs = [cross_val_score(m, x, y, cv=3, scoring="roc_auc").mean() for m in models]
    return models[int(np.argmax(aucs))].fit(x, y)


def histogram(study: Study, bins: int, value_range: Sequence[float] | None) -> Float[Array, "bins"]:
    """The shares of a study's voxels, all scans together, in equal bins of the stored range."""
    total = np.zeros(bins)
    for scan in study["scans"]:
        x = scan["voxels"]
        if x.dtype == np.uint8 and 256 % bins == 0:
            total += np.bincount(x.ravel(), minlength=256).reshape(bins, -1).sum(1)
        else:
            low, high = value_range or (float(x.min()), float(x.max()))
            edges = np.linspace(low, max(high, low + 1e-6), bins + 1)
            total += np.histogram(np.clip(x, low, edges[-1]), bins=edges)[0]
    return total / total.sum()


def metadata(scans: Sequence[tuple[str, tuple[int, ...], Array]], sequences: Sequence[str], most: int) -> Array:
    """Counts, shapes and spacings of the scans by their place, and which sequence is at which place."""
    place = np.zeros((most, 6 + len(sequences)))
    for i, (name, shape, affine) in enumerate(scans[:most]):
        place[i, :3] = shape[:3]
        place[i, 3:6] = np.linalg.norm(affine[:3, :3], axis=0)
        if name in sequences:
            place[i, 6 + sequences.index(name)] = 1
    return np.concatenate([[len(scans)], place.sum(0), place.ravel()])


def meta_table(metas: Sequence[Sequence[Mapping[str, Any]]], labels: Array, classes: Sequence[str]) -> dict[str, Any]:
    """{class: {meta field that is a number: [10th percentile, median, 90th]}} over the scans of its studies."""
    result = {}
    for j, name in enumerate(classes):
        fields: dict[str, list[float]] = {}
        for scans, label in zip(metas, labels[:, j]):
            for meta in scans if label > 0.5 else ():
                for k, v in meta.items():
                    if isinstance(v, int | float):
                        fields.setdefault(k, []).append(float(v))
        result[name] = {k: np.percentile(v, (10, 50, 90)).round(3).tolist() for k, v in sorted(fields.items())}
    return result
