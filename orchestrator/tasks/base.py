"""The interface of tasks: columns, checks, preprocessing, head, loss, predictions, metrics. It knows no Ray.

The object that turns examples into the model's inputs is called the *processor*: a tokenizer, an image processor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.data.cache import Built
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section

if TYPE_CHECKING:
    from orchestrator.models import SourceModel  # It imports torch, which names of options do not need.

Arrays = dict[str, npt.NDArray[Any]]
Predictions = dict[str, Any]
"""One value an example, in the order of the split: an array's rows, or a list of arrays of any length."""
Totals = Mapping[str, float]
"""Sums of the counts that examples declare, over the global batch or over a split."""


@dataclass
class Batch:
    """Some examples of a split: arrays, or tensors on the model's device."""

    inputs: dict[str, Any]
    """Arguments of the model's forward."""
    targets: dict[str, Any]
    """Values that the loss and the predictions read besides the outputs: labels, positions of words."""


@dataclass(frozen=True)
class MainMetric:
    """The metric that picks the best checkpoint."""

    name: str
    higher_is_better: bool

    def improves(self, new: float, best: float | None) -> bool:
        """Whether `new` beats `best`; NaN never does."""
        if math.isnan(new):
            return False
        return best is None or (new > best if self.higher_is_better else new < best)


@dataclass(frozen=True)
class Rates:
    """Lowest and highest learning rates worth a trial of a search."""

    full: tuple[float, float]
    """For tuning the blocks themselves."""
    adapter: tuple[float, float]
    probe: tuple[float, float] = (3e-3, 1.0)
    """For training the head alone."""


class Encoded(ABC):
    """A preprocessed split: the model's inputs, without the raw data. Cheap to index, cheap to send to workers."""

    lengths: npt.NDArray[np.int64]
    """The cost of each example in a padded batch (tokens); shape [num_examples]."""

    counts: Arrays
    """Numbers that terms of the loss are normalised by, such as `targets`; each of shape [num_examples]."""

    augments: bool = False
    """Whether training batches are changed at random."""

    rows_per_example: int = 1
    """Rows of a batch that each example takes."""

    reference: npt.NDArray[np.float64] | None = None
    """The source's predictions for the examples, for tasks that need them; targets of batches hold them."""

    packs: bool = False
    """Whether `packed_batch` may take the place of `batch` in training, where the model keeps packed examples apart."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_labelled(self) -> bool:
        """Whether the examples have what the loss needs; all tasks predict without it."""
        return True

    def totals(self, rows: npt.NDArray[np.int64] | None = None) -> Totals:
        """Return the sum of each count over these rows, or over the split; at least 1.

        Texts that were cut may have nothing left to learn, and the loss is divided by this.
        """
        some = self.counts if rows is None else {name: each[rows] for name, each in self.counts.items()}
        return {name: max(1, int(each.sum())) for name, each in some.items()}

    @abstractmethod
    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        """Return these rows, padded.

        Args:
            stream: seed and epoch, where examples may be changed at random. The draws for an example depend on these
                and its row alone, however batches are cut. None changes nothing.
        """

    def packed_batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the same examples one after the other in one row; the model computes the same for each."""
        raise NotImplementedError

    def extra_inputs(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return a batch without the inputs that only the stem reads, to go with stored features of the stem."""
        return self.batch(rows)

    @abstractmethod
    def targets(self) -> Predictions:
        """Return the values that predictions are scored against, one an example."""


class Task(ABC):
    """One kind of target. A file of this package defines one subclass and names it TASK."""

    name: ClassVar[str]
    Options: ClassVar[type[Section]]
    """The section `target.options`."""
    pipeline_tag: ClassVar[str | None] = None
    """The name of the task on model hubs; None for the same name."""
    auto_class: ClassVar[str]
    """The class of `transformers` that builds the model with the task's head."""
    processor_class: ClassVar[str]
    """The class of `transformers` that loads the processor."""
    head: ClassVar[Literal["new", "kept", "kept unless the labels differ"]] = "kept unless the labels differ"
    """What becomes of the source's head. One that is `kept` is the source's own, takes no further layers, and is frozen
    beside an adapter. A `new` output layer is drawn even where the source has one for the same labels. Which
    parameters are new is found when the model is loaded."""
    is_language_model: ClassVar[bool] = False
    """Whether the model writes text, so that it can chat and run the benchmarks of language models."""
    tunes_adapters: ClassVar[bool] = False
    """Whether the source may be an adapter on another model."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss needs the source's predictions (`predict`, with one entry) for every example."""
    shallowest_freeze: ClassVar[int | str] = 0
    """The least freeze depth of a search that names none."""
    options: Any
    """The recipe's `target.options`, an instance of `Options`."""
    label_names: tuple[str, ...]
    """Names of the model's outputs, in their order."""
    metrics_shown: Sequence[str]
    """Metrics of the tables that people see, the main one first."""
    main_metric: MainMetric
    decision: str = ""
    """How labels are read where the data's values decided it, and how a recipe says otherwise."""

    @classmethod
    def rates(cls, num_parameters: int | None = None) -> Rates:
        """Return the learning rates of a search that names none: those of tuning a text model of this size.

        Encoders as Devlin et al. 2019 (smaller ones want higher rates); LoRA's best rate is about ten times that of
        full tuning (Schulman et al. 2025); a head on frozen blocks takes rates a hundred times as high.

        Args:
            num_parameters: of the source model; None for the size of BERT.
        """
        small, large = 50_000_000, 1_000_000_000
        if num_parameters is None or small <= num_parameters < large:
            return Rates((1e-5, 5e-5), (1e-4, 1e-3))
        return Rates((5e-5, 5e-4), (3e-4, 3e-3)) if num_parameters < small else Rates((3e-6, 3e-5), (5e-5, 5e-4))

    @classmethod
    def packages(cls, options: Any) -> Mapping[str, str]:
        """Return the packages (import names) that the options need, each with the extra that installs it."""
        return {}

    @classmethod
    def locate(cls, options: Any, folder: Path) -> Any:
        """Return the options with files that they name relative to the recipe's folder."""
        return options

    @classmethod
    @abstractmethod
    def columns(cls, options: Any) -> tuple[Column, ...]:
        """Return the columns that the task reads."""

    @classmethod
    @abstractmethod
    def check(cls, options: Any, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        """Return everything that is wrong with the data."""

    @classmethod
    @abstractmethod
    def stratify_by(cls, options: Any, train: Examples) -> str | None:
        """Return the column whose shares missing splits and limits keep; None for none."""

    @classmethod
    @abstractmethod
    def prepare(cls, options: Any, splits: Mapping[str, Examples]) -> Task:
        """Return the task as these data define it (its labels); raises DataError."""

    @classmethod
    @abstractmethod
    def restore(cls, options: Any, config: Any) -> Task:
        """Return the task as a saved model's config defines it."""

    @abstractmethod
    def metric_directions(self) -> dict[str, bool]:
        """Return every metric that may pick the best checkpoint, and whether higher is better."""

    @abstractmethod
    def describe(self) -> str:
        """Return in a few words what is predicted: `10 labels`."""

    @abstractmethod
    def check_inputs(self, examples: Examples) -> list[Problem]:
        """Return what is wrong with examples to score, or to predict for; they need no labels."""

    @classmethod
    def prompt_columns(cls, options: Any) -> tuple[Column, ...]:
        """Return the columns that predictions are made from."""
        return tuple(column for column in cls.columns(options) if not column.field.is_target)

    def check_prompts(self, examples: Examples) -> list[Problem]:
        """Return what is wrong with examples that hold nothing but `prompt_columns`."""
        return self.check_inputs(examples)

    @abstractmethod
    def config_changes(self) -> dict[str, Any]:
        """Return what the model's config must say: label names, problem type."""

    @abstractmethod
    def load_processor(self, source: SourceModel) -> tuple[Any, list[Problem]]:
        """Return the source's processor, set as the options say, and warnings about it; raises ModelError."""

    def configure_model(self, model: Any, processor: Any, source: SourceModel) -> None:  # noqa: B027
        """Set what the model must know of the processor; raises ModelError where the two do not fit."""
        # Most models need to know nothing.

    def check_trained(self, model: Any, recipe: Recipe) -> list[Problem]:
        """Return what is wrong with a model whose trained parameters are chosen."""
        return []

    @abstractmethod
    def check_model(self, processor: Any, config: Any, recipe: Recipe) -> list[Problem]:
        """Return what in the recipe does not fit this source model."""

    @abstractmethod
    def encode(self, examples: Examples, processor: Any) -> Built:
        """Return the split in numbers, as a table; a pure function, so that it can be cached by content."""

    @abstractmethod
    def cache_parts(self, processor: Any) -> list[Any]:
        """Return whatever `encode` depends on besides the examples, as JSON-able values."""

    @abstractmethod
    def wrap(self, table: pa.Table, processor: Any) -> Encoded:
        """Return an encoded table, ready to be batched."""

    @abstractmethod
    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        """Return this number of made-up encoded examples, as large as the options allow: for plans without data."""

    @abstractmethod
    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        """Return what only shows after preprocessing, such as texts that were cut."""

    @abstractmethod
    def example_inputs(self, processor: Any) -> dict[str, Any]:
        """Return inputs (tensors) of one example that pass through every block, to find the order of the blocks."""

    def segments(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        """Return an example as the model reads it, for people: parts of text, each with whether it is learned."""
        return []

    @property
    def num_written(self) -> int:
        """Return the number of examples of each reported split whose generated answers are scored; 0 for none."""
        return 0

    def generate(
        self, model: Any, processor: Any, examples: Examples, batch_size: int, in_step: bool = False
    ) -> dict[str, list[Any]] | None:
        """Return the text that the model generates for each example, as columns; None for tasks that do not generate.

        Args:
            in_step: whether several workers generate, each as often as the others, with a model that may be sharded.
        """
        return None

    def expected_answers(self, examples: Examples) -> list[str]:
        """Return the data's own text for each example that the model generates for."""
        raise NotImplementedError

    def score_answers(self, expected: Sequence[str], written: Sequence[str]) -> dict[str, float]:
        """Return metrics of generated texts."""
        raise NotImplementedError

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        """Return this batch's share of the global batch's loss (a scalar tensor, in fp32).

        The shares of all batches that a global batch is cut into add up to its loss: each term is a sum over the
        batch, divided by the total of what it counts.

        Args:
            totals: sums of `Encoded.counts` over the global batch.
        """

    @abstractmethod
    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        """Return what is kept of the outputs, one row an example: tensors, or `Padded` for values of any length."""

    @abstractmethod
    def metrics(self, predictions: Predictions, targets: Predictions) -> dict[str, float]:
        """Return the numbers for metrics.jsonl and result.json."""

    def score(self, metric: str, predictions: Predictions, targets: Predictions) -> float:
        """Return one of the metrics, where it can be computed faster than all of them."""
        return self.metrics(predictions, targets)[metric]

    @abstractmethod
    def details(self, predictions: Predictions, targets: Predictions) -> dict[str, Any]:
        """Return what is too long for a table: the report of each class, the confusion matrix."""

    @abstractmethod
    def prediction_rows(self, predictions: Predictions, examples: Examples) -> dict[str, list[Any]]:
        """Return predictions for these examples in the user's words, as columns."""
