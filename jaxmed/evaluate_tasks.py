"""What `python -m jaxmed.evaluate` measures, from embeddings: zero-shot, linear probe, k-NN, retrieval."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed import predict_model, predict_prompts
from jaxmed.core.errors import UserError
from jaxmed.data import shards
from jaxmed.evals import calibration, classification, features, intervals, probe, prompts, retrieval, scores, suites
from jaxmed.evals.classification import MULTI_CLASS, MULTI_LABEL
from jaxmed.evaluate_features import Embedder

PROTOCOLS = ("held-out", "published")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the command; see its --help."""

    split: str = "test"
    suite: str | None = None
    prompts: str | None = None
    classes: tuple[str, ...] = ()
    token: int | None = None
    protocol: str = "held-out"
    threshold_split: str | None = None
    calibrate_split: str | None = None
    train_split: str = "train"
    shots: tuple[int, ...] = ()
    seeds: int = 5
    k: tuple[int, ...] = (20,)
    bootstrap: int = 1000
    seed: int = 0


@dataclasses.dataclass
class Answer:
    """What a task gives: `results` go to results.json; `columns` {name: (n,)} by study of `ids` go to scores.csv."""

    results: dict[str, Any]
    ids: np.ndarray
    columns: dict[str, np.ndarray]


class Labelled:
    """Labels of a dataset by split, for the chosen classes.

    Raises:
      UserError: the dataset does not have a class.
    """

    def __init__(self, dataset: shards.Dataset, names: Sequence[str]):
        known = dataset.manifest["classes"]
        if missing := [n for n in names if n not in known]:
            raise UserError(
                f"{dataset.name} has no label {', '.join(map(repr, missing[:5]))}{' ...' if len(missing) > 5 else ''}; "
                f"it has {', '.join(known) or 'none'}. Give prep a manifest with columns 'label:NAME' (python -m "
                "jaxmed.evaluate labels makes one from published tables), or choose classes with --classes"
            )
        self.dataset, self.names = dataset, list(names)

    def of(self, ids: np.ndarray, split: str) -> np.ndarray:
        """(n, k) float32, NaN = missing.

        Raises:
          UserError: no study of the split has any of them.
        """
        labels = np.stack([self.dataset.index[f"label/{n}"][ids] for n in self.names], axis=1)
        if np.isnan(labels).all():
            raise UserError(f"{self.dataset.name}: no study of split {split!r} has a label of {', '.join(self.names)}")
        return labels

    def patients(self, ids: np.ndarray) -> np.ndarray:
        return self.dataset.index["patient"][ids]


def zeroshot(embedder: Embedder, o: Options) -> Answer:
    """Every study against the prompts. Metrics, thresholds, calibration: see `evals.classification`."""
    prefix = embedder.loaded.text.get("prefix", "")
    asked = predict_prompts.find(o.prompts, o.suite, embedder.loaded.zeroshot, prefix)
    if o.classes:
        asked = prompts.only(asked, o.classes, "--classes")
    suite = suites.get(o.suite) if o.suite else None
    if o.protocol == "published" and (suite is None or o.classes):
        raise UserError("--protocol=published is that of a whole suite: it needs --suite, without --classes")
    token = predict_model.token_of(embedder.loaded.loss, o.token if o.token is not None else asked.token)
    labelled = Labelled(embedder.dataset, asked.labels)
    classifier = embedder.classifier(asked)

    def score(split: str):
        got = embedder.images(split)
        image, scale = features.of_token(got, token)
        logits = scores.zero_shot_logits(image.astype(np.float64), classifier, scale)
        return got["id"], labelled.of(got["id"], split), asked.merged(asked.values(logits, scale))

    ids, labels, values = score(o.split)
    kind = MULTI_CLASS if asked.score == "softmax" and classification.exclusive(labels) else MULTI_LABEL
    results = {"score": asked.score, "token": token, "suite": o.suite}
    results["prompts"] = dict(zip([*asked.names, *(f"not {n}" for n in asked.names)], asked.texts))
    results |= _judge(o, labelled, kind, asked.score != "cosine", ids, labels, values, score)
    tasks = suite is not None and suite.protocol == "pub_brain_5" and not o.classes
    if tasks and kind != MULTI_CLASS:
        raise UserError(f"--suite={o.suite}: every study needs exactly one of the labels {', '.join(labelled.names)}")
    if tasks:
        results["tasks"] = classification.published("pub_brain_5", labels, values, labelled.names)["values"]
    if o.protocol == "published":
        results["published"] = classification.published(suite.protocol, labels, values, labelled.names)
    return Answer(results, ids, _columns(labelled.names, labels, values))


def linear_probe(embedder: Embedder, o: Options) -> Answer:
    """Logistic regression on the features of `train_split`; with shots, also on a few studies of each class."""
    labelled = Labelled(embedder.dataset, _classes_of(embedder, o))
    train, x, y = _features(embedder, o, labelled, o.train_split)
    ids, test, labels = _features(embedder, o, labelled, o.split)
    kind = _kind(y, labels)
    about = dict(patients=labelled.patients(train), exclusive=kind == MULTI_CLASS)
    fitted = probe.fit(x, y, labelled.names, seed=o.seed, **about)

    def score(split: str):
        there, z, known = _features(embedder, o, labelled, split)
        return there, known, fitted.probabilities(z)

    values = fitted.probabilities(test)
    strengths = dict(zip(labelled.names, fitted.strengths)) if kind == MULTI_LABEL else fitted.strengths[0]
    results = {"train_split": o.train_split, "train_studies": len(train), "strengths": strengths}
    results |= {"converged": fitted.converged}
    results |= _judge(o, labelled, kind, True, ids, labels, values, score)
    if o.shots:
        results["few_shot"] = {}
    for shots in o.shots:
        found: dict[str, list[float]] = {}
        for seed in range(o.seeds):
            p = probe.few_shot(x, y, labelled.names, test, shots=shots, seed=o.seed + seed, **about)
            at = np.full(len(labelled.names), 0.5)
            one = classification.report(
                labels, p, labelled.names, patients=labelled.patients(ids), kind=kind, at=at, bootstrap=0
            )
            for metric, entry in one["macro"].items():
                found.setdefault(metric, []).append(entry["value"])
        results["few_shot"][str(shots)] = {
            k: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, "seeds": v}
            for k, v in found.items()
        }
    return Answer(results, ids, _columns(labelled.names, labels, values))


def knn(embedder: Embedder, o: Options) -> Answer:
    """Votes of the nearest training studies; the first `k` gives the table and the scores, others the macro values."""
    labelled = Labelled(embedder.dataset, _classes_of(embedder, o))
    train, x, y = _features(embedder, o, labelled, o.train_split)
    ids, test, labels = _features(embedder, o, labelled, o.split)
    kind = _kind(y, labels)

    def vote(z, k: int):
        return probe.knn(x, y, labelled.names, z, k=k)

    def score(split: str):
        there, z, known = _features(embedder, o, labelled, split)
        return there, known, vote(z, o.k[0])

    values = vote(test, o.k[0])
    results = {"train_split": o.train_split, "train_studies": len(train), "k": o.k[0]}
    results |= _judge(o, labelled, kind, True, ids, labels, values, score)
    results["by_k"] = {str(o.k[0]): results["metrics"]["macro"]}
    for k in o.k[1:]:
        at = np.full(len(labelled.names), 0.5) if kind == MULTI_LABEL else None
        about = dict(patients=labelled.patients(ids), kind=kind, at=at, bootstrap=o.bootstrap, seed=o.seed)
        results["by_k"][str(k)] = classification.report(labels, vote(test, k), labelled.names, **about)["macro"]
    return Answer(results, ids, _columns(labelled.names, labels, values))


def retrieve(embedder: Embedder, o: Options) -> Answer:
    """Reports of studies and studies of reports. Intervals: queries drawn again by patient, candidates as they are."""
    reports, got = embedder.reports(o.split), embedder.images(o.split)
    image, _ = features.of_token(got, -1 if o.token is None else o.token)
    ids, report = reports["id"], reports["report"]
    image = image[np.searchsorted(got["id"], ids)]
    ranks = scores.image_text_ranks(image, reports["text"][report], texts=report)
    measured = retrieval.measure(ranks, np.bincount(report))
    patients = embedder.dataset.index["patient"][ids]
    first = np.unique(report, return_index=True)[1]  # the patient of a report: that of its first study

    metrics = {k: {"value": v} for k, v in measured.items()}
    for way, groups in (("image_to_text", patients), ("text_to_image", patients[first])):

        def recalls(weights, way=way):
            return {k: weights @ (ranks[way] < k) / weights.sum(1) for k in retrieval.AT}

        for k, (_, low, high) in intervals.bootstrap(recalls, groups, o.bootstrap, seed=o.seed).items():
            metrics[f"{way}_R@{k}"] |= {"low": float(low), "high": float(high)}
    results = {"studies": len(ids), "without_report": len(got["id"]) - len(ids), "metrics": {"macro": metrics}}
    columns = {"report": report, "rank/image_to_text": ranks["image_to_text"] + 1}
    columns["rank/text_to_image"] = ranks["text_to_image"][report] + 1
    return Answer(results, ids, columns)


TASKS = {"zeroshot": zeroshot, "probe": linear_probe, "knn": knn, "retrieval": retrieve}


def _judge(
    o: Options, labelled: Labelled, kind: str, probabilities: bool, ids, labels, values, score
) -> dict[str, Any]:
    """Metrics, thresholds and calibration.

    Args:
      probabilities: do the scores mean something by themselves (or do they only rank)?
      score: split -> ids, labels, values of its studies.
    """
    names, chosen_on = labelled.names, "fixed: 0.5" if probabilities else "none: raw cosines only rank"
    at = np.full(len(names), 0.5) if probabilities else None
    for flag, split in (("threshold", o.threshold_split), ("calibrate", o.calibrate_split)):
        if split == o.split:
            raise UserError(f"--{flag}-split={split}: is the split that is reported on; choose another")
    if kind == MULTI_CLASS:
        if o.threshold_split:
            raise UserError("--threshold-split: these classes exclude each other, the most likely one is the answer")
        at, chosen_on = None, "none: the most likely class"
    elif o.threshold_split:
        at = classification.thresholds(*score(o.threshold_split)[1:], names, o.threshold_split)
        chosen_on = f"split {o.threshold_split}"
    about = dict(patients=labelled.patients(ids), kind=kind, at=at, bootstrap=o.bootstrap, seed=o.seed)
    results = {
        "kind": kind,
        "studies": len(ids),
        "patients": len(np.unique(labelled.patients(ids))),
        "thresholds": chosen_on,
        "metrics": classification.report(labels, values, names, **about),
    }
    if probabilities:
        results["calibration"] = classification.calibrated(labels, values, kind)
    if o.calibrate_split:
        if not probabilities:
            raise UserError(
                "--calibrate-split: raw cosines are no probabilities; use prompts with score pair or softmax"
            )
        one = kind == MULTI_CLASS
        _, known, there = score(o.calibrate_split)
        if one and not classification.exclusive(known):
            raise UserError(f"--calibrate-split={o.calibrate_split}: not every study there has exactly one class")
        t = calibration.fit_temperature(known, there, exclusive=one)
        cooled = calibration.cool(values, t, exclusive=one)
        results["calibration_after"] = classification.calibrated(labels, cooled, kind)
        results["calibration_after"] |= {"temperature": t, "fitted_on": f"split {o.calibrate_split}"}
    return results


def _classes_of(embedder: Embedder, o: Options) -> list[str]:
    if o.classes:
        return list(o.classes)
    if o.suite:
        return list(prompts.make({"suite": o.suite}, f"--suite={o.suite}").labels)
    if not embedder.dataset.manifest["classes"]:
        raise UserError(f"{embedder.dataset.name} has no labels; give prep a manifest with columns 'label:NAME'")
    return list(embedder.dataset.manifest["classes"])


def _features(embedder: Embedder, o: Options, labelled: Labelled, split: str):
    """ids, features (of one token, or of all side by side) and labels of a split."""
    got = embedder.images(split)
    image = got["image"] if o.token is None else features.of_token(got, o.token)[0]
    return got["id"], image.reshape(len(image), -1), labelled.of(got["id"], split)


def _kind(*labels: np.ndarray) -> str:
    return MULTI_CLASS if all(classification.exclusive(y) for y in labels) else MULTI_LABEL


def _columns(names: Sequence[str], labels: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    columns = {f"label/{n}": y for n, y in zip(names, labels.T)}
    return columns | {f"score/{n}": v for n, v in zip(names, values.T)}
