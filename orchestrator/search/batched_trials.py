"""A pack: trials that train only the head, trained together, told to Ray Tune as one."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from orchestrator.models.attempt import CallFailed
from orchestrator.recipe import dump_recipe
from orchestrator.runs.directory import RunDirectory, finite
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
    """The trials of a pack in progress: all of them in one step.

    Args:
        only_on_features: raise NoFeatures where there are none, rather than train the heads one after another.
    """

    def __init__(
        self, context: TrialContext, specs: Sequence[Spec], directory: SearchDirectory, only_on_features: bool = False
    ) -> None:
        self.context = context
        self.directory = directory
        self.only_on_features = only_on_features
        self.specs = [spec for spec in specs if read_whole_outcome(directory.trial(spec.id)) is None]

    def advance(self) -> TrialResult:
        """Train all of its trials. Where they cannot be stacked, they are trained one after another."""
        if self.specs and not self._train_together():
            self._train_in_turn()
        return TrialResult(None, True, {})

    def stop(self) -> None:
        """There is nothing to let go of."""

    def save(self, folder: Path) -> None:
        """A pack is trained in one go."""

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """A pack is trained in one go."""

    def _train_together(self) -> bool:
        """Train them on one model; False where that is not possible.

        Raises:
            NoFeatures: as `only_on_features` says.
        """
        began, cpu = time.monotonic(), time.process_time()
        first = self.directory.trial(self.specs[0].id)
        first.create()
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self.context.session(self.specs[0].parameters, first))
            except TRIAL_ERRORS:
                logger.info("a pack of trials cannot begin, so each one is trained by itself", exc_info=True)
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
        seconds = (time.monotonic() - began) / len(heads)
        core_seconds = (time.process_time() - cpu) / len(heads)
        for spec, head in zip(self.specs, heads, strict=True):
            self._keep(head, self.directory.trial(spec.id), seconds, core_seconds)
        return True

    def _keep(self, head: HeadState, run: RunDirectory, seconds: float, core_seconds: float) -> None:
        """Write the trial's directory; the outcome comes last."""
        run.create()
        run.recipe.write_text(dump_recipe(with_own_name(head.recipe, run.root.name)), encoding="utf-8")
        lines = (json.dumps(finite({**row, "seconds": seconds})) + "\n" for row in head.rows)
        run.metrics.write_text("".join(lines), encoding="utf-8")
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
