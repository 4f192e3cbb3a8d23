"""The processes that trials run in: Ray Tune's actors, or the process of the command."""

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
from orchestrator.launch.ray_train import run_worker_group
from orchestrator.search.batched_trials import BatchedTrials
from orchestrator.search.outcome import Spec
from orchestrator.search.records import SearchDirectory
from orchestrator.search.resources import trial_resources
from orchestrator.search.trial import Trial
from orchestrator.search.trial_context import TrialContext
from orchestrator.search.trial_interface import RunningTrial
from orchestrator.search.workers.group import WorkerGroup, WorkerGroups
from orchestrator.search.workers.trial import MultiWorkerTrial
from orchestrator.search.workers.trial_worker import run_trial_worker
from orchestrator.tasks.base import MainMetric
from orchestrator.training.prepare import Prepared


@dataclass(frozen=True)
class PreparedTrialProcess:
    """Starts trials of a prepared recipe in this process."""

    context: TrialContext
    directory: SearchDirectory
    groups: WorkerGroups | None = None
    """The workers, where a trial has several."""
    only_on_features: bool = False
    """Whether batched trials raise `FeaturesNotStored`."""

    def start(self, id: str, parameters: dict[str, Any], batched: dict[str, dict[str, Any]] | None) -> RunningTrial:
        if batched is not None:
            specs = [Spec(*item) for item in batched.items()]
            return BatchedTrials(self.context, specs, self.directory, self.only_on_features)
        spec, run = Spec(id, parameters), self.directory.trial(id)
        if self.groups is not None:
            return MultiWorkerTrial(self.context, spec, run, self.groups)
        return Trial(self.context, spec, run)

    def close(self) -> None:
        """Release all resources: no more trials start here."""
        if self.groups is not None:
            self.groups.shut_down()


def make_trial_process(
    prepared: Prepared,
    root: Path,
    boundaries: Sequence[int],
    metric: MainMetric,
    keep: int,
    num_threads: int,
    only_on_features: bool = False,
) -> PreparedTrialProcess:
    """Set up this process for trials.

    Args:
        root: folder of the search.
        boundaries: freeze boundaries of the search's trials.
        keep: number of the best trials whose weights are kept.
        num_threads: for each trial.
        only_on_features: let batched trials raise `FeaturesNotStored` where the frozen blocks' output is not stored.
    """
    torch.set_num_threads(num_threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = SearchDirectory(root)
    context = TrialContext(prepared, boundaries, directory.rows, metric, keep)
    groups = None
    if prepared.recipe.scale.workers > 1:
        groups = WorkerGroups(partial(start_worker_group, context, directory, num_threads))
    return PreparedTrialProcess(context, directory, groups, only_on_features)


def start_worker_group(context: TrialContext, directory: SearchDirectory, num_threads: int) -> WorkerGroup:
    """Start the workers of this process's trials.

    Args:
        num_threads: for all workers together.
    """
    from orchestrator.search.ray.channel import RayChannel  # Trials of one worker do without Ray.

    prepared = context.prepared
    resources = trial_resources(prepared.recipe, cluster_nodes()).worker
    threads = max(int(resources["CPU"]), num_threads // prepared.recipe.scale.workers)
    folder = directory.logs / "worker-groups" / uuid.uuid4().hex[:8]
    folder.mkdir(parents=True)
    channel = RayChannel()
    work = partial(run_trial_worker, channel, directory.root, context.boundaries, context.metric, threads)
    return WorkerGroup(channel, partial(run_worker_group, prepared, work, resources, folder), folder)
