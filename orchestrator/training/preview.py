"""Show what a model will read, before it is trained: examples with their learned tokens marked, lengths, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.examples import Indices
from orchestrator.recipe import Recipe
from orchestrator.tasks import Encoded
from orchestrator.training.engine.base import cost_of_pass
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.loop import make_schedule
from orchestrator.training.micro_batches import cut_into_passes
from orchestrator.training.prepare import Prepared, prepare

Segments = list[tuple[str, bool]]


@dataclass(frozen=True)
class ShownExample:
    """An example as the model reads it."""

    where: str
    """Its place in the data."""
    length: int
    num_targets: int
    segments: Segments
    """Parts of its text, each with whether it is learned."""


@dataclass(frozen=True)
class SplitLengths:
    """Lengths of a split, in tokens or whatever else padding costs."""

    examples: int
    shortest: int
    median: int
    longest: int
    tokens: int
    targets: int
    num_longest: int
    """Examples of the longest length; where they are many, they were cut."""


@dataclass(frozen=True)
class Preview:
    """Examples of *train*, and the lengths of all splits."""

    prepared: Prepared
    examples: list[ShownExample]
    splits: dict[str, SplitLengths]
    padding: float
    """The share of an epoch's positions that are padding."""


def preview(recipe: Recipe, count: int = 3, strict: bool = False) -> Preview:
    """Return the first examples of each file of *train*, `count` in all, and the lengths of all splits.

    Raises:
        InputError: recipe, data or source are wrong.
    """
    prepared = prepare(recipe, strict)
    encoded = {name: prepared.encoded(name) for name in prepared.tables}
    train = encoded["train"]
    examples = [
        ShownExample(
            prepared.examples["train"].where(row),
            int(train.lengths[row]),
            int(train.counts["targets"][row]),
            prepared.task.segments(train, row, prepared.processor),
        )
        for row in first_of_each_file(prepared.examples["train"].file_numbers(), count)
    ]
    lengths = {name: measure_lengths(split) for name, split in encoded.items()}
    return Preview(prepared, examples, lengths, padding_share(recipe, train))


def first_of_each_file(numbers: Indices, count: int) -> list[int]:
    """Return the positions of `count` examples, the first ones of each file, sorted.

    Args:
        numbers: the file of each example; shape [len].
    """
    turns = np.zeros(len(numbers), np.int64)
    for number in np.unique(numbers):
        own = numbers == number
        turns[own] = np.arange(own.sum())
    chosen: list[int] = np.argsort(turns, kind="stable")[:count].tolist()
    return sorted(chosen)


def measure_lengths(encoded: Encoded) -> SplitLengths:
    lengths = encoded.lengths
    longest = int(lengths.max())
    return SplitLengths(
        examples=len(encoded),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=longest,
        tokens=int(lengths.sum()),
        targets=int(encoded.counts["targets"].sum()),
        num_longest=int((lengths == longest).sum()),
    )


def padding_share(recipe: Recipe, encoded: Encoded) -> float:
    """Return the share of padding in an epoch on the recipe's workers without GPUs; 0 where examples are packed."""
    if encoded.packs:
        return 0.0
    lengths, size = encoded.lengths, micro_batch_size(recipe)
    cost, positions = cost_of_pass("cpu", autocasts=False), 0
    for batch in make_schedule(recipe.train, lengths, size).order.epoch(0):
        for shares in cut_into_passes(batch, lengths, recipe.scale.workers, size, cost):
            positions += sum(int(lengths[rows].max()) * len(rows) for rows in shares if len(rows))
    return 1.0 - float(lengths.sum()) / positions


def as_record(found: Preview) -> dict[str, Any]:
    """Return the preview as JSON values."""
    return {
        "examples": [vars(example) for example in found.examples],
        "splits": {name: vars(lengths) for name, lengths in found.splits.items()},
        "padding": found.padding,
        "warnings": [str(warning) for warning in found.prepared.warnings],
    }
