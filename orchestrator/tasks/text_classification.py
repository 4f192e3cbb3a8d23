"""Text classification: one label, several labels, or a number for each text (or pair of texts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from orchestrator.data import checks, labels, overlap
from orchestrator.data.columns import Column, describe_type
from orchestrator.data.examples import Examples
from orchestrator.data.ragged import Ragged
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section
from orchestrator.tasks.base import Arrays, Encoded, MainMetric, Task

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
CALIBRATION_BINS = 15
LONGEST_LENGTH_TOLD = 1_000_000  # transformers writes 1e30 where a tokenizer has no limit


class TextOptions(Section):
    """Options of `text-classification`."""

    max_length: Annotated[int, Field(gt=0)] = 128
    """Texts are cut at this many tokens."""
    problem_type: Literal["auto"] | ProblemType = "auto"
    """`auto`: lists of labels are multi-label, fractional numbers are regression, everything else is single-label."""
    label_names: list[str] | None = None
    """Names of labels 0, 1, ... where the data hold numbers; or the order of the labels where they hold names."""


@dataclass
class EncodedTexts(Encoded):
    """Token ids of each text, and its label."""

    inputs: dict[str, Ragged]
    fill: dict[str, int]
    labels: npt.NDArray[Any] | None

    def __post_init__(self) -> None:
        self.lengths = self.inputs["input_ids"].lengths
        self.num_targets = np.ones(len(self.lengths), dtype=np.int64)

    def batch(self, rows: npt.NDArray[np.int64]) -> Arrays:
        arrays: Arrays = {name: column.pad(rows, self.fill[name]) for name, column in self.inputs.items()}
        lengths = self.lengths[rows]
        arrays["attention_mask"] = (np.arange(max(1, lengths.max(initial=1))) < lengths[:, None]).astype(np.int64)
        if self.labels is not None:
            arrays["labels"] = self.labels[rows]
        return arrays

    def targets(self) -> Arrays:
        assert self.labels is not None, "a split without labels cannot be scored"
        return {"label": self.labels}


class TextClassification(Task):
    """A label (or labels, or a number) for each text, through `AutoModelForSequenceClassification`."""

    name = "text-classification"
    Options = TextOptions
    auto_class = "AutoModelForSequenceClassification"
    shown_by_type: ClassVar[dict[str, tuple[str, ...]]] = {
        "single_label_classification": ("accuracy", "f1_macro"),
        "multi_label_classification": ("f1_micro", "f1_macro"),
        "regression": ("pearson", "spearman"),
    }

    def __init__(self, options: TextOptions, problem_type: ProblemType, label_names: tuple[str, ...]) -> None:
        self.options = options
        self.problem_type = problem_type
        self.label_names = label_names
        self.metrics_shown = self.shown_by_type[problem_type]
        self.main_metric = MainMetric(self.metrics_shown[0], higher_is_better=True)

    @classmethod
    def columns(cls, options: TextOptions) -> tuple[Column, ...]:
        return (
            Column("text", "text", aliases=("sentence", "sentence1", "content", "premise", "question1")),
            Column("text_pair", "text", required=False, aliases=("sentence2", "hypothesis", "question2")),
            Column("label", "label", aliases=("labels", "target", "intent", "category", "class", "score")),
        )

    @classmethod
    def check(cls, options: TextOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        texts = [name for name in ("text", "text_pair") if name in splits["train"].table.column_names]
        found = [problem for split in splits.values() for name in texts for problem in checks.check_text(split, name)]
        problem_type = find_problem_type(options, splits["train"])
        wrong = [problem for split in splits.values() for problem in check_label_kind(problem_type, split)]
        if wrong:
            return found + wrong
        if problem_type == "regression":
            found += [item for split in splits.values() for item in checks.check_regression_targets(split, "label")]
        else:
            found += checks.check_class_labels(splits, "label", options.label_names)
        return found + overlap.check_overlap(splits, texts, "label")

    @classmethod
    def stratify_by(cls, options: TextOptions, train: Examples) -> str | None:
        return "label" if find_problem_type(options, train) == "single_label_classification" else None

    @classmethod
    def prepare(cls, options: TextOptions, splits: Mapping[str, Examples]) -> TextClassification:
        problem_type = find_problem_type(options, splits["train"])
        if problem_type == "regression":
            return cls(options, problem_type, ("score",))
        names = labels.find_label_names(splits, "label", options.label_names)
        return cls(options, problem_type, names)

    @classmethod
    def restore(cls, options: TextOptions, config: Any) -> TextClassification:
        names = tuple(config.id2label[index] for index in range(config.num_labels))
        return cls(options, config.problem_type or "single_label_classification", names)

    def metric_directions(self) -> dict[str, bool]:
        names = {
            "single_label_classification": ("accuracy", "f1_macro", "f1_weighted", "matthews_correlation"),
            "multi_label_classification": ("accuracy", "f1_micro", "f1_macro", "f1_weighted", "f1_samples"),
            "regression": ("pearson", "spearman", "r2"),
        }[self.problem_type]
        errors = {
            "single_label_classification": ("ece",),
            "multi_label_classification": ("hamming_loss",),
            "regression": ("mse", "mae"),
        }
        return {**dict.fromkeys(names, True), **dict.fromkeys(("loss", *errors[self.problem_type]), False)}

    def describe(self) -> str:
        if self.problem_type == "regression":
            return "a number for each text"
        some = "any of " if self.problem_type == "multi_label_classification" else ""
        shown = ", ".join(self.label_names[:12]) + (", ..." if len(self.label_names) > 12 else "")
        return f"{some}{len(self.label_names)} labels: {shown}"

    def check_inputs(self, examples: Examples) -> list[Problem]:
        texts = [name for name in ("text", "text_pair") if name in examples.table.column_names]
        found = [problem for name in texts for problem in checks.check_text(examples, name)]
        if "label" in examples.table.column_names:
            found += check_label_kind(self.problem_type, examples)
            if self.problem_type == "regression":
                found += checks.check_regression_targets(examples, "label")
        return found

    def config_changes(self) -> dict[str, Any]:
        return {
            "problem_type": self.problem_type,
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
        }

    def check_model(self, tokenizer: Any, config: Any, recipe: Recipe) -> list[Problem]:
        limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        longest = min((limit for limit in limits if limit and 0 < limit < LONGEST_LENGTH_TOLD), default=None)
        if longest is None or self.options.max_length <= longest:
            return []
        return [
            Problem(
                f"max_length is {self.options.max_length}, but {recipe.source.model} reads at most {longest} tokens",
                recipe.origin.where("target.options.max_length"),
                f"set target.options.max_length to {longest} or less",
            )
        ]

    def cache_parts(self, tokenizer: Any) -> list[Any]:
        return [self.name, self.options.max_length, self.problem_type, self.label_names, tokenizer_state(tokenizer)]

    def encode(self, examples: Examples, tokenizer: Any) -> pa.Table:
        texts = examples.table["text"].to_pylist()
        pairs = examples.table["text_pair"].to_pylist() if "text_pair" in examples.table.column_names else None
        encoded = tokenizer(
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

    def _encode_labels(self, examples: Examples) -> pa.Array:
        if self.problem_type == "regression":
            return pa.array(labels.encode_targets(examples, "label"))
        encoded = labels.encode_labels(examples, "label", self.label_names)
        if self.problem_type == "single_label_classification":
            return pa.array(encoded)
        return pa.FixedSizeListArray.from_arrays(pa.array(encoded.reshape(-1)), len(self.label_names))

    def wrap(self, table: pa.Table, tokenizer: Any) -> EncodedTexts:
        names = [name for name in table.column_names if name != "label"]
        fill = {name: tokenizer.pad_token_id if name == "input_ids" else 0 for name in names}
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

    def example_inputs(self) -> dict[str, Any]:
        import torch

        # No attention mask: models look into it, which they cannot where there are only shapes (the meta device).
        return {"input_ids": torch.tensor([[1, 2, 3, 1]])}

    def loss(self, outputs: Any, labels: Any) -> Any:
        from torch.nn import functional

        logits = outputs.logits.float()
        if self.problem_type == "single_label_classification":
            return functional.cross_entropy(logits, labels, reduction="sum")
        if self.problem_type == "regression":
            return functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        # One target an example: the mean over its labels, as in transformers.
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(self.label_names)

    def predict(self, outputs: Any) -> dict[str, Any]:
        return {"logits": outputs.logits.float()}

    def metrics(self, predictions: Arrays, targets: Arrays) -> dict[str, float]:
        logits, truth = predictions["logits"], targets["label"]
        if self.problem_type == "regression":
            return regression_metrics(logits[:, 0], truth)
        if self.problem_type == "multi_label_classification":
            return multi_label_metrics(logits > 0, truth > 0)
        return single_label_metrics(softmax(logits), truth)

    def details(self, predictions: Arrays, targets: Arrays) -> dict[str, Any]:
        if self.problem_type == "regression":
            return {}
        from sklearn.metrics import classification_report, confusion_matrix

        logits, truth = predictions["logits"], targets["label"]
        single = self.problem_type == "single_label_classification"
        predicted = logits.argmax(-1) if single else logits > 0
        indices = list(range(len(self.label_names)))
        report = classification_report(
            truth, predicted, labels=indices, target_names=list(self.label_names), output_dict=True, zero_division=0
        )
        found: dict[str, Any] = {"per_class": report, "labels": list(self.label_names)}
        if single:
            found["confusion_matrix"] = confusion_matrix(truth, predicted, labels=indices).tolist()
        return found

    def prediction_rows(self, predictions: Arrays) -> dict[str, list[Any]]:
        logits = predictions["logits"]
        if self.problem_type == "regression":
            return {"prediction": [float(value) for value in logits[:, 0]]}
        if self.problem_type == "multi_label_classification":
            scores = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
            names = [[name for name, on in zip(self.label_names, row, strict=True) if on > 0.5] for row in scores]
        else:
            scores = softmax(logits)
            names = [self.label_names[index] for index in logits.argmax(-1)]
        return {
            "prediction": names,
            "scores": [dict(zip(self.label_names, map(float, row), strict=True)) for row in scores],
        }


TASK = TextClassification


def find_problem_type(options: TextOptions, train: Examples) -> ProblemType:
    """What kind of labels these are: lists of labels, numbers with fractions, or one label."""
    if options.problem_type != "auto":
        return options.problem_type
    kind = train.table["label"].type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "multi_label_classification"
    return "regression" if pa.types.is_floating(kind) else "single_label_classification"


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


def tokenizer_state(tokenizer: Any) -> str:
    """Everything that decides what a tokenizer makes of a text, for the cache's key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__} {words} {tokenizer.special_tokens_map} {tokenizer.model_input_names}"


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


def expected_calibration_error(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins, weighted by their examples (Guo et al. 2017)."""
    if not np.isfinite(confidence).all():
        return float("nan")
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    gaps = np.bincount(bins, confidence, CALIBRATION_BINS) - np.bincount(bins, correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / max(1, counts.sum()))
