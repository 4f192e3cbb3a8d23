"""What a task is: columns, checks, preprocessing, head, loss, predictions, metrics. It knows no Ray and no loop.

What turns examples into the model's inputs is called the *processor*: a tokenizer, an image processor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
    from orchestrator.models import SourceModel  # It brings torch along, which the names of options can do without.

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
    """What the loss and the predictions read besides the outputs; empty where the examples are not labelled."""


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


class Encoded(ABC):
    """A preprocessed split: what the model is fed, without the words. Cheap to index, cheap to send to workers."""

    lengths: npt.NDArray[np.int64]
    """What padding costs for each example (tokens); shape [num_examples]."""

    counts: Arrays
    """Numbers that terms of the loss are normalised by, such as `targets`; each of shape [num_examples]."""

    augments: bool = False
    """Whether training batches are changed at random."""

    rows_per_example: int = 1
    """Rows of a batch that each example takes."""

    reference: npt.NDArray[np.float64] | None = None
    """What the source predicts for the examples, for tasks that need it; targets of batches hold it."""

    packs: bool = False
    """Whether `packed_batch` may take the place of `batch` in training, where the model keeps packed examples apart."""

    def __len__(self) -> int:
        return len(self.lengths)

    def totals(self, rows: npt.NDArray[np.int64] | None = None) -> Totals:
        """Return the sum of each count over these rows, or over the split; at least 1.

        Of texts that were cut there may be nothing left to learn, and the loss is divided by this.
        """
        some = self.counts if rows is None else {name: each[rows] for name, each in self.counts.items()}
        return {name: max(1, int(each.sum())) for name, each in some.items()}

    @abstractmethod
    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        """Return these rows, padded; with targets where the split has them.

        Args:
            stream: seed and epoch, where examples may be changed at random. What is drawn for an example depends on
                these and its row alone, however batches are cut. None changes nothing.
        """

    def packed_batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the same examples one after the other in one row; the model computes the same for each."""
        raise NotImplementedError

    def extra_inputs(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return a batch without what only the stem reads, for when stored features take the stem's place."""
        return self.batch(rows)

    @abstractmethod
    def targets(self) -> Arrays:
        """What predictions are scored against, one row an example."""


class Task(ABC):
    """One kind of target. A file of this package defines one subclass and names it TASK."""

    name: ClassVar[str]
    Options: ClassVar[type[Section]]
    """What `target.options` may hold."""
    hub_tag: ClassVar[str | None] = None
    """What model hubs call the task, where that is not its name."""
    auto_class: ClassVar[str]
    """The class of `transformers` that makes the model with the task's head."""
    processor_class: ClassVar[str]
    """The class of `transformers` that loads the processor."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss asks what the source made of an example: its `predict`, which has one entry."""
    has_new_head: ClassVar[bool] = True
    """Whether the head is the task's own; otherwise the source's is kept, and frozen beside an adapter."""
    options: Any
    """What `target.options` holds, as an instance of `Options`."""
    label_names: tuple[str, ...]
    """Names of what the model's outputs stand for, in their order."""
    metrics_shown: Sequence[str]
    """Metrics for the table that a person sees, the main one first."""
    main_metric: MainMetric
    decision: str = ""
    """What the values of the data decided about the labels, and how a recipe says otherwise."""

    @classmethod
    def locate(cls, options: Any, folder: Path) -> Any:
        """The options with files that they name as the recipe means them: relative to its folder."""
        return options

    @classmethod
    @abstractmethod
    def columns(cls, options: Any) -> tuple[Column, ...]:
        """The columns that the task reads."""

    @classmethod
    @abstractmethod
    def check(cls, options: Any, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        """Everything that is wrong with the data."""

    @classmethod
    @abstractmethod
    def stratify_by(cls, options: Any, train: Examples) -> str | None:
        """The column whose shares missing splits and limits keep; None for none."""

    @classmethod
    @abstractmethod
    def prepare(cls, options: Any, splits: Mapping[str, Examples]) -> Task:
        """The task as these data define it (its labels); raises DataError."""

    @classmethod
    @abstractmethod
    def restore(cls, options: Any, config: Any) -> Task:
        """The task as a saved model's config defines it."""

    @abstractmethod
    def metric_directions(self) -> dict[str, bool]:
        """Every metric that may pick the best checkpoint, and whether higher is better."""

    @abstractmethod
    def describe(self) -> str:
        """What is predicted, in a few words: `10 labels`."""

    @abstractmethod
    def check_inputs(self, examples: Examples) -> list[Problem]:
        """What is wrong with examples to score, or to predict for; they need no labels."""

    @classmethod
    def prompt_columns(cls, options: Any) -> tuple[Column, ...]:
        """The columns that predictions are made from."""
        return tuple(column for column in cls.columns(options) if not column.field.is_target)

    def check_prompts(self, examples: Examples) -> list[Problem]:
        """What is wrong with examples that hold nothing but `prompt_columns`."""
        return self.check_inputs(examples)

    @abstractmethod
    def config_changes(self) -> dict[str, Any]:
        """What the model's config must say: label names, problem type."""

    @abstractmethod
    def load_processor(self, source: SourceModel) -> tuple[Any, list[Problem]]:
        """The source's processor, set as the options say, and notes on it (not fatal); raises ModelError."""

    def configure_model(self, model: Any, processor: Any, source: SourceModel) -> None:  # noqa: B027
        """Tell the model what it must know of the processor; raises ModelError where the two do not fit."""
        # Most models need to know nothing.

    def check_trained(self, model: Any, recipe: Recipe) -> list[Problem]:
        """What is wrong with a model whose trained parameters are chosen."""
        return []

    @abstractmethod
    def check_model(self, processor: Any, config: Any, recipe: Recipe) -> list[Problem]:
        """What in the recipe does not fit this source model."""

    @abstractmethod
    def encode(self, examples: Examples, processor: Any) -> Built:
        """The split as the model reads it; a pure function, so that it can be cached by content."""

    @abstractmethod
    def cache_parts(self, processor: Any) -> list[Any]:
        """Whatever `encode` depends on besides the examples, as JSON-able values."""

    @abstractmethod
    def wrap(self, table: pa.Table, processor: Any) -> Encoded:
        """An encoded table, ready to be batched."""

    @abstractmethod
    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        """So many made-up examples, encoded, as large as the options allow: for plans without the data."""

    @abstractmethod
    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        """What only shows after preprocessing, such as texts that were cut."""

    @abstractmethod
    def example_inputs(self, processor: Any) -> dict[str, Any]:
        """Inputs (tensors) of one example that pass through every block, to find the order of the blocks."""

    def pieces(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        """An example as the model reads it: stretches of text, each with whether it is learned; for people to read."""
        return []

    @property
    def num_written(self) -> int:
        """Examples of each reported split that the model writes answers for, which are scored; 0 for none."""
        return 0

    def generate(
        self, model: Any, processor: Any, examples: Examples, batch_size: int, in_step: bool = False
    ) -> dict[str, list[Any]] | None:
        """What the model writes for each example, as columns; None where the task's predictions are computed.

        Args:
            in_step: several workers write, each as often as the others, with a model that may be spread over them.
        """
        return None

    def expected_answers(self, examples: Examples) -> list[str]:
        """What the data have where the model writes."""
        raise NotImplementedError

    def score_answers(self, expected: Sequence[str], written: Sequence[str]) -> dict[str, float]:
        """Metrics of what the model has written."""
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
    def metrics(self, predictions: Predictions, targets: Arrays) -> dict[str, float]:
        """The numbers for metrics.jsonl and result.json."""

    def score(self, metric: str, predictions: Predictions, targets: Arrays) -> float:
        """One of the metrics, where a quicker way to it than all of them may be known."""
        return self.metrics(predictions, targets)[metric]

    @abstractmethod
    def details(self, predictions: Predictions, targets: Arrays) -> dict[str, Any]:
        """What is too long for a table: the report of each class, the confusion matrix."""

    @abstractmethod
    def prediction_rows(self, predictions: Predictions) -> dict[str, list[Any]]:
        """Predictions in the user's words, as columns."""
