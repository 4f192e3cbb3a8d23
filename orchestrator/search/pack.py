"""A pack: trials that train only the head, trained together, told to Ray Tune as one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from orchestrator.recipe import Recipe, dump_recipe
from orchestrator.recipe.schema import Train
from orchestrator.search.bench import Bench, trial_inputs
from orchestrator.search.heads import Head, Heads
from orchestrator.search.outcome import BEST_WEIGHTS, TRIAL_ERRORS, Outcome, Spec, read_outcome, write_outcome
from orchestrator.search.records import SearchDirectory
from orchestrator.search.space import trial_recipe
from orchestrator.search.trial import Trial
from orchestrator.search.tuning import Report
from orchestrator.training.features import boundary_of
from orchestrator.training.run_directory import RunDirectory, finite

# Heads in one pack may differ in these parts of `train`, which say how fast they learn.
MAY_DIFFER = {"learning_rate", "weight_decay", "schedule", "warmup_ratio"}
SMALLEST = 2


def pack_trials(recipe: Recipe, specs: Iterable[Spec], num_packs: int) -> tuple[list[list[Spec]], list[Spec]]:
    """Which trials can be trained together, and the others.

    Args:
        num_packs: how many packs each group of like trials becomes, at most: as many as run at a time.
    """
    groups: dict[str, list[Spec]] = {}
    others = []
    for spec in specs:
        trial = trial_recipe(recipe, spec.parameters)
        if trains_only_the_head(trial):
            groups.setdefault(likeness(trial), []).append(spec)
        else:
            others.append(spec)
    packs = []
    for group in groups.values():
        count = max(1, min(num_packs, len(group) // SMALLEST))
        packs += [group[start::count] for start in range(count)]
    others += [spec for pack in packs if len(pack) < SMALLEST for spec in pack]
    return [pack for pack in packs if len(pack) >= SMALLEST], others


def trains_only_the_head(recipe: Recipe) -> bool:
    one_process = recipe.scale.workers == 1 and recipe.scale.zero_stage == 0 and recipe.scale.engine != "deepspeed"
    frozen = recipe.transfer.freeze == "all" and recipe.transfer.adapter is None
    return one_process and frozen and recipe.train.cache_prefix is not False


def likeness(recipe: Recipe) -> str:
    """Equal for trials that differ only in how fast they learn."""
    plain: dict[str, Any] = recipe.model_dump(mode="json", exclude={"name": True, "train": MAY_DIFFER, "search": True})
    assert Train.model_fields.keys() >= MAY_DIFFER
    return json.dumps(plain, sort_keys=True)


class Pack:
    """The trials of a pack in progress: all of them in one step."""

    def __init__(self, bench: Bench, specs: Sequence[Spec], directory: SearchDirectory) -> None:
        self.bench = bench
        self.directory = directory
        self.specs = [spec for spec in specs if read_outcome(directory.trial(spec.id)) is None]

    def advance(self) -> Report:
        """Train all of its trials. Where they cannot be stacked, they are trained one after another."""
        if self.specs:
            try:
                self._train_together()
            except TRIAL_ERRORS:
                self._train_in_turn()
        return Report(None, True, {})

    def stop(self) -> None:
        """There is nothing to let go of."""

    def save(self, folder: Path) -> None:
        """A pack is trained in one go."""

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """A pack is trained in one go."""

    def _train_together(self) -> None:
        began, cpu = time.monotonic(), time.process_time()
        first = self.directory.trial(self.specs[0].id)
        first.create()
        with self.bench.session(self.specs[0].parameters, first) as session:
            assert boundary_of(session.parts) is not None
            if session.feeds["train"].features is None:
                raise RuntimeError("there are no features")
            recipes = [trial_inputs(self.bench.prepared, spec.parameters).recipe for spec in self.specs]
            heads = Heads(session, recipes).train()
        seconds = (time.monotonic() - began) / len(heads)
        core_seconds = (time.process_time() - cpu) / len(heads)
        for spec, head in zip(self.specs, heads, strict=True):
            self._keep(head, self.directory.trial(spec.id), seconds, core_seconds)

    def _keep(self, head: Head, run: RunDirectory, seconds: float, core_seconds: float) -> None:
        """Write the trial's directory; the outcome comes last."""
        run.create()
        run.recipe.write_text(dump_recipe(head.recipe), encoding="utf-8")
        lines = (json.dumps(finite({**row, "seconds": seconds})) + "\n" for row in head.rows)
        run.metrics.write_text("".join(lines), encoding="utf-8")
        if head.weights and head.memory.best_score is not None and self.bench.may_win(head.memory.best_score):
            save_file(head.weights, run.root / BEST_WEIGHTS)
        status = "finished" if head.failure is None else "failed"
        reason = head.failure or head.memory.stop
        write_outcome(run, Outcome(status, reason, head.memory.best_step, seconds, core_seconds))

    def _train_in_turn(self) -> None:
        for spec in self.specs:
            trial = Trial(self.bench, spec, self.directory.trial(spec.id))
            while not trial.advance().is_last:
                pass
