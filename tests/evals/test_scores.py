"""Metrics against scikit-learn and by hand; ties, missing labels and absent classes."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from jaxmed.evals import scores


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_classifier_from_prompts(rng):
    text = rng.normal(size=(6, 4)) * rng.uniform(0.1, 9, size=(6, 1))
    classifier = scores.classifier_from_prompts(text, 2)
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    second = unit[3:].mean(0)
    np.testing.assert_allclose(classifier[:, 1], second / np.linalg.norm(second))
    image = rng.normal(size=(5, 4))
    cosine = scores.zero_shot_logits(image, classifier)
    np.testing.assert_allclose(cosine[:, 1], image @ classifier[:, 1] / np.linalg.norm(image, axis=1))
    logits = scores.zero_shot_logits(image, classifier, 7.0)
    pair = scores.pair_probability(np.concatenate([logits, rng.normal(size=(5, 1))], axis=1), 0, 1)
    np.testing.assert_allclose(pair, 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])))
    with pytest.raises(ValueError, match="6 prompts are not a whole number of templates for 4 classes"):
        scores.classifier_from_prompts(text, 4)


def test_binary_metrics_are_those_of_scikit_learn(rng):
    labels, values = rng.integers(0, 2, 80).astype(float), rng.integers(0, 20, 80) / 20  # with ties
    with_missing = np.concatenate([labels, [np.nan] * 7])
    m = scores.binary_metrics(with_missing, np.concatenate([values, rng.uniform(size=7)]), 0.4)
    predicted = values > 0.4
    expected = {
        "auc": sk.roc_auc_score(labels, values),
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "weighted_f1": sk.f1_score(labels, predicted, average="weighted"),
        "recall": sk.recall_score(labels, predicted),
        "precision": sk.precision_score(labels, predicted),
    }
    assert m == pytest.approx(expected)
    assert np.isnan(scores.auc(np.ones(4), np.arange(4)))
    none = scores.binary_metrics(labels, values, 2.0)  # nothing is called positive
    assert none["precision"] == none["recall"] == 0.0 and none["balanced_accuracy"] == 0.5
    many = np.stack([labels, np.ones(80), 1 - labels], axis=1)
    assert scores.macro_auc(many, np.stack([values, values, -values], axis=1)) == pytest.approx(
        m_auc := expected["auc"]
    )
    assert np.isnan(scores.macro_auc(many[:, 1:2], values[:, None])) and 0 < m_auc < 1


def test_threshold_search_takes_the_last_of_equals():
    labels, values = np.array([0.0, 0.0, 1.0, 1.0, np.nan]), np.array([0.1, 0.2, 0.8, 0.9, 0.95])
    threshold = scores.threshold_searched(labels, values)  # everything from 0.2 to 0.8 is perfect
    assert threshold == np.linspace(0, 1, 100)[79] and 0.79 < threshold < 0.8
    assert scores.binary_metrics(labels, values, threshold)["accuracy"] == 1.0


def test_merge_of_two_findings():
    a, b = np.array([0.2, 0.6, 0.2, 0.9]), np.array([0.4, 0.1, 0.5, 0.8])
    np.testing.assert_array_equal(scores.merge_max_if_any(a, b), [0.2, 0.6, 0.2, 0.9])


def test_multiclass_metrics_are_those_of_scikit_learn(rng):
    labels = rng.integers(0, 3, 60)
    p = scores.softmax(rng.normal(size=(60, 3)) + 1.5 * np.eye(3)[labels])
    result = scores.multiclass_metrics(labels, p, ("a", "b", "c"))
    assert result[""] == pytest.approx(
        {
            "auc": sk.roc_auc_score(labels, p, multi_class="ovr"),
            "weighted_f1": sk.f1_score(labels, p.argmax(1), average="weighted"),
            "balanced_acc": sk.balanced_accuracy_score(labels, p.argmax(1)),
        }
    )
    assert result["b"]["balanced_acc"] == pytest.approx(sk.balanced_accuracy_score(labels == 1, p[:, 1] > 0.5))


def test_states_merge(rng):
    labels, predicted = rng.integers(0, 4, (2, 50))
    parts = sum(scores.confusion(labels[i::3], predicted[i::3], 4) for i in range(3))
    whole = scores.confusion(labels, predicted, 4)
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(whole, sk.confusion_matrix(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes without rows
        gone = labels[labels != 2], predicted[labels != 2]
        assert scores.balanced_accuracy(scores.confusion(*gone, 4)) == pytest.approx(sk.balanced_accuracy_score(*gone))


def test_pub_brain_5_tasks_see_their_own_classes(rng):
    labels = np.repeat(np.arange(5), 8)
    values = scores.pub_brain_5_metrics(labels, 9.0 * np.eye(5)[labels])
    assert len(values) == 45 and set(values.values()) == {1.0}
    # Studies of other classes, however bad, do not touch the tumour task.
    logits = rng.normal(size=(40, 5)) + 2 * np.eye(5)[labels]
    other = np.where(np.isin(labels, (0, 1))[:, None], -logits, logits)
    a, b = scores.pub_brain_5_metrics(labels, logits), scores.pub_brain_5_metrics(labels, other)
    assert all(a[k] == b[k] for k in a if "tumor" in k)
    assert any(a[k] != b[k] for k in a if "disease" in k)


def test_retrieval(rng):
    similarity = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.3], [0.1, 0.2, 0.2]])
    np.testing.assert_array_equal(scores.retrieval_ranks(similarity), [0, 2, 1])
    assert scores.retrieval_metrics(np.array([0, 2, 1, 7]), at=(1, 3)) == {
        "mean_rank": 3.5,
        "median_rank": 2.0,
        "R@1": 0.25,
        "R@3": 0.75,
    }
    # A model for which all is one gets chance.
    same = scores.image_text_retrieval(np.ones((20, 4)), np.ones((20, 4)))
    assert same["image_to_text_R@1"] == 0.05 and same["text_to_image_R@5"] == 0.25
    with pytest.raises(ValueError, match="query 1 has no right candidate"):
        scores.retrieval_ranks(similarity, np.eye(3, dtype=bool) & (np.arange(3) != 1))


def test_equal_reports_are_one_target(rng):
    texts = np.array([7, 3, 7, 5, 3])
    reports = rng.normal(size=(9, 6))
    text = reports[texts]
    # Every image is nearest to its own report: with repeats counted apart, half of them would "fail".
    perfect = scores.image_text_retrieval(text + 1e-3 * rng.normal(size=text.shape), text, texts, at=(1,))
    assert perfect["image_to_text_R@1"] == perfect["text_to_image_R@1"] == 1.0
    # The other way there are three queries, and any study of the report will do.
    image = np.where((np.arange(5) == 2)[:, None], -text, text)
    assert scores.image_text_retrieval(image, text, texts, at=(1,))["text_to_image_R@1"] == 1.0
    assert scores.image_text_retrieval(image, text, texts, at=(1,))["image_to_text_R@1"] == 0.8
