"""Zero-shot scores, classification and retrieval metrics: pure numpy functions over the rows of a whole test set.

States that merge: rows (scores, labels, features) merge by concatenation, confusion matrices by addition. No metric
here is an average over batches. Labels are 1, 0 or NaN (missing; such rows are left out). The HLIP spec, section 6,
names the published protocols; what they tune on the test labels says so in its name or docstring.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from sklearn.metrics import roc_curve

Array = np.ndarray

PUB_BRAIN_5 = ("normal", "stroke", "glioma", "meningioma", "metastasis")


def l2_normalize(x: Float[Array, "*n z"]) -> Float[Array, "*n z"]:
    """Rows of unit length (rows shorter than 1e-12 are divided by 1e-12)."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def softmax(x: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# Zero-shot classifiers.


def classifier_from_prompts(text_features: Float[Array, "n z"], classes: int) -> Float[Array, "z classes"]:
    """A prompt-ensemble classifier: per class the mean of the normalised template features, normalised again.

    Args:
      text_features: rows class-major (class 0 with template 0, class 0 with template 1, ...); need not be normalised.
      classes: number of classes; divides the number of rows.

    Raises:
      ValueError: it does not divide.
    """
    if classes < 1 or len(text_features) % classes:
        raise ValueError(f"{len(text_features)} prompts are not a whole number of templates for {classes} classes")
    per_class = l2_normalize(text_features).reshape(classes, -1, text_features.shape[-1])
    return l2_normalize(per_class.mean(axis=1)).T


def zero_shot_logits(
    image_features: Float[Array, "b z"], classifier: Float[Array, "z classes"], scale: float = 1.0
) -> Float[Array, "b classes"]:
    """scale * cosine; `scale` is exp(logit_scale) for probabilities, 1 for plain cosine scores."""
    return scale * (l2_normalize(image_features) @ classifier)


def pair_probability(logits: Float[Array, "b classes"], negative: int, positive: int) -> Float[Array, "b"]:
    """The probability of column `positive` in the softmax over the two columns alone."""
    return softmax(logits[:, [negative, positive]])[:, 1]


def merge_max_if_any(a: Float[Array, "n"], b: Float[Array, "n"], threshold: float = 0.5) -> Float[Array, "n"]:
    """One score for two findings that a test set does not tell apart: the larger where either exceeds `threshold`,
    else the smaller (the calcification rule of Rad-ChestCT)."""
    return np.where((a > threshold) | (b > threshold), np.maximum(a, b), np.minimum(a, b))


# Classification. With `weights` (r, n), how often each row counts in each of r resamplings, a value becomes (r,)
# values: so `intervals` bootstraps without sorting again.


def auc(labels: Num[Array, "n"], scores: Num[Array, "n"], weights: Num[Array, "r n"] | None = None):
    """Area under the ROC curve, ties counting one half; NaN if only one class is present."""
    positive, negative = _by_score(labels, scores, weights)
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(1) * negative.sum(1)
    area = _ratio((positive * (below + negative / 2)).sum(1), pairs, np.nan)
    return float(area[0]) if weights is None else area


def average_precision(labels: Num[Array, "n"], scores: Num[Array, "n"], weights: Num[Array, "r n"] | None = None):
    """The precision at every positive, averaged (the step-wise area under the precision-recall curve, as
    scikit-learn); NaN without positives."""
    positive, negative = (x[:, ::-1] for x in _by_score(labels, scores, weights))
    above = np.cumsum(positive, axis=1)
    precision = _ratio(above, above + np.cumsum(negative, axis=1))
    area = _ratio((positive * precision).sum(1), positive.sum(1), np.nan)
    return float(area[0]) if weights is None else area


def _by_score(labels, scores, weights) -> tuple[Array, Array]:
    """Weights of the positives and of the negatives (r, distinct scores), scores ascending."""
    known = np.flatnonzero(~np.isnan(labels))
    order = known[np.argsort(scores[known], kind="stable")]
    w = np.ones((1, len(order))) if weights is None else weights[:, order].astype(np.float64)
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # NaN differs from everything
    positive = labels[order] > 0.5
    return tuple(
        np.add.reduceat(w * of, starts, axis=1) if len(order) else np.zeros((len(w), 0)) for of in (positive, ~positive)
    )


def macro_auc(labels: Num[Array, "n k"], scores: Num[Array, "n k"], weights: Num[Array, "r n"] | None = None):
    """The mean AUC of the classes that have both kinds of label; NaN if none has."""
    values = mean_known(np.stack([auc(*column, weights) for column in zip(labels.T, scores.T)], axis=-1))
    return float(values) if weights is None else values


def mean_known(values: Float[Array, "*r k"]) -> Float[Array, "*r"]:
    """The mean over the last axis without the NaNs; NaN if there is nothing else."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1), np.nan)


def confusion(labels: Int[Array, "n"], predictions: Int[Array, "n"], classes: int, weights=None):
    """Counts (k, k), rows true and columns predicted, or (r, k, k); matrices of parts of a test set add up."""
    cell = np.asarray(labels) * classes + np.asarray(predictions)
    if weights is None:
        return np.bincount(cell, minlength=classes * classes).reshape(classes, classes)
    return np.stack([weights @ (cell == i) for i in range(classes * classes)], axis=-1).reshape(-1, classes, classes)


def _ratio(a, b, nothing: float = 0.0):
    """a / b, and `nothing` where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b)
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), nothing, np.float64), where=b > 0)


def _diagonal(matrix):
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def accuracy(matrix: Num[Array, "*r k k"]) -> Float[Array, "*r"]:
    return _ratio(_diagonal(matrix).sum(-1), matrix.sum((-2, -1)))


def recall(matrix: Num[Array, "*r k k"]) -> Float[Array, "*r k"]:
    """Per class; 0 where a class has no rows."""
    return _ratio(_diagonal(matrix), matrix.sum(-1))


def precision(matrix: Num[Array, "*r k k"]) -> Float[Array, "*r k"]:
    """Per class; 0 where a class was never predicted."""
    return _ratio(_diagonal(matrix), matrix.sum(-2))


def balanced_accuracy(matrix: Num[Array, "*r k k"]) -> Float[Array, "*r"]:
    """The mean recall of the classes that have rows."""
    return mean_known(np.where(matrix.sum(-1) > 0, recall(matrix), np.nan))


def macro_accuracy(matrix: Num[Array, "*r k k"]) -> Float[Array, "*r"]:
    """The mean recall of the classes that have rows or were predicted (then 0): torchmetrics' macro accuracy."""
    seen = matrix.sum(-1) + matrix.sum(-2) > 0
    return mean_known(np.where(seen, recall(matrix), np.nan))


def weighted_f1(matrix: Num[Array, "*r k k"]) -> Float[Array, "*r"]:
    """F1 per class, weighted by the number of true rows."""
    rows = matrix.sum(-1)
    f1 = _ratio(2.0 * _diagonal(matrix), matrix.sum(-2) + rows)
    return _ratio((f1 * rows).sum(-1), rows.sum(-1))


def threshold_nearest(labels: Num[Array, "n"], scores: Num[Array, "n"]) -> float:
    """The threshold, halfway between two scores, whose ROC point is nearest to (0, 1); 0.5 if a class is missing.

    For a held-out split. A study is positive where its score is above.
    """
    known = ~np.isnan(labels)
    positive, values = labels[known] > 0.5, scores[known].astype(np.float64)
    if positive.all() or not positive.any():
        return 0.5
    alarm, found, at = roc_curve(positive, values, drop_intermediate=False)
    best = int(np.argmin(np.hypot(1 - found, alarm)[1:])) + 1  # the first point calls nothing positive
    below = values[values < at[best]]
    return float((at[best] + below.max()) / 2) if len(below) else float(np.nextafter(at[best], -np.inf))


def threshold_searched(labels: Num[Array, "n"], scores: Num[Array, "n"]) -> float:
    """The threshold of 100 equally spaced ones in [0, 1] whose ROC point is nearest to (0, 1); ties go to the largest.

    The published chest-CT numbers choose it on the labels they then report on, which flatters them. Use it on a
    validation split, or only to compare with those numbers.
    """
    known = ~np.isnan(labels)
    positive, scores = labels[known] > 0.5, scores[known]
    thresholds = np.linspace(0, 1, 100)
    above = scores[None, :] > thresholds[:, None]
    miss = 1.0 - _ratio((above & positive).sum(1), np.full(100, positive.sum()))
    alarm = _ratio((above & ~positive).sum(1), np.full(100, (~positive).sum()))
    distance = np.sqrt(miss**2 + alarm**2)
    return float(thresholds[np.flatnonzero(distance == distance.min())[-1]])


def binary_metrics(labels: Num[Array, "n"], scores: Num[Array, "n"], threshold: float = 0.5) -> dict[str, float]:
    """One finding: positive where score > threshold.

    Returns:
      auc, accuracy, balanced_accuracy, weighted_f1, recall and precision (of the positives). The published table at
      the searched threshold prints plain accuracy under the name of balanced accuracy; here each has its own name.
    """
    known = ~np.isnan(labels)
    matrix = confusion((labels[known] > 0.5).astype(int), (scores[known] > threshold).astype(int), 2)
    return {
        "auc": auc(labels, scores),
        "accuracy": float(accuracy(matrix)),
        "balanced_accuracy": float(balanced_accuracy(matrix)),
        "weighted_f1": float(weighted_f1(matrix)),
        "recall": float(recall(matrix)[1]),
        "precision": float(precision(matrix)[1]),
    }


def multiclass_metrics(
    labels: Int[Array, "n"], probabilities: Float[Array, "n k"], names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """One of k classes: under "" the macro one-versus-rest AUC and, at argmax, weighted F1 and balanced accuracy; under
    each class's name the same three for that class against the rest, positive where its probability exceeds 0.5."""
    k = len(names)
    matrix = confusion(labels, probabilities.argmax(1), k)
    one_hot = np.eye(k)[labels]
    result = {
        "": {
            "auc": macro_auc(one_hot, probabilities),
            "weighted_f1": float(weighted_f1(matrix)),
            "balanced_acc": float(balanced_accuracy(matrix)),
        }
    }
    for j, name in enumerate(names):
        m = binary_metrics(one_hot[:, j], probabilities[:, j])
        result[name] = {
            "auc": m["auc"],
            "weighted_f1": m["weighted_f1"],
            "balanced_acc": m["balanced_accuracy"],
        }
    return result


def pub_brain_5_metrics(labels: Int[Array, "n"], logits: Float[Array, "n 5"]) -> dict[str, float]:
    """All Pub-Brain-5 numbers under their published names, "<metric> (pubbrain5_<task>[_<class>])".

    Tasks: anomaly, four times one disease against normal (softmax over the pair, argmax), and their mean; tumor, three
    classes; disease, all five. A task sees the studies of its own classes only.

    Args:
      labels: class number in the order of `PUB_BRAIN_5`.
      logits: scaled cosine scores.
    """
    logits = np.asarray(logits, np.float64)
    values: dict[str, float] = {}

    def put(task, metrics):
        for metric in ("auc", "weighted_f1", "balanced_acc"):
            values[f"{metric} (pubbrain5_{task})"] = metrics[metric]

    pairs = []
    for j in range(1, 5):
        rows = np.isin(labels, (0, j))
        pairs.append(
            multiclass_metrics((labels[rows] == j).astype(int), softmax(logits[rows][:, [0, j]]), ("0", "1"))[""]
        )
        put(f"anomaly_{PUB_BRAIN_5[j]}", pairs[-1])
    put("anomaly", {m: float(np.mean([p[m] for p in pairs])) for m in pairs[0]})
    for task, columns in (("tumor", (2, 3, 4)), ("disease", (0, 1, 2, 3, 4))):
        rows = np.isin(labels, columns)
        names = tuple(PUB_BRAIN_5[c] for c in columns)
        result = multiclass_metrics(labels[rows] - columns[0], softmax(logits[rows][:, columns]), names)
        for name, metrics in result.items():
            put(f"{task}_{name}" if name else task, metrics)
    return values


# Retrieval.


def retrieval_ranks(similarity: Float[Array, "n m"], match: Bool[Array, "n m"] | None = None) -> Int[Array, "n"]:
    """The 0-based rank, under descending similarity, of each query's best matching candidate.

    Equal similarities are ranked in the candidates' order, so that a model that cannot tell anything apart gets chance.

    Args:
      similarity: query by candidate.
      match: which candidates are right (at least one per query); without it, candidate i for query i.

    Raises:
      ValueError: a query has no right candidate.
    """
    match = np.eye(*similarity.shape, dtype=bool) if match is None else match
    if not match.any(1).all():
        raise ValueError(f"query {int(np.argmin(match.any(1)))} has no right candidate")
    order = np.argsort(-similarity, axis=1, kind="stable")
    return np.argmax(np.take_along_axis(match, order, axis=1), axis=1)


def retrieval_metrics(ranks: Int[Array, "n"], at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """mean_rank, median_rank (1-based, the median rounded down), R@k (the fraction of ranks in the first k)."""
    values = {"mean_rank": float(ranks.mean() + 1), "median_rank": float(np.floor(np.median(ranks)) + 1)}
    return values | {f"R@{k}": float((ranks < k).mean()) for k in at}


def image_text_ranks(
    image_features: Float[Array, "n z"], text_features: Float[Array, "n z"], texts: Int[Array, "n"] | None = None
) -> dict[str, Int[Array, "q"]]:
    """The ranks (see `retrieval_ranks`) of "image_to_text" and "text_to_image", for n pairs in the same order.

    Args:
      image_features, text_features: need not be normalised.
      texts: a number per study, equal for studies with the same report. These are then one target: each report is one
        candidate (and one query), and any of its studies is a right answer. Without it every row is its own target.
    """
    image_features, text_features = l2_normalize(image_features), l2_normalize(text_features)
    match = None
    if texts is not None:
        _, first, of_study = np.unique(texts, return_index=True, return_inverse=True)
        text_features = text_features[first]
        match = of_study[:, None] == np.arange(len(first))[None, :]
    similarity = image_features @ text_features.T
    return {
        "image_to_text": retrieval_ranks(similarity, match),
        "text_to_image": retrieval_ranks(similarity.T, None if match is None else match.T),
    }


def image_text_retrieval(
    image_features, text_features, texts=None, at: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """ "image_to_text_*" and "text_to_image_*" of `retrieval_metrics`, from the arguments of `image_text_ranks`."""
    ranks = image_text_ranks(image_features, text_features, texts)
    return {f"{way}_{k}": v for way, r in ranks.items() for k, v in retrieval_metrics(r, at).items()}
