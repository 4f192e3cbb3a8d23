"""Scores of labels and numbers: accuracy, F1, calibration, errors, correlations, reports of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

CALIBRATION_BINS = 15
DIRECTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        "single_label_classification": {
            **dict.fromkeys(("accuracy", "f1_macro", "f1_weighted", "matthews_correlation"), True),
            **dict.fromkeys(("loss", "ece"), False),
        },
        "multi_label_classification": {
            **dict.fromkeys(("accuracy", "f1_micro", "f1_macro", "f1_weighted", "f1_samples"), True),
            **dict.fromkeys(("loss", "hamming_loss"), False),
        },
        "regression": {
            **dict.fromkeys(("pearson", "spearman", "r2"), True),
            **dict.fromkeys(("loss", "mse", "mae"), False),
        },
    }
)
"""Metrics of each problem type that may pick the best checkpoint, and whether higher is better."""


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return probabilities of each row, in float64; shape as the logits: [num_examples, num_labels]."""
    from scipy.special import softmax as scipy_softmax

    probabilities: npt.NDArray[np.float64] = scipy_softmax(logits.astype(np.float64), axis=-1)
    return probabilities


def single_label_metrics(probabilities: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy, F1, Matthews' coefficient and calibration. `probabilities`: [num_examples, num_labels]."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = probabilities.argmax(-1)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "f1_weighted": float(f1_score(truth, predicted, average="weighted", zero_division=0)),
        "matthews_correlation": float(matthews_corrcoef(truth, predicted)),
        "ece": expected_calibration_error(probabilities.max(-1), predicted == truth),
    }


def accuracy(logits: npt.NDArray[Any], truth: npt.NDArray[np.int64]) -> float:
    """Return the accuracy of `single_label_metrics` alone. `logits`: [num_examples, num_labels]."""
    return float(np.mean(logits.argmax(-1) == truth))


def expected_calibration_error(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """Return the mean gap between confidence and accuracy over 15 equal bins, by examples (Guo et al. 2017)."""
    if not np.isfinite(confidence).all():
        return float("nan")
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    gaps = np.bincount(bins, confidence, CALIBRATION_BINS) - np.bincount(bins, correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / max(1, counts.sum()))


def class_report(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return precision, recall and F1 of each class; and the confusion matrix where each example has one label.

    Args:
        truth: label numbers, shape [num_examples]; or several labels as rows, [num_examples, num_labels].
        predicted: the same as the model predicts them.
    """
    from sklearn.metrics import classification_report, confusion_matrix

    indices = list(range(len(names)))
    report = classification_report(
        truth, predicted, labels=indices, target_names=list(names), output_dict=True, zero_division=0
    )
    found: dict[str, Any] = {"per_class": report, "labels": list(names)}
    if truth.ndim == 1:
        found["confusion_matrix"] = confusion_matrix(truth, predicted, labels=indices).tolist()
    return found


def name_scores(scores: npt.NDArray[Any], names: Sequence[str]) -> list[dict[str, float]]:
    """Return each row of scores, [num_examples, num_labels], by the names of the labels."""
    return [dict(zip(names, map(float, row), strict=True)) for row in scores]


def predicted_labels(logits: npt.NDArray[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the most probable label of each row of logits, and the probability of each label."""
    return {
        "prediction": [names[index] for index in logits.argmax(-1)],
        "scores": name_scores(softmax(logits), names),
    }


def multi_label_metrics(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return exact matches, F1 and Hamming loss; both arrays are [num_examples, num_labels]."""
    from sklearn.metrics import accuracy_score, f1_score, hamming_loss

    scores = {
        f"f1_{average}": float(f1_score(truth, predicted, average=average, zero_division=0))
        for average in ("micro", "macro", "weighted", "samples")
    }
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        **scores,
        "hamming_loss": float(hamming_loss(truth, predicted)),
    }


def regression_metrics(predicted: npt.NDArray[Any], truth: npt.NDArray[Any]) -> dict[str, float]:
    """Return errors and correlations; a constant prediction correlates with nothing and scores 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    varies = len(truth) > 1 and np.ptp(predicted) > 0 and np.ptp(truth) > 0
    return {
        "pearson": float(pearsonr(predicted, truth)[0]) if varies else 0.0,
        "spearman": float(spearmanr(predicted, truth)[0]) if varies else 0.0,
        "mse": float(mean_squared_error(truth, predicted)),
        "mae": float(mean_absolute_error(truth, predicted)),
        "r2": float(r2_score(truth, predicted)) if len(truth) > 1 else 0.0,
    }
