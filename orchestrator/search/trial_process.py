"""Where trials run: what Ray Tune's actors are set up with."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from orchestrator.launch.cluster import cluster_nodes
from orchestrator.launch.ray_train import run_crew
from orchestrator.search.batched_trials import BatchedTrials
from orchestrator.search.outcome import Spec
from orchestrator.search.records import SearchDirectory
from orchestrator.search.resources import trial_resources
from orchestrator.search.trial import Trial
from orchestrator.search.trial_context import TrialContext
from orchestrator.search.trial_interface import RunningTrial
from orchestrator.search.workers.group import Crew, Foreman
from orchestrator.search.workers.trial import MultiWorkerTrial
from orchestrator.search.workers.trial_worker import serve
from orchestrator.tasks.base import MainMetric
from orchestrator.training.prepare import Prepared


@dataclass(frozen=True)
class PreparedTrialProcess:
    """Begins trials, and packs of them, in the process that it was made in."""

    context: TrialContext
    directory: SearchDirectory
    foreman: Foreman | None = None
    """Of the workers, where a trial has several."""
    only_on_features: bool = False
    """Of packs."""

    def begin(self, id: str, parameters: dict[str, Any], members: dict[str, dict[str, Any]] | None) -> RunningTrial:
        if members is not None:
            specs = [Spec(*member) for member in members.items()]
            return BatchedTrials(self.context, specs, self.directory, self.only_on_features)
        spec, run = Spec(id, parameters), self.directory.trial(id)
        if self.foreman is not None:
            return MultiWorkerTrial(self.context, spec, run, self.foreman)
        return Trial(self.context, spec, run)

    def close(self) -> None:
        """No more trials begin here."""
        if self.foreman is not None:
            self.foreman.dismiss()


def make_trial_process(
    prepared: Prepared,
    root: Path,
    boundaries: Sequence[int],
    metric: MainMetric,
    keep: int,
    num_threads: int,
    only_on_features: bool = False,
) -> PreparedTrialProcess:
    """Set up a process for trials.

    Args:
        boundaries: freeze boundaries of the search's trials.
        keep: of how many of the best trials the weights are kept.
        num_threads: for each trial.
        only_on_features: have packs raise NoFeatures where there are none.
    """
    torch.set_num_threads(num_threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = SearchDirectory(root)
    foreman = None
    workers = prepared.recipe.scale.workers
    if workers > 1:
        resources = trial_resources(prepared.recipe, cluster_nodes()).worker
        threads = max(int(resources["CPU"]), num_threads // workers)

        def hire() -> Crew:
            folder = directory.logs / "crews" / uuid.uuid4().hex[:8]
            work = partial(serve, folder, root, boundaries, metric, threads)
            return Crew(folder, partial(run_crew, prepared, work, resources, folder))

        foreman = Foreman(hire)
    context = TrialContext(prepared, boundaries, directory.rows, metric, keep)
    return PreparedTrialProcess(context, directory, foreman, only_on_features)
