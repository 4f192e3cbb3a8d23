"""Causal language modelling: texts, completions and conversations, the loss on the tokens that are to be learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data import overlap
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.conversations import check_samples, read_samples
from orchestrator.data.fields.forms import Form, columns_of, forms_of
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Arrays, Batch, Encoded, MainMetric, Predictions, Totals
from orchestrator.tasks.bases.answer_scores import (
    Generation,
    check_generation,
    expected_answers,
    packages,
    score_answers,
)
from orchestrator.tasks.bases.chat import TrainOn
from orchestrator.tasks.bases.language import LanguageOptions, LanguageTask
from orchestrator.tasks.bases.loss_mask import TOKENS, encode_in_batches, longest_tokens


class CausalOptions(LanguageOptions):
    """Options of `causal-lm`."""

    form: Form | None = None
    """What the data hold: `messages`, `sharegpt`, `prompt-completion`, `alpaca`, `text`; null: the columns of each file
    decide."""
    train_on: TrainOn = "completions"
    """What is learned: `completions` and the answers of assistants, the `last` answer alone, or `all`. Texts without a
    prompt are always learned whole."""
    pack: bool = True
    """Put several examples into one row in training, so that little is padding; the losses stay the same."""
    generate: Generation | None = None
    """Have the model write answers too, and score them; null for no."""


class CausalLanguageModelling(LanguageTask):
    """The next token, through `AutoModelForCausalLM`."""

    name = "causal-lm"
    Options = CausalOptions
    main_metric = MainMetric("nll", higher_is_better=False)

    def __init__(self, options: CausalOptions, forms: Iterable[Form]) -> None:
        self.options = options
        self.forms = tuple(dict.fromkeys(forms))
        written = options.generate.metrics if options.generate is not None else []
        self.metrics_shown = ("nll", "perplexity", "token_accuracy", *written)

    @classmethod
    def packages(cls, options: CausalOptions) -> Mapping[str, str]:
        return {} if options.generate is None else packages(options.generate)

    @classmethod
    def columns(cls, options: CausalOptions) -> tuple[Column, ...]:
        return columns_of(options.form)

    @classmethod
    def check(cls, options: CausalOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        problems = check_samples(splits, options.form)
        if options.generate is not None and not problems:
            problems = check_generation(options.generate, splits, options.form, recipe)
        held = {name for split in splits.values() for name in split.table.column_names}
        columns = [column for column in columns_of(options.form) if column.name in held]
        return problems or overlap.check_overlap(splits, columns)

    @classmethod
    def prepare(cls, options: CausalOptions, splits: Mapping[str, Examples]) -> CausalLanguageModelling:
        found = (form for split in splits.values() for form in forms_of(split, options.form))
        return cls(options, (form for form in found if form is not None))

    @classmethod
    def restore(cls, options: CausalOptions, config: Any) -> CausalLanguageModelling:
        return cls(cls.without_template(options), () if options.form is None else (options.form,))

    def metric_directions(self) -> dict[str, bool]:
        return {"nll": False, "perplexity": False, "loss": False, "token_accuracy": True}

    def describe(self) -> str:
        return "the next token"

    def check_inputs(self, examples: Examples) -> list[Problem]:
        return check_samples({"": examples}, self.options.form)

    @property
    def num_written(self) -> int:
        return 0 if self.options.generate is None else self.options.generate.examples

    def expected_answers(self, examples: Examples) -> list[str]:
        return expected_answers(examples, self.options.form)

    def score_answers(self, expected: Sequence[str], written: Sequence[str]) -> dict[str, float]:
        assert self.options.generate is not None
        return score_answers(self.options.generate, expected, written)

    def encode(self, examples: Examples, processor: Any) -> pa.RecordBatchReader:
        def encode(some: Examples) -> pa.RecordBatch:
            return self.encode_texts(read_samples(some, self.options.form), some, processor, self.options.train_on)

        return encode_in_batches(examples, TOKENS, encode)

    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        return pa.Table.from_batches([longest_tokens(number, self.options.max_length)])

    def wrap(self, table: pa.Table, processor: Any) -> Encoded:
        return self.wrap_texts(table, processor, self.options.pack)

    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        return outputs.token_losses[..., 0].sum() / totals["targets"]

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        sums = outputs.token_losses.double().sum(1)
        return {"nll": sums[:, 0], "hits": sums[:, 1]}

    def metrics(self, predictions: Predictions, targets: Arrays) -> dict[str, float]:
        num_targets = max(1, int(targets["num_targets"].sum()))
        nll = float(np.sum(predictions["nll"])) / num_targets
        hits = float(np.sum(predictions["hits"])) / num_targets
        return {"nll": nll, "perplexity": float(np.exp(min(nll, 700.0))), "token_accuracy": hits}

    def details(self, predictions: Predictions, targets: Arrays) -> dict[str, Any]:
        return {"num_targets": int(targets["num_targets"].sum())}

    def prediction_rows(self, predictions: Predictions, examples: Examples) -> dict[str, list[Any]]:
        return {"nll": [float(value) for value in predictions["nll"]]}


TASK = CausalLanguageModelling
