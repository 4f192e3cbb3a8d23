"""One trial in one process, which can be left and taken up at any of its evaluations."""

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
    MEMORY,
    OneTrial,
    Outcome,
    Spec,
    forget_unscored,
    history,
    taken_over,
    write_outcome,
)
from orchestrator.search.trial_context import Bench
from orchestrator.training.hooks import TrainingState
from orchestrator.training.loop import Step
from orchestrator.training.session import Session
from orchestrator.training.worker import evaluations, resume

SECONDS_BETWEEN_SAVES = 30.0


class Trial(OneTrial):
    """A trial in progress in this process."""

    def __init__(self, bench: Bench, spec: Spec, directory: RunDirectory) -> None:
        super().__init__(bench, spec, directory)
        self.session: Session | None = None
        self.state = TrainingState()
        self._best: dict[str, torch.Tensor] = {}
        self._stack = contextlib.ExitStack()
        self._started, self._cpu = time.monotonic(), time.process_time()
        self._saved = time.monotonic()
        self._saved_step = 0
        self._takes_step = False

    def stop(self) -> None:
        # It may be taken up again; but not from a step that was broken off, whose weights are half changed.
        if self.session is not None and not self._takes_step and self.state.step > self._saved_step:
            self._checkpoint()
        self._let_go()

    def save(self, folder: Path) -> None:
        """Write what another trial can go on from."""
        if self.session is not None:
            self.session.write_state(folder)
            write_json(folder / MEMORY, self.state.to_dict())

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Go on from what another trial wrote, with other parameters."""
        if not (folder / MEMORY).exists():
            return
        self._let_go()
        self.state = taken_over(folder, self.directory, self.bench)
        self._change(self.state.step, parameters)
        self._enter()
        assert self.session is not None
        self.session.read_state(folder, self.state)
        self._saved_step = 0
        self._count_earlier_time()
        self._rows = self._evaluations()

    def after_step(self, step: Step, state: TrainingState) -> None:
        """The last hook of the loop: keeps the best weights in memory, and saves a checkpoint now and then."""
        assert self.session is not None
        if state.improved:
            weights = self.session.trained_weights()
            self._best = {name: value.clone() for name, value in weights.items()}
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self._checkpoint()

    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        self.directory.create()
        forget_unscored(self.directory)
        self._use_parameters_of_checkpoint()
        self._enter()
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
        """What it took before it was left, or interrupted, counts too."""
        self._started -= self.state.seconds
        self._cpu -= self.state.seconds

    def _enter(self) -> None:
        self.session = self._stack.enter_context(self.bench.session(self.spec.parameters, self.directory))
        self._saved = time.monotonic()

    def _is_last(self, row: dict[str, Any]) -> bool:
        assert self.session is not None
        return self.session.ends_run(self.state) and row["step"] == self.state.step

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        self._let_go()
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
        """Save what the trial goes on from after an interruption."""
        session = self.session
        assert session is not None

        def write(folder: Path) -> None:
            session.write_state(folder)
            save_file(self._best, folder / BEST_WEIGHTS)

        session.store.save(self.state.step, self.state.to_dict(), write)
        session.store.prune(1, None)
        self._saved, self._saved_step = time.monotonic(), self.state.step

    def _let_go(self) -> None:
        self._keep_best_weights()
        self._stack.close()
        self.session = None

    def _keep_best_weights(self) -> None:
        """The weights at the best evaluation go to the disk only where this may be the winner."""
        score = self.state.best_score
        if self._best and score is not None and self.bench.may_win(score):
            temporary = self.directory.root / f".{BEST_WEIGHTS}.partial"
            save_file(self._best, temporary)
            temporary.replace(self.directory.root / BEST_WEIGHTS)
        self._best = {}
