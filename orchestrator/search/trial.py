"""One trial in one process, which can be paused and resumed at any of its evaluations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.runs.directory import RunDirectory, write_json
from orchestrator.search.outcome import (
    BEST_WEIGHTS,
    TRAINING_STATE,
    BaseTrial,
    Outcome,
    Spec,
    forget_unscored,
    history,
    take_over_state,
    write_outcome,
)
from orchestrator.search.trial_context import TrialContext
from orchestrator.training.hooks import TrainingState
from orchestrator.training.loop import Step
from orchestrator.training.session import Session
from orchestrator.training.worker import evaluations, resume

SAVE_INTERVAL_S = 30.0


class Trial(BaseTrial):
    """A trial in progress in this process."""

    def __init__(self, context: TrialContext, spec: Spec, directory: RunDirectory) -> None:
        super().__init__(context, spec, directory)
        self.session: Session | None = None
        self.state = TrainingState()
        self._best: dict[str, torch.Tensor] = {}
        self._stack = contextlib.ExitStack()
        self._started, self._cpu = time.monotonic(), time.process_time()
        self._saved = time.monotonic()
        self._saved_step = 0
        self._takes_step = False

    def stop(self) -> None:
        # The trial may be resumed; but not from a step that was interrupted, whose weights are partly changed.
        if self.session is not None and not self._takes_step and self.state.step > self._saved_step:
            self._checkpoint()
        self._release()

    def save(self, folder: Path) -> None:
        """Write the state that another trial can continue from."""
        if self.session is not None:
            self.session.write_state(folder)
            write_json(folder / TRAINING_STATE, self.state.to_dict())

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Continue from the state that another trial wrote, with other parameters."""
        if not (folder / TRAINING_STATE).exists():
            return
        self._release()
        self.state = take_over_state(folder, self.directory, self.context)
        self._change(self.state.step, parameters)
        self._open_session()
        assert self.session is not None
        self.session.read_state(folder, self.state)
        self._saved_step = 0
        self._count_earlier_time()
        self._rows = self._evaluations()

    def after_step(self, step: Step, state: TrainingState) -> None:
        """Keep the best weights in memory, and save a checkpoint from time to time; the last hook of the loop."""
        assert self.session is not None
        if state.improved:
            weights = self.session.trained_weights()
            self._best = {name: value.clone() for name, value in weights.items()}
        if time.monotonic() - self._saved > SAVE_INTERVAL_S:
            self._checkpoint()

    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        self.directory.create()
        forget_unscored(self.directory)
        self._use_parameters_of_checkpoint()
        self._open_session()
        assert self.session is not None
        self.state = resume(self.session)
        self._saved_step = self.state.step
        self._count_earlier_time()
        if self.state.best_step is not None:
            folder = self.session.store.at(self.state.step).folder
            self._best = load_file(folder / BEST_WEIGHTS)
        yield from ((row, self._is_last(row)) for row in history(self.directory))
        yield from self._evaluations()

    def _evaluations(self) -> Iterator[tuple[dict[str, Any], bool]]:
        assert self.session is not None
        self._takes_step = True
        for row in evaluations(self.session, self.state, [self]):
            self._takes_step = False
            yield row, self._is_last(row)
            self._takes_step = True
        self._takes_step = False

    def _count_earlier_time(self) -> None:
        """Add the time before the trial was paused or interrupted."""
        self._started -= self.state.seconds
        self._cpu -= self.state.seconds

    def _open_session(self) -> None:
        self.session = self._stack.enter_context(self.context.session(self.spec.parameters, self.directory))
        self._saved = time.monotonic()

    def _is_last(self, row: dict[str, Any]) -> bool:
        assert self.session is not None
        return self.session.ends_run(self.state) and row["step"] == self.state.step

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        self._release()
        if self.outcome is None:
            self.outcome = Outcome(
                status=status,
                reason=reason or self.state.stop,
                best_step=self.state.best_step,
                seconds=time.monotonic() - self._started,
                core_seconds=time.process_time() - self._cpu,
            )
            write_outcome(self.directory, self.outcome)
        return self.outcome

    def _checkpoint(self) -> None:
        """Save a checkpoint to resume from."""
        session = self.session
        assert session is not None

        def write(folder: Path) -> None:
            session.write_state(folder)
            save_file(self._best, folder / BEST_WEIGHTS)

        session.store.save(self.state.step, self.state.to_dict(), write)
        session.store.prune(1, None)
        self._saved, self._saved_step = time.monotonic(), self.state.step

    def _release(self) -> None:
        self._keep_best_weights()
        self._stack.close()
        self.session = None

    def _keep_best_weights(self) -> None:
        """Write the weights of the best evaluation to the disk where the trial may be among the best."""
        score = self.state.best_score
        if self._best and score is not None and self.context.may_win(score):
            temporary = self.directory.root / f".{BEST_WEIGHTS}.partial"
            save_file(self._best, temporary)
            temporary.replace(self.directory.root / BEST_WEIGHTS)
        self._best = {}
