"""Generate answers to some examples of a split, and score them; the workers share the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.data.examples import Examples
from orchestrator.data.mixing import shuffled
from orchestrator.models.shortcuts.token_pooling import eval_mode
from orchestrator.tasks import Task
from orchestrator.training.engine.base import Engine

SEED_OF_SAMPLE = 0  # One for all runs, so that they are scored on the same examples.


@dataclass(frozen=True)
class Answer:
    """The generated answer to one example."""

    source: str
    """Its place in the data."""
    expected: str
    written: str


@dataclass
class Written:
    """Answers and their scores; empty where the task generates nothing."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


def sample(task: Task, examples: Examples) -> Examples:
    """Return the examples that answers are generated for; the same ones each time."""
    return examples.take(np.sort(shuffled(np.arange(len(examples)), SEED_OF_SAMPLE)[: task.num_written]))


def write_answers(engine: Engine, task: Task, processor: Any, examples: Examples, batch_size: int) -> Written:
    """Generate answers to a sample of a split.

    All workers call this; each generates as many, for models that are sharded over them.
    """
    if not task.num_written:
        return Written()
    some = sample(task, examples)
    share = -(-len(some) // engine.num_workers)
    mine = np.resize(np.arange(engine.rank, len(some), engine.num_workers), share)
    with engine.autocast(), eval_mode(engine.module):
        written = task.generate(engine.module, processor, some.take(mine), batch_size, in_step=engine.num_workers > 1)
    assert written is not None
    gathered = engine.gather(dict(zip(mine.tolist(), written["prediction"], strict=True)))
    found = {row: text for part in gathered for row, text in part.items()}
    return engine.run_on_first_worker(lambda: score_written(task, some, [found[row] for row in range(len(some))]))


def score_written(task: Task, examples: Examples, written: Sequence[str]) -> Written:
    expected = task.expected_answers(examples)
    pairs = enumerate(zip(expected, written, strict=True))
    answers = [Answer(examples.where(row), right, own) for row, (right, own) in pairs]
    return Written(task.score_answers(expected, written), answers)
