"""What a table of scores is worth: metrics per class and over all, each with its bootstrap interval, and thresholds.

A threshold is 0.5 (for probabilities), or chosen on another split, or absent (raw cosines only rank). The labels that
are reported on choose nothing, except in `published`, which says so.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num, Shaped

from jaxmed.core.errors import UserError
from jaxmed.evals import calibration, intervals, scores

Array = np.ndarray
MULTI_CLASS, MULTI_LABEL = "multi-class", "multi-label"
SEARCHED = "published: thresholds searched on the test labels that are reported on; they flatter the model"


def exclusive(labels: Num[Array, "n k"]) -> bool:
    """Does every study have exactly one of the classes, and no label missing?"""
    return labels.shape[1] > 1 and bool((~np.isnan(labels)).all() and ((labels > 0.5).sum(1) == 1).all())


def thresholds(labels: Num[Array, "n k"], values: Float[Array, "n k"], names: Sequence[str], split: str) -> Array:
    """The threshold of every class (see `scores.threshold_nearest`), from the studies of a held-out split.

    Raises:
      UserError: a class has only one kind of label there.
    """
    for name, y in zip(names, labels.T):
        if not (y > 0.5).any() or not (y <= 0.5).any():
            raise UserError(
                f"--threshold-split={split}: all known labels of {name!r} there are the same: no threshold; "
                "choose another split, or leave this class out with --classes"
            )
    return np.array([scores.threshold_nearest(y, v) for y, v in zip(labels.T, values.T)])


def report(
    labels: Num[Array, "n k"],
    values: Float[Array, "n k"],
    names: Sequence[str],
    *,
    patients: Shaped[Array, "n"],
    kind: str,
    at: Float[Array, "k"] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about one table of scores.

    Args:
      labels: 1, 0 or NaN (missing: this study does not count for this class); for "multi-class" one-hot.
      values: scores; for "multi-class" probabilities, of which the largest is the answer.
      at: thresholds for "multi-label" (positive where the score is above); None: only what ranks.

    Returns:
      {"macro": {metric: {"value", "low", "high"}}, "classes": {name: {metric: ..., "studies", "positives"}}}. Metrics:
      auc, average_precision, and, with thresholds or "multi-class", accuracy, balanced_accuracy, weighted_f1, recall,
      precision (of "multi-class": recall and precision per class, the others over all). A class that does not have
      both kinds of label has no values and does not count in the mean.

    Raises:
      UserError: no class has both kinds of label.
    """
    if not any((y > 0.5).any() and (y <= 0.5).any() for y in labels.T):
        raise UserError(
            f"none of the classes {', '.join(map(str, names))} has studies with and without it among these "
            f"{len(labels)}: nothing can be measured"
        )
    measure = _multi_class(labels, values) if kind == MULTI_CLASS else _multi_label(labels, values, at)
    found = intervals.bootstrap(measure, patients, bootstrap, seed=seed)
    result: dict[str, Any] = {"macro": {}, "classes": {name: {} for name in names}}
    for metric, triple in found.items():
        level, _, metric = metric.partition("/")
        if level == "macro":
            result["macro"][metric] = _entry(*triple)
        else:
            for j, name in enumerate(names):
                result["classes"][name][metric] = _entry(*(x[j] for x in triple))
    for j, name in enumerate(names):
        known = ~np.isnan(labels[:, j])
        result["classes"][name] |= {"studies": int(known.sum()), "positives": int((labels[known, j] > 0.5).sum())}
        if at is not None:
            result["classes"][name]["threshold"] = float(at[j])
    return result


def _entry(value, low, high) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high)}


def _multi_label(labels, values, at):
    def measure(weights):
        found: dict[str, list[Array]] = {}
        for j, (y, v) in enumerate(zip(labels.T, values.T)):
            known = ~np.isnan(y)
            positive, w = y[known] > 0.5, weights[:, known]
            one = {"auc": scores.auc(y, v, weights), "average_precision": scores.average_precision(y, v, weights)}
            if at is not None:
                matrix = scores.confusion(positive, v[known] > at[j], 2, w)
                one |= _of_matrix(matrix) | {k: f(matrix)[:, 1] for k, f in _PER_CLASS.items()}
            lacks = np.isnan(one["auc"])
            for k, x in one.items():
                found.setdefault(k, []).append(np.where(lacks, np.nan, x))
        columns = {k: np.stack(x, axis=1) for k, x in found.items()}
        return _with_macro(columns)

    return measure


def _multi_class(labels, values):
    truth, said = labels.argmax(1), values.argmax(1)

    def measure(weights):
        pairs = list(zip(labels.T, values.T))
        columns = {
            "auc": np.stack([scores.auc(y, v, weights) for y, v in pairs], axis=1),
            "average_precision": np.stack([scores.average_precision(y, v, weights) for y, v in pairs], axis=1),
        }
        matrix = scores.confusion(truth, said, labels.shape[1], weights)
        present = matrix.sum(-1) > 0
        columns |= {k: np.where(present, f(matrix), np.nan) for k, f in _PER_CLASS.items()}
        return _with_macro(columns) | {f"macro/{k}": x for k, x in _of_matrix(matrix).items()}

    return measure


_PER_CLASS = {"recall": scores.recall, "precision": scores.precision}


def _of_matrix(matrix) -> dict[str, Array]:
    fs = (scores.accuracy, scores.balanced_accuracy, scores.weighted_f1)
    return {f.__name__: f(matrix) for f in fs}


def _with_macro(columns: dict[str, Array]) -> dict[str, Array]:
    return {f"macro/{k}": scores.mean_known(x) for k, x in columns.items()} | {
        f"classes/{k}": x for k, x in columns.items()
    }


def calibrated(labels: Num[Array, "n k"], values: Float[Array, "n k"], kind: str) -> dict[str, float]:
    """ECE and Brier score of probabilities: of the answer for "multi-class", else the mean over the classes."""
    if kind == MULTI_CLASS:
        return calibration.multiclass(labels.argmax(1), values)
    found = [calibration.binary(y, v) for y, v in zip(labels.T, values.T) if not np.isnan(y).all()]
    return {k: float(np.mean([one[k] for one in found])) for k in ("ece", "brier")}


def published(
    protocol: str, labels: Num[Array, "n k"], values: Float[Array, "n k"], names: Sequence[str]
) -> dict[str, Any]:
    """The numbers of a suite as its publication computes them.

    Args:
      protocol: of `suites.Suite`. "searched": per class at argmax (probability above 0.5), and again at the threshold
        of `scores.threshold_searched`, which sees the labels that are reported on.
    """
    if protocol == "pub_brain_5":
        logits = np.log(np.maximum(values, 1e-30))
        return {"protocol": "published", "values": scores.pub_brain_5_metrics(labels.argmax(1), logits)}
    pairs = list(zip(names, labels.T, values.T))
    if protocol == "auc":
        per_class = {name: scores.auc(y, v) for name, y, v in pairs}
        return {"protocol": "published", "auc": per_class, "macro": {"auc": scores.macro_auc(labels, values)}}
    found = {name: scores.threshold_searched(y, v) for name, y, v in pairs}
    at_half = {name: scores.binary_metrics(y, v) for name, y, v in pairs}
    searched = {name: scores.binary_metrics(y, v, found[name]) for name, y, v in pairs}
    return {
        "protocol": SEARCHED,
        "thresholds_searched_on_test_labels": found,
        "at_argmax": {"macro": _mean(at_half), "classes": at_half},
        "at_thresholds_searched_on_test_labels": {"macro": _mean(searched), "classes": searched},
    }


def _mean(of_classes: dict[str, dict[str, float]]) -> dict[str, float]:
    kept = [m for m in of_classes.values() if not np.isnan(m["auc"])]
    return {k: float(np.mean([m[k] for m in kept])) for k in kept[0]} if kept else {}
