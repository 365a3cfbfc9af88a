"""Frozen features: logistic regression with its strength chosen by patient-grouped cross-validation, few-shot, k-NN."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from jaxmed.core.errors import UserError
from jaxmed.core.rng import np_rng
from jaxmed.evals import scores

Array = np.ndarray
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FEW_SHOT_STRENGTH = 1.0  # too few studies to choose it
VOTE_TEMPERATURE = 0.07  # a neighbour votes with exp(cosine / this)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
      models: one for all classes if they exclude each other, else one per class.
      strengths: the inverse regularisation C that was chosen for each.
      converged: did the solver end for all of them?
    """

    models: tuple[Any, ...]
    strengths: tuple[float, ...]
    exclusive: bool
    converged: bool

    def probabilities(self, x: Float[Array, "n z"]) -> Float[Array, "n k"]:
        if self.exclusive:
            return self.models[0].predict_proba(x)
        return np.stack([m.predict_proba(x)[:, 1] for m in self.models], axis=1)


def fit(
    x: Float[Array, "n z"],
    labels: Num[Array, "n k"],
    names: Sequence[str],
    *,
    patients: Shaped[Array, "n"],
    exclusive: bool,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 3,
    seed: int = 0,
) -> Probe:
    """Fits on standardised features.

    Args:
      labels: 1, 0 or NaN (this study is left out for this class); one-hot if `exclusive`.
      patients: studies of one patient are never in both parts of a fold.

    Raises:
      UserError: a class has too few studies or patients with, or without it.
    """
    models, chosen, ended = [], [], []
    with threadpool_limits(1):  # small matrices: more threads only wait for each other
        for rows, y in tqdm(list(_targets(labels, names, exclusive)), "probe", unit="model", delay=5):
            inputs, groups = x[rows], patients[rows]
            splits = _splits(inputs, y, groups, names, folds, seed)
            losses = [_held_out_loss(inputs, y, splits, c) for c in strengths] if len(strengths) > 1 else [0.0]
            chosen.append(float(strengths[int(np.argmin(losses))]))
            model, converged = _fit(make_pipeline(StandardScaler(), _logistic(chosen[-1])), inputs, y)
            models.append(model)
            ended.append(converged)
    return Probe(tuple(models), tuple(chosen), exclusive, all(ended))


def _targets(labels, names, exclusive: bool):
    """(rows, targets) of every model."""
    for name, y in zip(names, labels.T):
        positive, negative = int((y > 0.5).sum()), int((y <= 0.5).sum())
        if min(positive, negative) < 2:
            raise UserError(
                f"class {name!r}: {positive} training studies have it and {negative} do not; at least two of each are "
                "needed: leave it out with --classes, or train on another split"
            )
    if exclusive:
        yield np.arange(len(labels)), labels.argmax(1)
    else:
        for y in labels.T:
            rows = np.flatnonzero(~np.isnan(y))
            yield rows, (y[rows] > 0.5).astype(int)


def _splits(x, y, groups, names, folds: int, seed: int):
    patients = min(len(np.unique(groups[y == c])) for c in np.unique(y))
    if patients < 2:
        raise UserError(f"classes {', '.join(names)}: one of them has all its training studies from one patient")
    cut = StratifiedGroupKFold(min(folds, patients), shuffle=True, random_state=seed)
    return [(a, b) for a, b in cut.split(x, y, groups) if len(np.unique(y[a])) == len(np.unique(y)) and len(b)]


def _held_out_loss(x, y, splits, strength: float) -> float:
    losses = []
    for fitted, held_out in splits:
        model, _ = _fit(make_pipeline(StandardScaler(), _logistic(strength)), x[fitted], y[fitted])
        losses.append(log_loss(y[held_out], model.predict_proba(x[held_out]), labels=np.unique(y)))
    return float(np.mean(losses)) if losses else 0.0


def _logistic(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000)


def _fit(model, x, y):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def few_shot(
    x: Float[Array, "n z"],
    labels: Num[Array, "n k"],
    names: Sequence[str],
    test: Float[Array, "m z"],
    *,
    shots: int,
    patients: Shaped[Array, "n"],
    exclusive: bool,
    seed: int,
) -> Float[Array, "m k"]:
    """Probabilities of test studies after training on `shots` random studies of each class (and, where classes may
    occur together, on as many without it), of as many patients as there are. Features are standardised by all of `x`,
    which needs no labels; the strength is fixed.

    Raises:
      UserError: a class has fewer studies.
    """
    rng, columns = np_rng(seed, shots), []
    scaler = StandardScaler().fit(x)
    x, test = scaler.transform(x), scaler.transform(test)
    with threadpool_limits(1):
        for j, (rows, y) in enumerate(_targets(labels, names, exclusive)):
            drawn = []
            for c in np.unique(y):
                of_class = rows[y == c]
                if len(of_class) < shots:
                    what = names[c] if exclusive else names[j] if c else f"not {names[j]}"
                    raise UserError(f"--shots={shots}: only {len(of_class)} training studies are {what!r}")
                drawn.append(_of_patients(of_class, patients, shots, rng))
            at = np.concatenate(drawn)
            target = labels[at].argmax(1) if exclusive else (labels[at, j] > 0.5).astype(int)
            model, _ = _fit(_logistic(FEW_SHOT_STRENGTH), x[at], target)
            p = model.predict_proba(test)
            columns.append(p if exclusive else p[:, 1:])
    return np.concatenate(columns, axis=1)


def _of_patients(rows: Int[Array, "n"], patients: Array, count: int, rng: np.random.Generator) -> Int[Array, "count"]:
    """Random rows, the first one of every patient before any second one."""
    rows = rng.permutation(rows)
    _, of_row = np.unique(patients[rows], return_inverse=True)
    order = np.argsort(of_row, kind="stable")
    sizes = np.bincount(of_row.reshape(-1))
    turn = np.empty(len(rows), int)
    turn[order] = np.concatenate([np.arange(n) for n in sizes])
    return rows[np.argsort(turn, kind="stable")[:count]]


def knn(
    x: Float[Array, "n z"], labels: Num[Array, "n k"], names: Sequence[str], test: Float[Array, "m z"], *, k: int
) -> Float[Array, "m k"]:
    """The share of the votes of the `k` nearest training studies that each class gets, by cosine; of each class, among
    the studies whose label is known.

    Raises:
      UserError: a class is known of fewer than `k` studies.
    """
    x, test = scores.l2_normalize(x), scores.l2_normalize(test)
    known = ~np.isnan(labels)
    if (few := known.sum(0)).min() < k:
        name = names[int(few.argmin())]
        raise UserError(f"--k={k}: only {few.min()} training studies have a label for {name!r}")
    result = np.empty((len(test), labels.shape[1]))
    for start in range(0, len(test), 512):  # a block of the similarity matrix at a time
        part = slice(start, start + 512)
        similarity = test[part] @ x.T
        for column, rows in _same_rows(known):
            cosine = similarity[:, rows]
            near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
            cosine = np.take_along_axis(cosine, near, axis=1)
            votes = scores.softmax(cosine / VOTE_TEMPERATURE)
            result[part, column] = np.einsum("mn,mnk->mk", votes, labels[rows][:, column][near] > 0.5)
    return np.clip(result, 0, 1)  # weights add up to 1 but for rounding


def _same_rows(known: Array):
    """(classes, rows): classes with labels for the same studies share their neighbours."""
    patterns, of_class = np.unique(known, axis=1, return_inverse=True)
    for i in range(patterns.shape[1]):
        yield np.flatnonzero(of_class.reshape(-1) == i), np.flatnonzero(patterns[:, i])
