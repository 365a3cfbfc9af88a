"""Bootstrap intervals: patients are drawn again with all of their studies, and everything is measured again."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxmed.core.rng import np_rng

CHUNK = 8_000_000  # weights in memory at once


def weights(groups: Shaped[np.ndarray, "n"], times: int, rng: np.random.Generator) -> Int[np.ndarray, "times n"]:
    """How often each row counts in each of `times` resamplings: as often as its group was drawn, with replacement."""
    _, of_row = np.unique(groups, return_inverse=True)
    m = int(of_row.max()) + 1
    counts = np.stack([np.bincount(rng.integers(0, m, m), minlength=m) for _ in range(times)])
    return counts[:, of_row.reshape(-1)]


def bootstrap(
    measure: Callable[[Int[np.ndarray, "r n"]], Mapping[str, Float[np.ndarray, "r *k"]]],
    groups: Shaped[np.ndarray, "n"],
    times: int,
    *,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{name: (value, low, high)}, each of the shape of one value.

    Args:
      measure: weights of the rows -> values, one for each of the r rows of weights.
      groups: what is drawn: the patient of each row (rows of one patient are not independent).
      times: resamplings; 0 gives NaN for low and high.
      level: of the percentile interval. Resamplings in which a value is NaN (a class was not drawn) are left out.
    """
    n, rng = len(groups), np_rng(seed)
    values = {k: np.asarray(v)[0] for k, v in measure(np.ones((1, n), np.int64)).items()}
    drawn: dict[str, list[np.ndarray]] = {k: [] for k in values}
    step = max(1, CHUNK // max(n, 1))
    for start in range(0, times, step):
        for k, v in measure(weights(groups, min(step, times - start), rng)).items():
            drawn[k].append(np.asarray(v))
    result = {}
    for k, v in values.items():
        tails = _percentiles(np.concatenate(drawn[k]), level) if times else np.full((2, *np.shape(v)), np.nan)
        result[k] = (v, tails[0], tails[1])
    return result


def _percentiles(x: np.ndarray, level: float) -> np.ndarray:
    tails = np.array([0.5 - level / 2, 0.5 + level / 2]) * 100
    flat = x.reshape(len(x), -1)
    columns = [c[~np.isnan(c)] for c in flat.T]
    found = [np.percentile(c, tails) if len(c) else np.full(2, np.nan) for c in columns]
    return np.stack(found, axis=1).reshape(2, *x.shape[1:])
