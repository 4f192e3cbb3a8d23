"""Text classification: one label, several labels, or a number for each text (or pair of texts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from orchestrator.data import checks, overlap
from orchestrator.data.column_types import describe_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields import labels
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.label import LabelField
from orchestrator.data.fields.label_columns import Numbers
from orchestrator.data.fields.text import TextField
from orchestrator.data.ragged import Ragged
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section
from orchestrator.tasks.base import Arrays, Batch, Encoded, MainMetric, Predictions, Task, Totals
from orchestrator.tasks.bases.classification import (
    DIRECTIONS,
    accuracy,
    class_report,
    describe_labels,
    label_config,
    name_scores,
    names_in,
    numbers_are_codes,
    predicted_labels,
    single_label_metrics,
    softmax,
)
from orchestrator.tasks.bases.text import check_length, tokenizer_state

if TYPE_CHECKING:
    from orchestrator.models import SourceModel

MANY_ROWS = 10
"""Of each class, as a rule."""
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


class TextOptions(Section):
    """Options of `text-classification`."""

    max_length: Annotated[int, Field(gt=0)] = 128
    """Texts are cut at this many tokens."""
    problem_type: Literal["auto"] | ProblemType = "auto"
    """`auto` goes by the values, however they are stored: lists are multi-label, numbers of which some have a fraction
    are regression, everything else is single-label."""
    label_names: list[str] | None = None
    """Names of labels 0, 1, ... where the data hold whole numbers, or of the places of multi-hot lists; or the order of
    the labels where the data hold names. With them, numbers are never regression, unless `problem_type` says so."""


@dataclass
class EncodedTexts(Encoded):
    """Token ids of each text, and its label."""

    inputs: dict[str, Ragged]
    fill: dict[str, int]
    labels: npt.NDArray[Any] | None

    def __post_init__(self) -> None:
        self.lengths = self.inputs["input_ids"].lengths
        self.counts = {"targets": np.ones(len(self.lengths), dtype=np.int64)}

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        arrays: Arrays = {name: column.pad(rows, self.fill[name]) for name, column in self.inputs.items()}
        lengths = self.lengths[rows]
        arrays["attention_mask"] = (np.arange(max(1, lengths.max(initial=1))) < lengths[:, None]).astype(np.int64)
        return Batch(arrays, {} if self.labels is None else {"labels": self.labels[rows]})

    def targets(self) -> Arrays:
        assert self.labels is not None, "a split without labels cannot be scored"
        return {"label": self.labels}


class TextClassification(Task):
    """A label (or labels, or a number) for each text, through `AutoModelForSequenceClassification`."""

    name = "text-classification"
    Options = TextOptions
    auto_class = "AutoModelForSequenceClassification"
    processor_class = "AutoTokenizer"
    shown_by_type: ClassVar[dict[str, tuple[str, ...]]] = {
        "single_label_classification": ("accuracy", "f1_macro"),
        "multi_label_classification": ("f1_micro", "f1_macro"),
        "regression": ("pearson", "spearman"),
    }

    def __init__(
        self, options: TextOptions, problem_type: ProblemType, label_names: tuple[str, ...], are_codes: bool = False
    ) -> None:
        """
        Args:
            are_codes: whole numbers in data are positions among the names, rather than names.
        """
        self.options = options
        self.are_codes = are_codes
        self.problem_type = problem_type
        self.label_names = label_names
        self.metrics_shown = self.shown_by_type[problem_type]
        self.main_metric = MainMetric(self.metrics_shown[0], higher_is_better=True)

    @classmethod
    def columns(cls, options: TextOptions) -> tuple[Column, ...]:
        numbers: Numbers = "any" if options.problem_type == "auto" else "classes"
        if options.problem_type == "regression":
            numbers = "targets"
        elif options.label_names is not None:
            numbers = "text"
        aliases = ("labels", "target", "intent", "category", "class", "score")
        return (
            Column("text", TextField(), aliases=("sentence", "sentence1", "content", "premise", "question1")),
            Column("text_pair", TextField(), required=False, aliases=("sentence2", "hypothesis", "question2")),
            Column("label", LabelField(numbers), aliases=aliases),
        )

    @classmethod
    def check(cls, options: TextOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        held = splits["train"].table.column_names
        texts = [column for column in cls.columns(options)[:2] if column.name in held]
        found = [problem for column in texts for problem in column.field.check(splits, column.name)]
        problem_type = find_problem_type(options, splits["train"])
        wrong = [problem for split in splits.values() for problem in check_label_kind(problem_type, split)]
        if wrong:
            return found + wrong
        if problem_type == "regression":
            found += [item for split in splits.values() for item in checks.check_regression_targets(split, "label")]
            found += doubt_problem_type(options, splits["train"], recipe)
            return found + overlap.check_overlap(splits, texts)
        try:
            found += checks.check_class_labels(splits, "label", options.label_names)
        except DataError as error:
            return found + list(error.problems)
        found += doubt_problem_type(options, splits["train"], recipe)
        return found + overlap.check_overlap(splits, texts, "label")

    @classmethod
    def stratify_by(cls, options: TextOptions, train: Examples) -> str | None:
        return "label" if find_problem_type(options, train) == "single_label_classification" else None

    @classmethod
    def prepare(cls, options: TextOptions, splits: Mapping[str, Examples]) -> TextClassification:
        problem_type = find_problem_type(options, splits["train"])
        if problem_type == "regression":
            task = cls(options, problem_type, ("score",))
        else:
            names = labels.find_label_names(splits, "label", options.label_names)
            task = cls(options, problem_type, names, labels.declares_names(splits, "label", options.label_names))
        task.decision = how_labels_are_read(options, splits["train"])
        return task

    @classmethod
    def restore(cls, options: TextOptions, config: Any) -> TextClassification:
        problem_type: ProblemType = config.problem_type or "single_label_classification"
        return cls(options, problem_type, names_in(config), numbers_are_codes(config))

    def metric_directions(self) -> dict[str, bool]:
        if self.problem_type == "single_label_classification":
            return dict(DIRECTIONS)
        scores, errors = {
            "multi_label_classification": (
                ("accuracy", "f1_micro", "f1_macro", "f1_weighted", "f1_samples"),
                ("hamming_loss",),
            ),
            "regression": (("pearson", "spearman", "r2"), ("mse", "mae")),
        }[self.problem_type]
        return {**dict.fromkeys(scores, True), **dict.fromkeys(("loss", *errors), False)}

    def describe(self) -> str:
        if self.problem_type == "regression":
            return "a number for each text"
        some = "any of " if self.problem_type == "multi_label_classification" else ""
        return some + describe_labels(self.label_names)

    def check_inputs(self, examples: Examples) -> list[Problem]:
        texts = [name for name in ("text", "text_pair") if name in examples.table.column_names]
        found = [problem for name in texts for problem in TextField().check({"given": examples}, name)]
        if "label" in examples.table.column_names:
            found += check_label_kind(self.problem_type, examples)
            if self.problem_type == "regression":
                found += checks.check_regression_targets(examples, "label")
        return found

    def config_changes(self) -> dict[str, Any]:
        return label_config(self.label_names, self.problem_type, self.are_codes)

    def load_processor(self, source: SourceModel) -> tuple[Any, list[Problem]]:
        from orchestrator import models

        return models.load_tokenizer(source)

    def configure_model(self, model: Any, processor: Any, source: SourceModel) -> None:
        from orchestrator import models

        models.set_padding_token(model, processor, source)

    def check_model(self, processor: Any, config: Any, recipe: Recipe) -> list[Problem]:
        return check_length(self.options.max_length, processor, config, self.auto_class, recipe)

    def cache_parts(self, processor: Any) -> list[Any]:
        read = [self.problem_type, self.label_names, self.are_codes]
        return [self.name, self.options.max_length, *read, tokenizer_state(processor)]

    def encode(self, examples: Examples, processor: Any) -> pa.Table:
        texts = examples.table["text"].to_pylist()
        pairs = examples.table["text_pair"].to_pylist() if "text_pair" in examples.table.column_names else None
        encoded = processor(
            texts,
            pairs,
            truncation=True,
            max_length=self.options.max_length,
            padding=False,
            return_attention_mask=False,
        )
        columns = {name: pa.array(rows, pa.list_(pa.int32())) for name, rows in encoded.items()}
        if "label" in examples.table.column_names:
            columns["label"] = self._encode_labels(examples)
        return pa.table(columns)

    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        ids = [np.ones(self.options.max_length, np.int32)] * number
        labels = np.zeros((number, max(1, len(self.label_names))), np.float32)
        column = pa.array(labels[:, 0])
        if self.problem_type == "single_label_classification":
            column = column.cast(pa.int64())
        elif self.problem_type == "multi_label_classification":
            column = pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), labels.shape[1])
        return pa.table({"input_ids": pa.array(ids), "label": column})

    def _encode_labels(self, examples: Examples) -> pa.Array:
        if self.problem_type == "regression":
            return pa.array(labels.encode_targets(examples, "label"))
        encoded = labels.encode_labels(examples, "label", self.label_names, self.are_codes)
        if self.problem_type == "single_label_classification":
            return pa.array(encoded)
        return pa.FixedSizeListArray.from_arrays(pa.array(encoded.reshape(-1)), len(self.label_names))

    def wrap(self, table: pa.Table, processor: Any) -> EncodedTexts:
        names = [name for name in table.column_names if name != "label"]
        fill = {name: processor.pad_token_id if name == "input_ids" else 0 for name in names}
        return EncodedTexts({name: Ragged.of(table[name]) for name in names}, fill, self._label_array(table))

    def _label_array(self, table: pa.Table) -> npt.NDArray[Any] | None:
        if "label" not in table.column_names:
            return None
        column = table["label"].combine_chunks()
        if self.problem_type == "multi_label_classification":
            flat: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
            return flat.reshape(-1, len(self.label_names))
        values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        count = int((encoded.lengths >= self.options.max_length).sum())
        if count == 0:
            return []
        return [
            Problem(
                f"{count} of {len(encoded)} texts of {split} reach {self.options.max_length} tokens and are cut there",
                recipe.origin.where("target.options.max_length"),
                "raise target.options.max_length if the end of the texts matters",
                fatal=False,
            )
        ]

    def pieces(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        batch = encoded.batch(np.array([row]))
        text = processor.decode(batch.inputs["input_ids"][0])
        if not batch.targets:
            return [(text, False)]
        label = batch.targets["labels"][0]
        if self.problem_type == "single_label_classification":
            shown = self.label_names[int(label)]
        elif self.problem_type == "multi_label_classification":
            shown = ", ".join(name for name, on in zip(self.label_names, label, strict=True) if on)
        else:
            shown = f"{float(label):g}"
        return [(f"{text} -> ", False), (shown, True)]

    def example_inputs(self, processor: Any) -> dict[str, Any]:
        import torch

        # No attention mask: models look into it, which they cannot where there are only shapes (the meta device).
        return {"input_ids": torch.tensor([[1, 2, 3, 1]])}

    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        return self._summed_loss(outputs.logits.float(), batch.targets["labels"]) / totals["targets"]

    def _summed_loss(self, logits: Any, labels: Any) -> Any:
        from torch.nn import functional

        if self.problem_type == "single_label_classification":
            return functional.cross_entropy(logits, labels, reduction="sum")
        if self.problem_type == "regression":
            return functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        # One target an example: the mean over its labels, as in transformers.
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(self.label_names)

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        return {"logits": outputs.logits.float()}

    def metrics(self, predictions: Predictions, targets: Arrays) -> dict[str, float]:
        logits, truth = predictions["logits"], targets["label"]
        if self.problem_type == "regression":
            return regression_metrics(logits[:, 0], truth)
        if self.problem_type == "multi_label_classification":
            return multi_label_metrics(logits > 0, truth > 0)
        return single_label_metrics(softmax(logits), truth)

    def score(self, metric: str, predictions: Predictions, targets: Arrays) -> float:
        if metric == "accuracy" and self.problem_type == "single_label_classification":
            return accuracy(predictions["logits"], targets["label"])
        return super().score(metric, predictions, targets)

    def details(self, predictions: Predictions, targets: Arrays) -> dict[str, Any]:
        if self.problem_type == "regression":
            return {}
        logits = predictions["logits"]
        single = self.problem_type == "single_label_classification"
        return class_report(targets["label"], logits.argmax(-1) if single else logits > 0, self.label_names)

    def prediction_rows(self, predictions: Predictions) -> dict[str, list[Any]]:
        logits = predictions["logits"]
        if self.problem_type == "regression":
            return {"prediction": [float(value) for value in logits[:, 0]]}
        if self.problem_type == "multi_label_classification":
            scores = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
            names = [[name for name, on in zip(self.label_names, row, strict=True) if on > 0.5] for row in scores]
            return {"prediction": names, "scores": name_scores(scores, self.label_names)}
        return predicted_labels(logits, self.label_names)


TASK = TextClassification


def find_problem_type(options: TextOptions, train: Examples) -> ProblemType:
    """What kind of labels these are: lists of labels, numbers some of which have a fraction, or one label.

    Where names are declared, numbers are classes.
    """
    if options.problem_type != "auto":
        return options.problem_type
    kind = train.table["label"].type
    if pa.types.is_list(kind):
        return "multi_label_classification"
    is_named = options.label_names is not None or train.names.get("label") is not None
    return "regression" if pa.types.is_floating(kind) and not is_named else "single_label_classification"


def how_labels_are_read(options: TextOptions, train: Examples) -> str:
    """What the values of the labels decided, and how the recipe says otherwise; empty where there was no choice."""
    if options.problem_type != "auto" or train.names.get("label") is not None or options.label_names is not None:
        return ""
    kind = train.table["label"].type
    if pa.types.is_floating(kind):
        otherwise = "to predict classes, set target.options.problem_type to single_label_classification"
        return f"numbers to be predicted, since some have a fraction; {otherwise}"
    if pa.types.is_integer(kind):
        otherwise = "to predict numbers, set target.options.problem_type to regression"
        return f"classes, since all numbers are whole; {otherwise}"
    return ""


def doubt_problem_type(options: TextOptions, train: Examples, recipe: Recipe) -> list[Problem]:
    """A warning where numbers are taken for classes though most classes are rare, or for amounts though few differ."""
    decision = how_labels_are_read(options, train)
    if not decision:
        return []
    values = train.table["label"].drop_null()
    count = len(values.unique())
    many_rows_each = count * MANY_ROWS <= len(values)
    if pa.types.is_integer(values.type) and (many_rows_each or count <= MANY_ROWS):
        return []
    if pa.types.is_floating(values.type) and (count > MANY_ROWS or not many_rows_each):
        return []
    what = f"the labels of train are {count} different numbers: they are read as {decision}"
    remedy = "set target.options.problem_type to what they are, regression or single_label_classification"
    return [Problem(what, recipe.origin.where("target.options.problem_type"), remedy, fatal=False)]


def check_label_kind(problem_type: ProblemType, examples: Examples) -> list[Problem]:
    """Lists of labels where one is needed for each text, or the other way round."""
    values = examples.table["label"]
    wants_lists = problem_type == "multi_label_classification"
    if pa.types.is_list(values.type) == wants_lists or values.null_count == len(values):
        return []
    what = f"label holds {describe_type(values.type)}, but {problem_type} needs "
    what += "a list of labels for each text" if wants_lists else "one label for each text"
    remedy = "write the labels so, map `label` to another column, or remove target.options.problem_type"
    return [Problem(what, examples.where(0), remedy)]


def multi_label_metrics(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Exact matches, F1 and Hamming loss; both arrays are [num_examples, num_labels]."""
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
    """Errors and correlations; a constant prediction correlates with nothing and scores 0."""
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
