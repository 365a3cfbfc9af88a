"""Do probabilities mean what they say? Expected calibration error, Brier score, a temperature from held-out data."""

import numpy as np
from jaxtyping import Float, Num
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit
from sklearn.metrics import brier_score_loss

from jaxmed.evals import scores

Array = np.ndarray
BINS = 15
_SMALL = 1e-12


def expected_error(correct: Num[Array, "n"], confidence: Float[Array, "n"], bins: int = BINS) -> float:
    """The mean distance of confidence and frequency in equal bins of [0, 1], weighted by the bins' share of rows."""
    if not len(confidence):
        return float("nan")
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(at, correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def binary(labels: Num[Array, "n"], probabilities: Float[Array, "n"]) -> dict[str, float]:
    """ECE of the probability of one finding, and its Brier score; NaN without known labels."""
    known = ~np.isnan(labels)
    positive, p = (labels[known] > 0.5).astype(int), probabilities[known].astype(np.float64)
    brier = brier_score_loss(positive, p, pos_label=1) if known.any() else np.nan
    return {"ece": expected_error(positive, p), "brier": float(brier)}


def multiclass(labels: Num[Array, "n"], probabilities: Float[Array, "n k"]) -> dict[str, float]:
    """ECE of the most likely class's probability, and the Brier score summed over the classes (0 to 2)."""
    best = probabilities.argmax(1)
    one_hot = np.eye(probabilities.shape[1])[labels]
    return {
        "ece": expected_error((best == labels).astype(float), probabilities.max(1)),
        "brier": float(((probabilities - one_hot) ** 2).sum(1).mean()),
    }


def cool(probabilities: Float[Array, "n k"], temperature: float, *, exclusive: bool) -> Float[Array, "n k"]:
    """The probabilities that logits divided by `temperature` give: of a softmax if `exclusive`, else of each column."""
    z = _logits(probabilities, exclusive) / temperature
    return scores.softmax(z) if exclusive else expit(z)


def _logits(probabilities, exclusive: bool) -> Array:
    p = np.clip(probabilities.astype(np.float64), _SMALL, 1 - _SMALL)
    return np.log(p) if exclusive else logit(p)


def fit_temperature(labels: Num[Array, "n k"], probabilities: Float[Array, "n k"], *, exclusive: bool) -> float:
    """The temperature of least negative log-likelihood (between 0.01 and 100). Fit it on held-out studies.

    Args:
      labels: 1, 0 or NaN (left out); one-hot if `exclusive`.
    """
    known = ~np.isnan(labels)
    positive = np.where(known, labels, 0) > 0.5

    logits = _logits(probabilities, exclusive)

    def loss(log_temperature: float) -> float:
        z = logits / np.exp(log_temperature)
        if exclusive:
            return -float(log_softmax(z, axis=1)[positive].mean())
        return -float(log_expit(np.where(positive, z, -z))[known].mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log((0.01, 100)), method="bounded").x))
