"""What can be told of a phantom without looking at it: baselines that a model has to beat."""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from jaxmed.data import intensity
from jaxmed.data.shards import Shards

BINS = 24
_MOST = 1500  # images to fit on


def baselines(dataset: Shards, classes: Sequence[str]) -> dict[str, float]:
    """Balanced accuracy of logistic regressions that are fitted on `train` and tried on another split.

    Features: "chance" none; "size" height, width, their logarithms and ratio; "mean" the mean grey value as shown;
    "histogram" of `BINS` grey values as shown. Empty if there is no second split, or a class is missing in one.
    """
    index = dataset.index
    truth = np.argmax([index[f"label/{c}"] for c in classes], 0)
    train = np.flatnonzero(index["split"] == "train")[:_MOST]
    others = [np.flatnonzero(index["split"] == name) for name in ("test", "val")]
    test = next((ids for ids in others if len(ids)), np.zeros(0, int))
    if len(set(truth[train])) < len(classes) or len(set(truth[test])) < len(classes):
        return {}
    h, w = index["height"].astype(float), index["width"].astype(float)
    sizes = np.stack([h, w, np.log(h), np.log(w), h / w, h * w], 1)
    greys = np.stack([_histogram(dataset, int(i)) for i in [*train, *test]])
    means = greys @ np.linspace(0, 1, BINS)[:, None]
    result = {"chance": 1 / len(classes)}
    rows = slice(len(train)), slice(len(train), None)
    for name, a, b in (
        ("size", sizes[train], sizes[test]),
        ("mean", means[rows[0]], means[rows[1]]),
        ("histogram", greys[rows[0]], greys[rows[1]]),
    ):
        with threadpool_limits(1):  # small matrices: more threads only wait for each other
            model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500)).fit(a, truth[train])
            result[name] = float(balanced_accuracy_score(truth[test], model.predict(b)))
    return result


def _histogram(dataset: Shards, id: int) -> np.ndarray:
    [scan] = dataset.record(id).study()["scans"]
    shown = intensity.table(scan["meta"])[scan["voxels"][0, ::2, ::2]]
    return np.histogram(shown, BINS, (0, 65536))[0] / shown.size
