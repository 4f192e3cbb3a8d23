"""One of several labels for each example: the config, the scores, the rows of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

CALIBRATION_BINS = 15
NUM_LABELS_TOLD = 12
INTEGER_LABELS, CODES = "integer_labels", "positions"
DIRECTIONS: Mapping[str, bool] = MappingProxyType(
    {
        "accuracy": True,
        "f1_macro": True,
        "f1_weighted": True,
        "matthews_correlation": True,
        "loss": False,
        "ece": False,
    }
)
"""Metrics that may pick the best checkpoint, and whether higher is better."""


def label_config(names: Sequence[str], problem_type: str, are_codes: bool) -> dict[str, Any]:
    """What a model's config says of its labels, in the words of transformers; and what whole numbers in data stand for.

    Args:
        are_codes: they are positions among the names, rather than names themselves.
    """
    return {
        INTEGER_LABELS: CODES if are_codes else "names",
        "problem_type": problem_type,
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def numbers_are_codes(config: Any) -> bool:
    """Whether whole numbers in data are positions among the label names of a model's config."""
    return getattr(config, INTEGER_LABELS, None) == CODES


def names_in(config: Any) -> tuple[str, ...]:
    """The label names in a model's config."""
    return tuple(config.id2label[index] for index in range(config.num_labels))


def describe_labels(names: Sequence[str]) -> str:
    """`3 labels: ask, order, refund`."""
    shown = ", ".join(names[:NUM_LABELS_TOLD]) + (", ..." if len(names) > NUM_LABELS_TOLD else "")
    return f"{len(names)} labels: {shown}"


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Probabilities of each row, in float64; shape as the logits: [num_examples, num_labels]."""
    from scipy.special import softmax as scipy_softmax

    probabilities: npt.NDArray[np.float64] = scipy_softmax(logits.astype(np.float64), axis=-1)
    return probabilities


def single_label_metrics(probabilities: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, F1, Matthews' coefficient and calibration. `probabilities`: [num_examples, num_labels]."""
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
    """The same as in `single_label_metrics`, without the others. `logits`: [num_examples, num_labels]."""
    return float(np.mean(logits.argmax(-1) == truth))


def expected_calibration_error(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins, weighted by their examples (Guo et al. 2017)."""
    if not np.isfinite(confidence).all():
        return float("nan")
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    gaps = np.bincount(bins, confidence, CALIBRATION_BINS) - np.bincount(bins, correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / max(1, counts.sum()))


def class_report(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each class; and the confusion matrix where each example has one label.

    Args:
        truth: label numbers, shape [num_examples]; or several labels as rows, [num_examples, num_labels].
        predicted: the same of the model.
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
    """Each row of scores, [num_examples, num_labels], by the names of the labels."""
    return [dict(zip(names, map(float, row), strict=True)) for row in scores]


def predicted_labels(logits: npt.NDArray[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """The likeliest label of each row of logits, and the probability of each."""
    return {
        "prediction": [names[index] for index in logits.argmax(-1)],
        "scores": name_scores(softmax(logits), names),
    }
