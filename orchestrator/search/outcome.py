"""A trial's specification, its outcome, and the parts of its course that do not depend on the number of processes."""

from __future__ import annotations

import abc
import json
import logging
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
from orchestrator.runs.logs import log_to
from orchestrator.search.changes import CHANGES, Changes
from orchestrator.search.trial_context import TrialContext
from orchestrator.search.trial_interface import TrialResult
from orchestrator.training.hooks import TrainingState, judge

logger = logging.getLogger(__name__)
OUTCOME, BEST_WEIGHTS, TRAINING_STATE = "outcome.json", "best.safetensors", "memory.json"
# Errors that a trial's parameters may cause, in its model or its numbers; they end the trial but not the search. The
# traceback of those that are not meant for users is in the trial's log.
TRIAL_ERRORS = (OrchestratorError, RuntimeError, ValueError, ArithmeticError, MemoryError, OSError)


@dataclass(frozen=True)
class Spec:
    """The id and the parameters of a trial."""

    id: str
    parameters: dict[str, Any]
    """Values by their dotted paths in the recipe."""


@dataclass
class Outcome:
    """The end of a trial; the content of outcome.json. Its scores are in metrics.jsonl."""

    status: str = "finished"
    """finished, stopped (by the scheduler or the time limit) or failed."""
    reason: str | None = None
    best_step: int | None = None
    seconds: float = 0.0
    core_seconds: float = 0.0


class BaseTrial(abc.ABC):
    """A trial in progress: a run directory that is trained evaluation by evaluation.

    Args:
        context: shared by the trials of this process.
        spec: holds the parameters that the trial starts with.
        directory: the trial's run directory; evaluations that are in it are not repeated.
    """

    def __init__(self, context: TrialContext, spec: Spec, directory: RunDirectory) -> None:
        self.context = context
        self.spec = spec
        self.directory = directory
        self.changes = Changes(directory, spec.parameters)
        if self.changes.are_lost:  # It starts again: the parameters of its checkpoints and rows are unknown.
            for name in (OUTCOME, CHANGES):
                (directory.root / name).unlink(missing_ok=True)
            shutil.rmtree(directory.checkpoints, ignore_errors=True)
        self.outcome = read_whole_outcome(directory)
        self._rows = self._replay() if self.outcome else self._advance()

    def advance(self) -> TrialResult:
        """Train up to the next evaluation; a trial that was interrupted first repeats its recorded ones."""
        row: dict[str, Any] = {}
        try:
            row, is_last = next(self._rows, ({}, True))
            if not is_last:
                return TrialResult(self._score(row), False, row, parameters=self.changes.at(row))
            outcome = self._end()
        except TRIAL_ERRORS as error:
            row, outcome = {}, self._end("failed", str(error) or type(error).__name__)
            if not isinstance(error, OrchestratorError):
                with log_to(self.directory.logs):
                    logger.error("the trial failed", exc_info=error)
        if outcome.status == "failed":
            return TrialResult(None, True, row, outcome.reason, self.changes.at(row) if row else {})
        return (
            TrialResult(self._score(row), True, row, parameters=self.changes.at(row))
            if row
            else TrialResult(None, True, row)
        )

    @abc.abstractmethod
    def stop(self) -> None:
        """Release all resources; the weights are kept where the trial may be among the best."""

    @abc.abstractmethod
    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yield the row of each evaluation, and whether it is the last."""

    @abc.abstractmethod
    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        """Write the outcome, unless that has been done, and release all resources."""

    def _use_parameters_of_checkpoint(self) -> None:
        """Continue with the parameters that the newest valid checkpoint was trained with."""
        if not self.changes:
            return
        found, notes = CheckpointStore(self.directory.checkpoints).newest_valid()
        for note in notes:
            self.directory.add_note(note)
        step = 0 if found is None else found.step
        self.changes.forget_after(step)
        self.spec = Spec(self.spec.id, self.changes.after(step))

    def _change(self, step: int, parameters: dict[str, Any]) -> None:
        """Continue with other parameters from `step`, which another trial wrote."""
        self.changes.record(step, parameters)
        self.spec = Spec(self.spec.id, parameters)

    def _replay(self) -> Iterator[tuple[dict[str, Any], bool]]:
        rows = history(self.directory)
        yield from ((row, row is rows[-1]) for row in rows)

    def _score(self, row: dict[str, Any]) -> float | None:
        metric, value = self.context.metric, row[self.context.metric.name]
        # Files hold null for NaN.
        return None if value is None else float(value) if metric.higher_is_better else -float(value)


def take_over_state(folder: Path, directory: RunDirectory, context: TrialContext) -> TrainingState:
    """Return the training state of a trial that continues from another; its best evaluation stays one of its own.

    The weights of that evaluation are in its directory, if they are among the best of the search. Its checkpoints are
    deleted, because they do not lead to the new state.

    Args:
        folder: written by the other trial.
        directory: of the trial that continues.
    """
    shutil.rmtree(directory.checkpoints, ignore_errors=True)
    directory.create()
    found = TrainingState(**json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8")))
    before = best_evaluation(directory, context)
    # The other trial may be at an earlier step: the steps after it will be taken again.
    num_rows = directory.forget_metrics_after(found.step)
    own = best_evaluation(directory, context)
    if own.best_step != before.best_step:
        (directory.root / BEST_WEIGHTS).unlink(missing_ok=True)
    return replace(
        found, best_step=own.best_step, best_score=own.best_score, best_loss=own.best_loss, num_rows=num_rows
    )


def best_evaluation(directory: RunDirectory, context: TrialContext) -> TrainingState:
    """Return a training state with the best of a trial's evaluations so far."""
    state = TrainingState()
    for row in history(directory):
        value, loss = (math.nan if row[name] is None else float(row[name]) for name in (context.metric.name, "loss"))
        judge(value, loss, row["step"], state, context.metric, context.prepared.recipe.train)
    return state


def history(directory: RunDirectory) -> list[dict[str, Any]]:
    """Return the evaluations on *select* so far, as rows of metrics.jsonl."""
    return [row for row in directory.read_metrics() if row.get("split") == "select"]


def read_whole_outcome(directory: RunDirectory) -> Outcome | None:
    """Return the outcome; None also where the evaluation that it refers to is lost, so that the trial is run again."""
    outcome = read_outcome(directory)
    return outcome if outcome is None or has_evaluation(directory, outcome.best_step) else None


def forget_unscored(directory: RunDirectory) -> None:
    """Delete the checkpoints of a trial where the evaluations that they refer to are lost: it has to start again."""
    states = [parse_object(directory.read(f"checkpoints/{name}/{STATE}")) for name in directory.committed()]
    if not all(has_evaluation(directory, state.get("best_step")) for state in states):
        shutil.rmtree(directory.checkpoints)
        directory.create()


def has_evaluation(directory: RunDirectory, step: int | None) -> bool:
    """Whether the evaluation at a step is recorded; True for None."""
    return step is None or any(row.get("step") == step for row in history(directory))


def read_outcome(directory: RunDirectory) -> Outcome | None:
    """Return how the trial ended; None while it has not ended."""
    try:
        return Outcome(**json.loads((directory.root / OUTCOME).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_outcome(directory: RunDirectory, outcome: Outcome) -> None:
    write_json(directory.root / OUTCOME, finite(vars(outcome)))
