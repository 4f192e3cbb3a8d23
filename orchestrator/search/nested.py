"""One trial of several workers, in the trial's actor: it gives the orders, and hands on what the workers tell."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import RunFailed
from orchestrator.recipe import dump_recipe
from orchestrator.search.bench import Bench, trial_inputs
from orchestrator.search.crew import SECONDS_TO_STOP, Crew, Foreman, Told
from orchestrator.search.trial import MEMORY, TRIAL_ERRORS, Outcome, Spec, history, read_outcome, write_outcome
from orchestrator.search.tuning import Report
from orchestrator.training.run_directory import RunDirectory, write_atomically

HANDOVER = "handover"


class NestedTrial:
    """A trial of several workers in progress, in the trial's actor.

    Args:
        bench: the workplace of this process.
        directory: the trial's run directory; what is in it already is not done again.
    """

    def __init__(self, bench: Bench, spec: Spec, directory: RunDirectory, foreman: Foreman) -> None:
        self.bench = bench
        self.spec = spec
        self.directory = directory
        self.foreman = foreman
        self.crew: Crew | None = None
        """Where it is being trained."""
        self.outcome = read_outcome(directory)
        self._told = Told()
        self._seen = 0
        self._start_from: Path | None = None
        self._started = time.monotonic()
        self._rows = self._advance()

    def advance(self) -> Report:
        """Go on to the next evaluation. A trial that was interrupted first tells those that it had."""
        try:
            row, is_last = next(self._rows, ({}, True))
            if not is_last:
                return Report(self._score(row), False, row)
            outcome = self._end()
        except TRIAL_ERRORS as error:
            row, outcome = {}, self._end("failed", str(error) or type(error).__name__)
        has_score = row and outcome.status != "failed"
        reason = outcome.reason if outcome.status == "failed" else None
        return Report(self._score(row) if has_score else None, True, row, reason)

    def stop(self) -> None:
        """Have the workers let go of everything; the weights are kept where this may be among the best."""
        if self.crew is None:
            return
        crew, self.crew = self.crew, None
        if crew.running.done():
            return
        best = self._told.memory.get("best_score")
        try:
            crew.change(stop=True, keep=best is not None and self.bench.may_win(best))
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
        if not (folder / MEMORY).exists():
            return
        self.stop()
        self.spec = Spec(self.spec.id, parameters)
        self.directory.create()
        # The folder is one of this process's machine; the workers may be on others.
        self._start_from = self.directory.root / HANDOVER
        shutil.rmtree(self._start_from, ignore_errors=True)
        shutil.copytree(folder, self._start_from)
        self._seen = 0
        self._rows = self._advance()

    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Evaluations, each with whether it is the last."""
        if self.outcome is not None:
            rows = history(self.directory)
            yield from ((row, row is rows[-1]) for row in rows)
            return
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
        recipe = trial_inputs(self.bench.prepared, self.spec.parameters).recipe
        write_atomically(self.directory.recipe, dump_recipe(recipe))
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

    def _score(self, row: dict[str, Any]) -> float | None:
        metric, value = self.bench.metric, row[self.bench.metric.name]
        return None if value is None else float(value) if metric.higher_is_better else -float(value)

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        """Write down what became of the trial, unless that has been done, and let go of what it held."""
        try:
            self.stop()
        except RunFailed as error:
            status, reason = "failed", reason or str(error)
        if self.outcome is None:
            self.outcome = Outcome(
                status=status,
                reason=reason or self._told.memory.get("stop"),
                best_step=self._told.memory.get("best_step"),
                seconds=time.monotonic() - self._started,
                core_seconds=self._told.core_seconds,
            )
            write_outcome(self.directory, self.outcome)
            # Nothing goes on from here, and what several workers wrote could not be read by one.
            for folder in (self.directory.checkpoints, self.directory.root / HANDOVER):
                shutil.rmtree(folder, ignore_errors=True)
        return self.outcome
