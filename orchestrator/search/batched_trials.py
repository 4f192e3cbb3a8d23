"""Trials that train only the head, trained together and reported to Ray Tune as one."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from orchestrator.json_lines import format_json_lines
from orchestrator.models.attempt import CallFailed
from orchestrator.recipe import dump_recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.search.batched_heads import BatchedHeads, HeadState
from orchestrator.search.outcome import BEST_WEIGHTS, TRIAL_ERRORS, Outcome, Spec, read_whole_outcome, write_outcome
from orchestrator.search.records import SearchDirectory, with_own_name
from orchestrator.search.trial import Trial
from orchestrator.search.trial_context import TrialContext, trial_inputs
from orchestrator.search.trial_interface import TrialResult
from orchestrator.training.features.build import boundary_of

logger = logging.getLogger(__name__)


class FeaturesNotStored(RuntimeError):
    """The output of the frozen blocks is not stored."""


class BatchedTrials:
    """The trials of one batch in progress; all of them are trained in one call of `advance`.

    Args:
        only_on_features: raise FeaturesNotStored where there are none, rather than train one trial after another.
    """

    def __init__(
        self, context: TrialContext, specs: Sequence[Spec], directory: SearchDirectory, only_on_features: bool = False
    ) -> None:
        self.context = context
        self.directory = directory
        self.only_on_features = only_on_features
        self.specs = [spec for spec in specs if read_whole_outcome(directory.trial(spec.id)) is None]

    def advance(self) -> TrialResult:
        """Train all trials together; one after another where their heads cannot be stacked."""
        if self.specs and not self._train_together():
            self._train_in_turn()
        return TrialResult(None, True, {})

    def stop(self) -> None:
        """Do nothing: between calls of `advance` no resources are held."""

    def save(self, folder: Path) -> None:
        """Do nothing: no other trial can continue from a batch."""

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Do nothing: a batch cannot continue from another trial."""

    def _train_together(self) -> bool:
        """Train the trials on one model; return False where that is not possible.

        Raises:
            FeaturesNotStored: as `only_on_features` says.
        """
        start, cpu_start = time.monotonic(), time.process_time()
        first = self.directory.trial(self.specs[0].id)
        first.create()
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self.context.session(self.specs[0].parameters, first))
            except TRIAL_ERRORS:
                logger.info("batched trials cannot start, so each one is trained by itself", exc_info=True)
                return False
            assert boundary_of(session.parts) is not None
            if session.loaders["train"].features is None:
                if self.only_on_features:
                    raise FeaturesNotStored
                return False
            recipes = [trial_inputs(self.context.prepared, spec.parameters).recipe for spec in self.specs]
            try:
                heads = BatchedHeads(session, recipes).train()
            except CallFailed:
                return False
        seconds = (time.monotonic() - start) / len(heads)
        core_seconds = (time.process_time() - cpu_start) / len(heads)
        for spec, head in zip(self.specs, heads, strict=True):
            self._write(head, self.directory.trial(spec.id), seconds, core_seconds)
        return True

    def _write(self, head: HeadState, run: RunDirectory, seconds: float, core_seconds: float) -> None:
        """Write the trial's directory; the outcome comes last."""
        run.create()
        run.recipe.write_text(dump_recipe(with_own_name(head.recipe, run.root.name)), encoding="utf-8")
        rows = [{**row, "seconds": seconds} for row in head.rows]
        run.metrics.write_text(format_json_lines(rows), encoding="utf-8")
        if head.weights and head.state.best_score is not None and self.context.may_win(head.state.best_score):
            save_file(head.weights, run.root / BEST_WEIGHTS)
        status = "finished" if head.failure is None else "failed"
        reason = head.failure or head.state.stop
        write_outcome(run, Outcome(status, reason, head.state.best_step, seconds, core_seconds))

    def _train_in_turn(self) -> None:
        for spec in self.specs:
            trial = Trial(self.context, spec, self.directory.trial(spec.id))
            while not trial.advance().is_last:
                pass
