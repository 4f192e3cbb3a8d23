"""What a model will be fed, before anything is trained: examples with their learned tokens marked, lengths, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.batches import BatchOrder, assign
from orchestrator.data.examples import Indices
from orchestrator.recipe import Recipe
from orchestrator.tasks import Encoded
from orchestrator.training.engine.base import TOKENS_PER_PASS_ON_CPU
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.prepare import Prepared, prepare

Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Shown:
    """An example."""

    where: str
    """Its place in the data."""
    length: int
    num_targets: int
    pieces: Pieces
    """Stretches of its text, each with whether it is learned."""


@dataclass(frozen=True)
class Lengths:
    """A split in numbers; lengths are in tokens, or in whatever unit padding costs."""

    examples: int
    shortest: int
    median: int
    longest: int
    tokens: int
    targets: int
    num_longest: int
    """Examples of the longest length: where many have it, they were cut."""


@dataclass(frozen=True)
class Preview:
    prepared: Prepared
    examples: list[Shown]
    splits: dict[str, Lengths]
    padding: float
    """The share of an epoch's positions that hold nothing but padding."""


def preview(recipe: Recipe, count: int = 3, strict: bool = False) -> Preview:
    """The first examples of each file of *train* as the model reads them, `count` in all, and all lengths.

    Raises:
        InputError: recipe, data or source are wrong.
    """
    prepared = prepare(recipe, strict)
    encoded = {name: prepared.encoded(name) for name in prepared.tables}
    train = encoded["train"]
    examples = [
        Shown(
            prepared.examples["train"].where(row),
            int(train.lengths[row]),
            int(train.counts["targets"][row]),
            prepared.task.pieces(train, row, prepared.processor),
        )
        for row in first_of_each_file(prepared.examples["train"].file_numbers(), count)
    ]
    lengths = {name: measure(split) for name, split in encoded.items()}
    return Preview(prepared, examples, lengths, padding_share(recipe, train))


def first_of_each_file(numbers: Indices, count: int) -> list[int]:
    """Positions of the first examples, from each file in its turn.

    Args:
        numbers: the file of each example; shape [len].
    """
    turns = np.zeros(len(numbers), np.int64)
    for number in np.unique(numbers):
        own = numbers == number
        turns[own] = np.arange(own.sum())
    chosen: list[int] = np.argsort(turns, kind="stable")[:count].tolist()
    return sorted(chosen)


def measure(encoded: Encoded) -> Lengths:
    lengths = encoded.lengths
    longest = int(lengths.max())
    return Lengths(
        examples=len(encoded),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=longest,
        tokens=int(lengths.sum()),
        targets=int(encoded.counts["targets"].sum()),
        num_longest=int((lengths == longest).sum()),
    )


def padding_share(recipe: Recipe, encoded: Encoded) -> float:
    """As an epoch is dealt to the recipe's workers on processors; none where examples are packed."""
    if encoded.packs:
        return 0.0
    train, workers = recipe.train, recipe.scale.workers
    order = BatchOrder(encoded.lengths, train.global_batch_size, train.group_by_length, train.seed)
    positions = 0
    for rows in order.epoch(0):
        for hands in assign(rows, encoded.lengths, workers, micro_batch_size(recipe), TOKENS_PER_PASS_ON_CPU):
            positions += sum(int(encoded.lengths[mine].max()) * len(mine) for mine in hands if len(mine))
    return 1.0 - float(encoded.lengths.sum()) / positions


def as_record(found: Preview) -> dict[str, Any]:
    """For `--json`."""
    return {
        "examples": [vars(example) for example in found.examples],
        "splits": {name: vars(lengths) for name, lengths in found.splits.items()},
        "padding": found.padding,
        "warnings": [str(warning) for warning in found.prepared.warnings],
    }
