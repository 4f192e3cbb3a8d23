"""What a trial is told and leaves, whether one process trains it or several."""

from __future__ import annotations

import abc
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.json_lines import finite, parse_object
from orchestrator.runs.checkpoint import STATE, CheckpointStore
from orchestrator.runs.directory import RunDirectory, write_json
from orchestrator.search.changes import CHANGES, Changes
from orchestrator.search.trial_context import TrialContext
from orchestrator.search.trial_interface import TrialResult
from orchestrator.training.hooks import TrainingState, judge

OUTCOME, BEST_WEIGHTS, TRAINING_STATE = "outcome.json", "best.safetensors", "memory.json"
# What a trial's model or numbers may cause, and what therefore ends the trial but not the search.
TRIAL_ERRORS = (OrchestratorError, RuntimeError, ValueError, ArithmeticError, MemoryError, OSError)


@dataclass(frozen=True)
class Spec:
    """What is tried."""

    id: str
    parameters: dict[str, Any]
    """Dotted places of the recipe and their values."""


@dataclass
class Outcome:
    """What became of a trial; the content of outcome.json. Its scores are in metrics.jsonl."""

    status: str = "finished"
    """finished, stopped (by the scheduler or the time limit) or failed."""
    reason: str | None = None
    best_step: int | None = None
    seconds: float = 0.0
    core_seconds: float = 0.0


class BaseTrial(abc.ABC):
    """A trial in progress: a run directory that is trained evaluation by evaluation.

    Args:
        bench: the workplace of this process.
        spec: its parameters are those that the trial begins with.
        directory: the trial's run directory; what is in it already is not done again.
    """

    def __init__(self, context: TrialContext, spec: Spec, directory: RunDirectory) -> None:
        self.context = context
        self.spec = spec
        self.directory = directory
        self.changes = Changes(directory, spec.parameters)
        if self.changes.are_lost:  # It is run again: nothing tells what its checkpoints and rows were trained with.
            for name in (OUTCOME, CHANGES):
                (directory.root / name).unlink(missing_ok=True)
            shutil.rmtree(directory.checkpoints, ignore_errors=True)
        self.outcome = read_whole_outcome(directory)
        self._rows = self._replay() if self.outcome else self._advance()

    def advance(self) -> TrialResult:
        """Go on to the next evaluation. A trial that was interrupted first tells those that it had."""
        row: dict[str, Any] = {}
        try:
            row, is_last = next(self._rows, ({}, True))
            if not is_last:
                return TrialResult(self._score(row), False, row, parameters=self.changes.at(row))
            outcome = self._end()
        except TRIAL_ERRORS as error:
            row, outcome = {}, self._end("failed", str(error) or type(error).__name__)
        if outcome.status == "failed":
            return TrialResult(None, True, row, outcome.reason, self.changes.at(row) if row else {})
        return (
            TrialResult(self._score(row), True, row, parameters=self.changes.at(row))
            if row
            else TrialResult(None, True, row)
        )

    @abc.abstractmethod
    def stop(self) -> None:
        """Let go of everything; the weights are kept where this may be among the best."""

    @abc.abstractmethod
    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Evaluations, each with whether it is the last."""

    @abc.abstractmethod
    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        """Write down what became of the trial, unless that has been done, and let go of what it held."""

    def _use_parameters_of_checkpoint(self) -> None:
        """Go on with the parameters that the newest whole checkpoint was trained with."""
        if not self.changes:
            return
        found, notes = CheckpointStore(self.directory.checkpoints).newest_valid()
        for note in notes:
            self.directory.note(note)
        step = 0 if found is None else found.step
        self.changes.forget_after(step)
        self.spec = Spec(self.spec.id, self.changes.after(step))

    def _change(self, step: int, parameters: dict[str, Any]) -> None:
        """Go on from `step`, which another trial wrote, with other parameters."""
        self.changes.record(step, parameters)
        self.spec = Spec(self.spec.id, parameters)

    def _replay(self) -> Iterator[tuple[dict[str, Any], bool]]:
        rows = history(self.directory)
        yield from ((row, row is rows[-1]) for row in rows)

    def _score(self, row: dict[str, Any]) -> float | None:
        metric, value = self.context.metric, row[self.context.metric.name]
        # Files hold null for what is no number.
        return None if value is None else float(value) if metric.higher_is_better else -float(value)


def take_over_state(folder: Path, directory: RunDirectory, context: TrialContext) -> TrainingState:
    """What a trial remembers that goes on from what another wrote: its best evaluation stays one of its own.

    The weights of that one are in its directory, if they are among the best of the search. Its checkpoints go, because
    they lead elsewhere.
    """
    shutil.rmtree(directory.checkpoints, ignore_errors=True)
    directory.create()
    found = TrainingState(**json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8")))
    before = best_of(directory, context)
    # The other may have been behind: those steps will be taken again.
    num_rows = directory.forget_metrics_after(found.step)
    own = best_of(directory, context)
    if own.best_step != before.best_step:
        (directory.root / BEST_WEIGHTS).unlink(missing_ok=True)
    return replace(
        found, best_step=own.best_step, best_score=own.best_score, best_loss=own.best_loss, num_rows=num_rows
    )


def best_of(directory: RunDirectory, context: TrialContext) -> TrainingState:
    """The best of a trial's evaluations so far."""
    state = TrainingState()
    for row in history(directory):
        value, loss = (math.nan if row[name] is None else float(row[name]) for name in (context.metric.name, "loss"))
        judge(value, loss, row["step"], state, context.metric, context.prepared.recipe.train)
    return state


def history(directory: RunDirectory) -> list[dict[str, Any]]:
    """The evaluations on *select* so far, as rows of metrics.jsonl."""
    return [row for row in directory.read_metrics() if row.get("split") == "select"]


def read_whole_outcome(directory: RunDirectory) -> Outcome | None:
    """Return what became of the trial; None also where the evaluations that it goes by are lost: it is run again."""
    outcome = read_outcome(directory)
    return outcome if outcome is None or has_evaluation(directory, outcome.best_step) else None


def forget_unscored(directory: RunDirectory) -> None:
    """Have a trial begin again whose checkpoints go by evaluations that are lost: it could not be compared."""
    states = [parse_object(directory.read(f"checkpoints/{name}/{STATE}")) for name in directory.committed()]
    if not all(has_evaluation(directory, state.get("best_step")) for state in states):
        shutil.rmtree(directory.checkpoints)
        directory.create()


def has_evaluation(directory: RunDirectory, step: int | None) -> bool:
    """Whether the evaluation at a step is recorded; True for None."""
    return step is None or any(row.get("step") == step for row in history(directory))


def read_outcome(directory: RunDirectory) -> Outcome | None:
    """What became of the trial; None while it has not ended."""
    try:
        return Outcome(**json.loads((directory.root / OUTCOME).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_outcome(directory: RunDirectory, outcome: Outcome) -> None:
    write_json(directory.root / OUTCOME, finite(vars(outcome)))
