"""One trial of several workers, in the trial's process: sends the commands, and passes on what the workers report."""

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
from orchestrator.search.workers.group import STOP_TIMEOUT_S, WorkerGroup, WorkerGroups
from orchestrator.search.workers.messages import Status

HANDOVER = "handover"
"""Folder, in the trial's directory, of the state that another trial continues from."""


class MultiWorkerTrial(BaseTrial):
    """A trial in progress on several workers, in the trial's process."""

    def __init__(self, context: TrialContext, spec: Spec, directory: RunDirectory, groups: WorkerGroups) -> None:
        super().__init__(context, spec, directory)
        self.groups = groups
        self.group: WorkerGroup | None = None
        """The worker group that trains it; None before and after."""
        self._status = Status()
        self._seen_step = 0
        self._start_from: Path | None = None
        self._started = time.monotonic()

    def stop(self) -> None:
        if self.group is None:
            return
        group, self.group = self.group, None
        if group.running.done():
            return
        best = self._status.state.get("best_score")
        try:
            group.change(stop=True, keep_best=best is not None and self.context.may_win(best))
            self._status = group.wait(lambda status: status.is_over, STOP_TIMEOUT_S)
        except RunFailed:
            self.groups.shut_down()
            raise

    def save(self, folder: Path) -> None:
        """Write the state that another trial can continue from."""
        if self.group is not None:
            number = self.group.command.num_handovers + 1
            self.group.change(num_handovers=number)
            self._status = self.group.wait(lambda status: status.num_handovers == number or status.is_over)
            if not self._status.is_over:
                shutil.copytree(self.directory.root / HANDOVER, folder, dirs_exist_ok=True)

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Continue from the state that another trial wrote, with other parameters."""
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
        self._seen_step = 0
        self._rows = self._advance()

    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        if self._start_from is None:
            self._use_parameters_of_checkpoint()
        self._start()
        first = self._wait(lambda status: True)
        # Evaluations of another trial that this one continues from were reported by that one.
        earlier = history(self.directory) if self._start_from is None else []
        for row in earlier:
            if row["step"] <= first.resumed_step:
                self._seen_step = row["step"]
                yield row, first.is_last and first.step == first.resumed_step == row["step"]
        while True:
            assert self.group is not None
            self.group.change(seen_step=self._seen_step)
            status = self._wait(lambda status: status.row is not None and status.row["step"] > self._seen_step)
            assert status.row is not None
            self._seen_step = status.row["step"]
            yield status.row, status.is_last

    def _start(self) -> None:
        self.directory.create()
        recipe = trial_inputs(self.context.prepared, self.spec.parameters).recipe
        write_atomically(self.directory.recipe, dump_recipe(with_own_name(recipe, self.spec.id)))
        self.group = self.groups.running()
        self.group.start(self.spec.id, self.spec.parameters, self._seen_step, self._start_from)

    def _wait(self, is_expected: Callable[[Status], bool]) -> Status:
        """Return the status of the workers once it is as expected.

        Raises:
            RunFailed: they failed in this trial.
        """
        assert self.group is not None
        try:
            status = self.group.wait(lambda status: status.is_over or is_expected(status))
        except RunFailed:
            if self.group.command.number == 1:
                raise
            # Workers had died in the trials before; a new group may fail as often as the recipe allows one trial.
            self._start()
            status = self.group.wait(lambda status: status.is_over or is_expected(status))
        self._status = status
        if status.is_over:
            self.group = None
            raise RunFailed(status.failure or "the workers stopped by themselves")
        return status

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        try:
            self.stop()
        except RunFailed as error:
            status, reason = "failed", reason or str(error)
        if self.outcome is None:
            self.outcome = Outcome(
                status=status,
                reason=reason or self._status.state.get("stop"),
                best_step=self._status.state.get("best_step"),
                seconds=time.monotonic() - self._started,
                core_seconds=self._status.core_seconds,
            )
            write_outcome(self.directory, self.outcome)
            # A single process could not read what several workers wrote, should the winner be trained again.
            for folder in (self.directory.checkpoints, self.directory.root / HANDOVER):
                shutil.rmtree(folder, ignore_errors=True)
        return self.outcome
