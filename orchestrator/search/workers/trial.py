"""One trial of several workers, in the trial's actor: it gives the orders, and hands on what the workers tell."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import RunFailed
from orchestrator.recipe import dump_recipe
from orchestrator.runs.directory import RunDirectory, write_atomically, write_json
from orchestrator.search.outcome import (
    BEST_WEIGHTS,
    TRAINING_STATE,
    BaseTrial,
    Outcome,
    Spec,
    history,
    take_over_state,
    write_outcome,
)
from orchestrator.search.records import with_own_name
from orchestrator.search.trial_context import TrialContext, trial_inputs
from orchestrator.search.workers.group import SECONDS_TO_STOP, Crew, Foreman, Told

HANDOVER = "handover"


class MultiWorkerTrial(BaseTrial):
    """A trial in progress on several workers, in the trial's actor."""

    def __init__(self, context: TrialContext, spec: Spec, directory: RunDirectory, foreman: Foreman) -> None:
        super().__init__(context, spec, directory)
        self.foreman = foreman
        self.crew: Crew | None = None
        """Where it is being trained."""
        self._told = Told()
        self._seen = 0
        self._start_from: Path | None = None
        self._started = time.monotonic()

    def stop(self) -> None:
        if self.crew is None:
            return
        crew, self.crew = self.crew, None
        if crew.running.done():
            return
        best = self._told.state.get("best_score")
        try:
            crew.change(stop=True, keep=best is not None and self.context.may_win(best))
            self._told = crew.wait(lambda told: told.over, SECONDS_TO_STOP)
        except RunFailed:
            self.foreman.dismiss()
            raise

    def save(self, folder: Path) -> None:
        """Write what another trial can go on from."""
        if self.crew is not None:
            order = self.crew.orders.save + 1
            self.crew.change(save=order)
            self._told = self.crew.wait(lambda told: told.saved == order or told.over)
            if not self._told.over:
                shutil.copytree(self.directory.root / HANDOVER, folder, dirs_exist_ok=True)

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Go on from what another trial wrote, with other parameters."""
        if not (folder / TRAINING_STATE).exists():
            return
        self.stop()
        state = take_over_state(folder, self.directory, self.context)
        self._change(state.step, parameters)
        # The folder is one of this process's machine; the workers may be on others.
        self._start_from = self.directory.root / HANDOVER
        shutil.rmtree(self._start_from, ignore_errors=True)
        shutil.copytree(folder, self._start_from)
        write_json(self._start_from / TRAINING_STATE, state.to_dict())
        (self._start_from / BEST_WEIGHTS).unlink(missing_ok=True)
        self._seen = 0
        self._rows = self._advance()

    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        if self._start_from is None:
            self._use_parameters_of_checkpoint()
        self._begin()
        first = self._wait(lambda told: True)
        # Evaluations of another trial that this one goes on from were told by that one.
        earlier = history(self.directory) if self._start_from is None else []
        for row in earlier:
            if row["step"] <= first.resumed:
                self._seen = row["step"]
                yield row, first.is_last and first.step == first.resumed == row["step"]
        while True:
            assert self.crew is not None
            self.crew.change(past=self._seen)
            told = self._wait(lambda told: told.row is not None and told.row["step"] > self._seen)
            assert told.row is not None
            self._seen = told.row["step"]
            yield told.row, told.is_last

    def _begin(self) -> None:
        self.directory.create()
        recipe = trial_inputs(self.context.prepared, self.spec.parameters).recipe
        write_atomically(self.directory.recipe, dump_recipe(with_own_name(recipe, self.spec.id)))
        self.crew = self.foreman.crew()
        self.crew.begin(self.spec.id, self.spec.parameters, self._seen, self._start_from)

    def _wait(self, is_it: Callable[[Told], bool]) -> Told:
        """What the workers tell next, where it is what is waited for.

        Raises:
            RunFailed: they failed in this trial.
        """
        assert self.crew is not None
        try:
            told = self.crew.wait(lambda told: told.over or is_it(told))
        except RunFailed:
            if self.crew.orders.number == 1:
                raise
            # Workers had died in the trials before; a new crew may fail as often as the recipe allows one trial.
            self._begin()
            told = self.crew.wait(lambda told: told.over or is_it(told))
        self._told = told
        if told.over:
            self.crew = None
            raise RunFailed(told.failure or "the workers stopped by themselves")
        return told

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        try:
            self.stop()
        except RunFailed as error:
            status, reason = "failed", reason or str(error)
        if self.outcome is None:
            self.outcome = Outcome(
                status=status,
                reason=reason or self._told.state.get("stop"),
                best_step=self._told.state.get("best_step"),
                seconds=time.monotonic() - self._started,
                core_seconds=self._told.core_seconds,
            )
            write_outcome(self.directory, self.outcome)
            # What several workers wrote could not be read by one, should the winner be trained again.
            for folder in (self.directory.checkpoints, self.directory.root / HANDOVER):
                shutil.rmtree(folder, ignore_errors=True)
        return self.outcome
