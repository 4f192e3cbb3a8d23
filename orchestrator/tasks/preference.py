"""Preference tuning: of two answers to a prompt, the chosen one is to become likelier (Rafailov et al. 2023, DPO)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from orchestrator.data import overlap
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.preferences import SIDES, check_pairs, read_pairs
from orchestrator.data.fields.turns import TurnsField
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Arrays, Batch, Encoded, MainMetric, Predictions, Totals
from orchestrator.tasks.bases.language import IGNORED, EncodedTokens, LanguageOptions, LanguageTask
from orchestrator.tasks.bases.loss_mask import TOKENS, encode_in_batches, longest_tokens

PAIRS = pa.schema({f"{side}_{field.name}": field.type for side in SIDES for field in TOKENS})


class PreferenceOptions(LanguageOptions):
    """Options of `preference`."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to its source: the temperature of the preference."""


@dataclass
class EncodedPairs(Encoded):
    """Two answers to each prompt, as texts of their own."""

    sides: tuple[EncodedTokens, EncodedTokens]
    """Chosen, rejected."""
    reference: npt.NDArray[np.float64] | None = None

    rows_per_example = 2

    def __post_init__(self) -> None:
        self.lengths = np.maximum(*(side.lengths for side in self.sides))
        self.counts = {"targets": np.ones(len(self.lengths), np.int64)}

    @property
    def is_labelled(self) -> bool:
        return self.reference is not None

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        """Return all chosen answers, then all rejected ones; `reference` are the source's log-probabilities of them."""
        batches = [side.batch(rows).inputs for side in self.sides]
        width = max(batch["input_ids"].shape[1] for batch in batches)
        fill = {"input_ids": self.sides[0].pad_token_id, "attention_mask": 0, "target_ids": IGNORED}
        joined: Arrays = {
            name: np.concatenate([pad_to(batch[name], width, value) for batch in batches])
            for name, value in fill.items()
        }
        return Batch(joined, {} if self.reference is None else {"reference": self.reference[rows]})

    def targets(self) -> Arrays:
        nothing = np.full((len(self), 2), np.nan)
        return {"reference": nothing if self.reference is None else self.reference}


class PreferenceTuning(LanguageTask):
    """The better of two answers, through `AutoModelForCausalLM`."""

    name = "preference"
    Options = PreferenceOptions
    metrics_shown: Sequence[str] = ("accuracy", "margin")
    main_metric = MainMetric("accuracy", higher_is_better=True)
    needs_reference = True
    forms = ("prompt-completion",)

    def __init__(self, options: PreferenceOptions) -> None:
        self.options = options

    @classmethod
    def columns(cls, options: PreferenceOptions) -> tuple[Column, ...]:
        return (
            Column("prompt", TurnsField(), required=False, aliases=("question", "instruction")),
            Column("chosen", TurnsField()),
            Column("rejected", TurnsField()),
        )

    @classmethod
    def check(cls, options: PreferenceOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        problems = [problem for split in splits.values() for problem in check_pairs(split)]
        held = splits["train"].table.column_names
        columns = [column for column in cls.columns(options) if column.name in held]
        return problems or overlap.check_overlap(splits, columns)

    @classmethod
    def prepare(cls, options: PreferenceOptions, splits: Mapping[str, Examples]) -> PreferenceTuning:
        return cls(options)

    @classmethod
    def restore(cls, options: PreferenceOptions, config: Any) -> PreferenceTuning:
        return cls(cls.without_template(options))

    def metric_directions(self) -> dict[str, bool]:
        return {"accuracy": True, "margin": True, "loss": False}

    def describe(self) -> str:
        return "the better of two answers"

    def check_inputs(self, examples: Examples) -> list[Problem]:
        return check_pairs(examples)

    def encode(self, examples: Examples, processor: Any) -> pa.RecordBatchReader:
        def encode(some: Examples) -> pa.RecordBatch:
            return _beside(self.encode_texts(samples, some, processor, "completions") for samples in read_pairs(some))

        return encode_in_batches(examples, PAIRS, encode)

    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        return pa.Table.from_batches([_beside(longest_tokens(number, self.options.max_length) for _ in SIDES)])

    def wrap(self, table: pa.Table, processor: Any) -> EncodedPairs:
        def side(name: str) -> EncodedTokens:
            names = {f"{name}_{part}": part for part in ("input_ids", "learned")}
            return self.wrap_texts(table.select(list(names)).rename_columns(list(names.values())), processor, False)

        return EncodedPairs((side("chosen"), side("rejected")))

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        assert isinstance(encoded, EncodedPairs)
        found = [super(PreferenceTuning, self).check_encoded(split, side, recipe) for side in encoded.sides]
        return [
            replace(problem, what=f"{side} answers: {problem.what}")
            for side, problems in zip(SIDES, found, strict=True)
            for problem in problems
        ]

    def segments(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        assert isinstance(encoded, EncodedPairs)
        shown: list[tuple[str, bool]] = []
        for side, each in zip(SIDES, encoded.sides, strict=True):
            shown += [(f"\n{side}: ", False), *super().segments(each, row, processor)]
        return shown

    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        from torch.nn import functional

        gained = log_probabilities(outputs) - batch.targets["reference"]
        losses = -functional.logsigmoid(self.options.beta * (gained[:, 0] - gained[:, 1]))
        return losses.sum() / totals["targets"]

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        return {"log_probabilities": log_probabilities(outputs)}

    def metrics(self, predictions: Predictions, targets: Arrays) -> dict[str, float]:
        """Return accuracy and `margin`: the mean of beta times the chosen answer's gain over the other's, in nats."""
        gained = predictions["log_probabilities"] - np.nan_to_num(targets["reference"], nan=0.0)
        margins = self.options.beta * (gained[:, 0] - gained[:, 1])
        return {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}

    def details(self, predictions: Predictions, targets: Arrays) -> dict[str, Any]:
        return {}

    def prediction_rows(self, predictions: Predictions, examples: Examples) -> dict[str, list[Any]]:
        found = predictions["log_probabilities"]
        return {side: [float(value) for value in found[:, number]] for number, side in enumerate(SIDES)}


TASK = PreferenceTuning


def log_probabilities(outputs: Any) -> Any:
    """Return the log-probabilities of the answers; shape [num_examples, 2]. In fp64: their differences are small."""
    return -outputs.token_losses[..., 0].double().sum(1).view(2, -1).T


def _beside(sides: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.record_batch([column for side in sides for column in side.columns], schema=PAIRS)


def pad_to(values: npt.NDArray[Any], width: int, fill: int) -> npt.NDArray[Any]:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)
