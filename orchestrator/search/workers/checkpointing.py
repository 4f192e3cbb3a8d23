"""The files that a trial of several workers leaves: its checkpoint, its best weights, the state for another trial."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from orchestrator.runs.directory import RunDirectory, write_json
from orchestrator.search.outcome import BEST_WEIGHTS, TRAINING_STATE
from orchestrator.search.workers.trial import HANDOVER
from orchestrator.training.hooks import TrainingState, is_due
from orchestrator.training.loop import Step
from orchestrator.training.session import Session
from orchestrator.training.worker import resume

MAX_SAVING_SHARE = 0.05
"""Largest share of the time that saving may take."""


class TrialCheckpoints:
    """The last hook of the loop: keeps the best weights in worker 0's memory, and saves checkpoints now and then.

    All workers call each method.
    """

    def __init__(self, session: Session, run: RunDirectory) -> None:
        self.session = session
        self.run = run
        self.best: dict[str, torch.Tensor] = {}
        """Weights at the best evaluation; on worker 0 alone."""
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._seconds_to_save = 0.0
        """Duration of the last save; taken to be 0 before the first."""

    def restore(self, start_from: Path | None) -> TrainingState:
        """Load the newest checkpoint into the engine, or the state that another trial wrote.

        Args:
            start_from: folder of that state; None for the checkpoint.
        """
        session = self.session
        if start_from is None:
            state = resume(session)
            folder = session.store.at(state.step).folder
        else:
            folder = start_from
            state = TrainingState(**json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8")))
            session.read_state(folder, state)
        if session.engine.rank == 0 and (folder / BEST_WEIGHTS).exists():
            self.best = load_file(folder / BEST_WEIGHTS)
        if start_from is not None:
            self.save(state)
        self._saved_step = state.step
        return state

    def after_step(self, step: Step, state: TrainingState) -> None:
        engine, schedule, train = self.session.engine, self.session.schedule, self.session.prepared.recipe.train
        if state.improved:
            weights = self.session.trained_weights()
            if engine.rank == 0:
                self.best = {name: value.clone() for name, value in weights.items()}
        due = any(
            is_due(every, step.number, schedule.order.steps_per_epoch, schedule.end)
            for every in (train.save_every, train.evaluate_every)
        )
        if due and engine.broadcast_from_first(self._is_affordable()):
            self.save(state)

    def _is_affordable(self) -> bool:
        return self._seconds_to_save <= MAX_SAVING_SHARE * (time.monotonic() - self._saved_at)

    def save(self, state: TrainingState) -> None:
        """Save a checkpoint, unless there is one of this step."""
        if state.step == self._saved_step:
            return
        start = time.monotonic()
        self.session.store.save(state.step, state.to_dict(), self._write)
        self.session.engine.run_on_first_worker(lambda: self.session.store.prune(1, None))
        self._saved_at, self._saved_step = time.monotonic(), state.step
        self._seconds_to_save = self._saved_at - start

    def _write(self, folder: Path) -> None:
        self.session.write_state(folder)
        if self.session.engine.rank == 0:
            save_file(self.best, folder / BEST_WEIGHTS)

    def hand_over(self, state: TrainingState) -> None:
        """Write the state that another trial can continue from."""
        folder, engine = self.run.root / HANDOVER, self.session.engine

        def make_empty_folder() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

        engine.run_on_first_worker(make_empty_folder)
        self._write(folder)
        engine.run_on_first_worker(lambda: write_json(folder / TRAINING_STATE, state.to_dict()))

    def keep_best_weights(self) -> None:
        """Write the weights of the best evaluation to the trial's directory."""
        if self.best:
            temporary = self.run.root / f".{BEST_WEIGHTS}.partial"
            save_file(self.best, temporary)
            temporary.replace(self.run.root / BEST_WEIGHTS)
