"""The context that the trials of one process share: the recipe, its data, and the scores to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.data.streaming import num_streamed
from orchestrator.json_lines import JsonLinesFollower
from orchestrator.recipe import dump_recipe
from orchestrator.runs.directory import RunDirectory, write_atomically
from orchestrator.runs.logs import log_to
from orchestrator.search.records import score_of, with_own_name
from orchestrator.search.space import trial_recipe
from orchestrator.tasks.base import MainMetric
from orchestrator.training.engine.devices import choose_device
from orchestrator.training.prepare import Prepared, prepare
from orchestrator.training.session import Session, open_session

PREFIXES_THAT_CHANGE_DATA = ("source.", "target.")


class TrialContext:
    """The context of one process's trials.

    Args:
        prepared: the recipe that is varied, with its data.
        boundaries: freeze boundaries whose features the trials will need.
        trials: the search's trials.jsonl.
        keep: number of the best trials whose weights are kept.
    """

    def __init__(self, prepared: Prepared, boundaries: Sequence[int], trials: Path, metric: MainMetric, keep: int):
        self.prepared = prepared
        self.boundaries = boundaries
        self.trials = trials
        self.metric = metric
        self.keep = keep
        self._new_trials = JsonLinesFollower(trials)
        self._best_scores: list[float] = []
        """The `keep` best scores in `trials` so far, best first."""

    @contextmanager
    def session(self, parameters: dict[str, Any], directory: RunDirectory) -> Iterator[Session]:
        """Open the session of a trial with these parameters."""
        prepared = trial_inputs(self.prepared, parameters)
        device = choose_device(prepared.recipe)
        write_atomically(directory.recipe, dump_recipe(with_own_name(prepared.recipe, directory.root.name)))
        opened = open_session(prepared, directory, 0, device, None, self.metric, self.boundaries)
        with log_to(directory.logs), opened as session:
            yield session

    def may_win(self, score: float) -> bool:
        """Whether fewer than `keep` of the trials that have ended are better than this score."""
        found = [score_of(row, self.metric.name) for row in self._new_trials.read_new()]
        scores = self._best_scores + [other for other in found if other is not None]
        self._best_scores = sorted(scores, reverse=self.metric.higher_is_better)[: self.keep]
        return len(self._best_scores) < self.keep or not self.metric.improves(self._best_scores[-1], score)


def trial_inputs(prepared: Prepared, parameters: dict[str, Any]) -> Prepared:
    """Return the recipe with a trial's parameters and its data, which are read again only where those change them."""
    recipe = trial_recipe(prepared.recipe, parameters)
    changes_size = num_streamed(recipe) != num_streamed(prepared.recipe)
    if changes_size or any(path.startswith(PREFIXES_THAT_CHANGE_DATA) for path in parameters):
        return prepare(recipe)
    return replace(prepared, recipe=recipe)
