"""Reading a part of data that may be larger than memory: so many examples, from many places of the files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from orchestrator.data.examples import Rows
from orchestrator.data.fields.columns import Column
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.mixing import draw
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Data

T = TypeVar("T")
Chunk: TypeAlias = tuple[Rows, Any]
"""Rows that stand together in a file: the position of each, ascending, and the rows, in something that has slices."""

NUM_TOGETHER = 64
"""Pieces of files that are read at a time, a few rows from each in turn."""
MAX_TURN = 1024
"""Rows that are read from a piece at once."""


@dataclass(frozen=True)
class Draw:
    """What is read of a split that is streamed."""

    count: int
    """Examples, in all."""
    seed: int
    names: frozenset[str]
    """Columns that a task may ask for; no others are kept."""
    weights: Sequence[float] | None = None
    """The share of each entry of the recipe's list; None for a share by size."""


class Streamed(ABC):
    """A file that can be read in pieces, beginning with any of them."""

    place: str
    """As shown in messages."""
    sizes: Sequence[float]
    """Of each piece, in a unit that all files share."""

    @abstractmethod
    def read(self, piece: int, turn: int) -> Iterator[Chunk]:
        """Yield the rows of a piece, up to `turn` at a time. Raises DataError where the file is damaged."""

    @abstractmethod
    def raw(self, chunks: Sequence[Chunk]) -> RawFile:
        """Return a file of these rows alone. Raises DataError where some of them are faulty."""


def num_streamed(recipe: Recipe) -> int | None:
    """Training examples that the recipe asks for where its data are streamed; None where they are read whole."""
    data = recipe.target.data
    if isinstance(data, str) or not data.stream:
        return None
    return recipe.target.limit.train or (recipe.train.steps or 0) * recipe.train.global_batch_size


def plan_draw(recipe: Recipe, columns: Sequence[Column], present: Iterable[str]) -> Draw | None:
    """Return how much of *train* is read: enough for the recipe and for the splits cut from it; None for all.

    Args:
        columns: the task's.
        present: the splits that the data have.
    """
    wanted = num_streamed(recipe)
    if wanted is None:
        return None
    assert isinstance(recipe.target.data, Data)
    split, mapping = recipe.target.split, recipe.target.columns
    shares = [share for name, share in (("select", split.select), ("test", split.test)) if name not in present]
    # Each share is rounded to whole examples, perhaps upwards.
    count = math.ceil(wanted / (1.0 - sum(shares))) + len(shares)
    own = [name for column in columns if column.name not in mapping for name in (column.name, *column.aliases)]
    return Draw(count, split.seed, frozenset([*mapping.values(), *own]), recipe.target.data.weights)


def draw_files(
    files: Sequence[Streamed], parts: Sequence[int], plan: Draw, num_together: int = NUM_TOGETHER
) -> list[RawFile]:
    """Return `plan.count` rows of the files; of each entry of the recipe's list (`parts`), its share.

    Raises:
        DataError: what is wrong with the rows that were read, in all files.
    """
    kept: dict[Streamed, list[Chunk]] = {file: [] for file in files}
    shares = {0: 1.0} if plan.weights is None else dict(enumerate(plan.weights))
    for part, share in shares.items():
        members = [file for file, own in zip(files, parts, strict=True) if plan.weights is None or own == part]
        count = math.ceil(plan.count * share / sum(shares.values()))
        for file, chunk in draw_rows(members, count, plan.seed, num_together):
            kept[file].append(chunk)
    raws: list[RawFile] = []
    problems: list[Problem] = []
    for file in files:
        try:
            # In the order of the file: who reads on to its end has what is read without streaming.
            raws.append(file.raw(sorted(kept[file], key=lambda chunk: int(chunk[0][0]))))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return raws


def draw_rows(files: Sequence[Streamed], count: int, seed: int, num_together: int) -> Iterator[tuple[Streamed, Chunk]]:
    """Yield up to `count` rows of all files, from pieces in drawn order; more at once from larger pieces.

    A file that is sorted, or one of several, is thus read in many places, and no further than needed.
    """
    pieces = [(file, piece) for file in files for piece in range(len(file.sizes))]
    ranks = draw([(number, piece) for number, file in enumerate(files) for piece in range(len(file.sizes))], seed)
    turn = min(max(count // num_together, 1), MAX_TURN)
    mean = sum(file.sizes[piece] for file, piece in pieces) / max(1, len(pieces)) or 1.0
    order = [pieces[position] for position in sorted(range(len(pieces)), key=ranks.__getitem__)]
    readings = (_read(file, piece, max(1, round(turn * file.sizes[piece] / mean))) for file, piece in order)
    left = count
    for file, (positions, rows) in in_turns(readings, num_together):
        yield file, (positions[:left], rows[:left])
        left -= len(positions)
        if left <= 0:
            return


def in_turns(iterators: Iterator[Iterator[T]], num_together: int) -> Iterator[T]:
    """Yield one item of each of `num_together` iterators in turn; the next takes the place of one that ends."""
    active = deque(islice(iterators, num_together))
    while active:
        iterator = active.popleft()
        try:
            item = next(iterator)
        except StopIteration:
            active.extendleft(islice(iterators, 1))
            continue
        active.append(iterator)
        yield item


def _read(file: Streamed, piece: int, turn: int) -> Iterator[tuple[Streamed, Chunk]]:
    for chunk in file.read(piece, min(turn, MAX_TURN)):
        yield file, chunk
