"""Tasks that predict a label, several labels or a number for each example, whatever their inputs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.data import checks, overlap
from orchestrator.data.cache import Built, with_column
from orchestrator.data.examples import Examples
from orchestrator.data.fields import labels
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.label import LabelField
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Arrays, Batch, Encoded, MainMetric, Predictions, Totals
from orchestrator.tasks.bases.inputs import InputTask
from orchestrator.tasks.bases.label_kinds import (
    MULTI,
    REGRESSION,
    SINGLE,
    LabelOptions,
    ProblemType,
    check_label_kind,
    describe_decision,
    describe_labels,
    doubt_problem_type,
    find_problem_type,
    label_config,
    names_in,
    numbers_are_codes,
    numbers_of,
)
from orchestrator.tasks.bases.label_scores import (
    DIRECTIONS,
    accuracy,
    class_report,
    multi_label_metrics,
    name_scores,
    predicted_labels,
    regression_metrics,
    single_label_metrics,
    softmax,
)


@dataclass
class EncodedExamples(Encoded):
    """Encoded inputs and the label of each."""

    inputs: Encoded
    labels: npt.NDArray[Any] | None
    """Shape [num_examples], or [num_examples, num_labels] for lists of labels; None where there are none."""

    def __post_init__(self) -> None:
        self.lengths = self.inputs.lengths
        self.counts = {"targets": np.ones(len(self.lengths), dtype=np.int64)}
        self.augments = self.inputs.augments

    @property
    def is_labelled(self) -> bool:
        return self.labels is not None

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        return self._with_labels(self.inputs.batch(rows, stream), rows)

    def extra_inputs(self, rows: npt.NDArray[np.int64]) -> Batch:
        return self._with_labels(self.inputs.extra_inputs(rows), rows)

    def _with_labels(self, batch: Batch, rows: npt.NDArray[np.int64]) -> Batch:
        return Batch(batch.inputs, {} if self.labels is None else {"labels": self.labels[rows]})

    def targets(self) -> Arrays:
        assert self.labels is not None, "a split without labels cannot be scored"
        return {"label": self.labels}


class ClassificationTask(InputTask):
    """A task that predicts what the column `label` holds."""

    label_aliases: ClassVar[tuple[str, ...]] = ("labels", "target", "category", "class")
    """Names of the column in common data sets."""
    shown_by_type: ClassVar[Mapping[ProblemType, tuple[str, ...]]] = {
        SINGLE: ("accuracy", "f1_macro"),
        MULTI: ("f1_micro", "f1_macro"),
        REGRESSION: ("pearson", "spearman"),
    }

    def __init__(
        self, options: Any, problem_type: ProblemType, label_names: tuple[str, ...], are_codes: bool = False
    ) -> None:
        """
        Args:
            are_codes: whether whole numbers in data are positions among the names, rather than names.
        """
        self.options = options
        self.are_codes = are_codes
        self.problem_type = problem_type
        self.label_names = label_names
        self.metrics_shown = self.shown_by_type[problem_type]
        self.main_metric = MainMetric(self.metrics_shown[0], higher_is_better=True)

    @classmethod
    def columns(cls, options: LabelOptions) -> tuple[Column, ...]:
        label = Column("label", LabelField(numbers_of(options)), aliases=cls.label_aliases)
        return (*cls.input_columns(options), label)

    @classmethod
    def check(cls, options: LabelOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        inputs = [column for column in cls.input_columns(options) if column.name in splits["train"].table.column_names]
        found = [problem for column in inputs for problem in column.field.check(splits, column.name)]
        problem_type = find_problem_type(options, splits["train"])
        wrong = [problem for split in splits.values() for problem in check_label_kind(problem_type, split, cls.noun)]
        if wrong:
            return found + wrong
        doubts = doubt_problem_type(options, splits["train"], recipe)
        if problem_type == REGRESSION:
            found += [item for split in splits.values() for item in checks.check_regression_targets(split, "label")]
            return found + doubts + overlap.check_overlap(splits, inputs)
        try:
            found += checks.check_class_labels(splits, "label", options.label_names)
        except DataError as error:
            return found + list(error.problems)
        return found + doubts + overlap.check_overlap(splits, inputs, "label")

    @classmethod
    def stratify_by(cls, options: LabelOptions, train: Examples) -> str | None:
        return "label" if find_problem_type(options, train) == SINGLE else None

    @classmethod
    def prepare(cls, options: LabelOptions, splits: Mapping[str, Examples]) -> ClassificationTask:
        problem_type = find_problem_type(options, splits["train"])
        if problem_type == REGRESSION:
            task = cls(options, problem_type, ("score",))
        else:
            names = labels.find_label_names(splits, "label", options.label_names)
            task = cls(options, problem_type, names, labels.declares_names(splits, "label", options.label_names))
        task.decision = describe_decision(options, splits["train"])
        return task

    @classmethod
    def restore(cls, options: LabelOptions, config: Any) -> ClassificationTask:
        problem_type: ProblemType = config.problem_type or "single_label_classification"
        return cls(options, problem_type, names_in(config), numbers_are_codes(config))

    def metric_directions(self) -> dict[str, bool]:
        return dict(DIRECTIONS[self.problem_type])

    def describe(self) -> str:
        if self.problem_type == REGRESSION:
            return f"a number for each {self.noun}"
        return ("any of " if self.problem_type == MULTI else "") + describe_labels(self.label_names)

    def check_inputs(self, examples: Examples) -> list[Problem]:
        held = examples.table.column_names
        columns = [column for column in self.input_columns(self.options) if column.name in held]
        found = [item for column in columns for item in column.field.check({"given": examples}, column.name)]
        found = [problem for problem in found if problem.fatal]
        if "label" in held:
            found += check_label_kind(self.problem_type, examples, self.noun)
            if self.problem_type == REGRESSION:
                found += checks.check_regression_targets(examples, "label")
        return found

    def config_changes(self) -> dict[str, Any]:
        return label_config(self.label_names, self.problem_type, self.are_codes)

    def cache_parts(self, processor: Any) -> list[Any]:
        read = [self.problem_type, self.label_names, self.are_codes]
        return [self.name, *read, *self.input_cache_parts(processor)]

    def encode(self, examples: Examples, processor: Any) -> Built:
        values = self._encode_labels(examples) if "label" in examples.table.column_names else None
        inputs = self.encode_inputs(examples, processor)
        return inputs if values is None else with_column(inputs, "label", values)

    def _encode_labels(self, examples: Examples) -> pa.Array:
        if self.problem_type == REGRESSION:
            return pa.array(labels.encode_targets(examples, "label"))
        return _as_column(labels.encode_labels(examples, "label", self.label_names, self.are_codes))

    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        shape = (number, len(self.label_names)) if self.problem_type == MULTI else (number,)
        values = np.zeros(shape, np.int64 if self.problem_type == SINGLE else np.float32)
        return self.longest_inputs(number, processor).append_column("label", _as_column(values))

    def wrap(self, table: pa.Table, processor: Any) -> EncodedExamples:
        names = [name for name in table.column_names if name != "label"]
        return EncodedExamples(self.wrap_inputs(table.select(names), processor), self._label_array(table))

    def _label_array(self, table: pa.Table) -> npt.NDArray[Any] | None:
        if "label" not in table.column_names:
            return None
        column = table["label"].combine_chunks()
        if self.problem_type == MULTI:
            flat: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
            return flat.reshape(-1, len(self.label_names))
        values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values

    def segments(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        text = self.show_inputs(encoded, row, processor)
        targets = encoded.extra_inputs(np.array([row])).targets
        if not targets:
            return [(text, False)]
        label = targets["labels"][0]
        if self.problem_type == SINGLE:
            shown = self.label_names[int(label)]
        elif self.problem_type == MULTI:
            shown = ", ".join(name for name, on in zip(self.label_names, label, strict=True) if on)
        else:
            shown = f"{float(label):g}"
        return [(f"{text} -> ", False), (shown, True)]

    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        return self._summed_loss(outputs.logits.float(), batch.targets["labels"]) / totals["targets"]

    def _summed_loss(self, logits: Any, labels: Any) -> Any:
        from torch.nn import functional

        if self.problem_type == SINGLE:
            return functional.cross_entropy(logits, labels, reduction="sum")
        if self.problem_type == REGRESSION:
            return functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        # One target an example: the mean over its labels, as in transformers.
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(self.label_names)

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        return {"logits": outputs.logits.float()}

    def metrics(self, predictions: Predictions, targets: Arrays) -> dict[str, float]:
        logits, truth = predictions["logits"], targets["label"]
        if self.problem_type == REGRESSION:
            return regression_metrics(logits[:, 0], truth)
        if self.problem_type == MULTI:
            return multi_label_metrics(logits > 0, truth > 0)
        return single_label_metrics(softmax(logits), truth)

    def score(self, metric: str, predictions: Predictions, targets: Arrays) -> float:
        if metric == "accuracy" and self.problem_type == SINGLE:
            return accuracy(predictions["logits"], targets["label"])
        return super().score(metric, predictions, targets)

    def details(self, predictions: Predictions, targets: Arrays) -> dict[str, Any]:
        if self.problem_type == REGRESSION:
            return {}
        logits = predictions["logits"]
        predicted = logits.argmax(-1) if self.problem_type == SINGLE else logits > 0
        return class_report(targets["label"], predicted, self.label_names)

    def prediction_rows(self, predictions: Predictions, examples: Examples) -> dict[str, list[Any]]:
        logits = predictions["logits"]
        if self.problem_type == REGRESSION:
            return {"prediction": [float(value) for value in logits[:, 0]]}
        if self.problem_type == MULTI:
            scores = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
            names = [[name for name, on in zip(self.label_names, row, strict=True) if on > 0.5] for row in scores]
            return {"prediction": names, "scores": name_scores(scores, self.label_names)}
        return predicted_labels(logits, self.label_names)


def _as_column(values: npt.NDArray[Any]) -> pa.Array:
    """Return an array as a column; the rows of one with two dimensions as lists."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
