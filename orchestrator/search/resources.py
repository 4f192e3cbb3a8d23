"""Resources of a trial, and the number of trials that run at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from orchestrator.recipe import Recipe
from orchestrator.recipe.worker_resources import Nodes, count_room, minimum_resources, refuse_without_room
from orchestrator.search.plan import SearchPlan
from orchestrator.training.engine.sizes import BYTES_IN_TRAINING

Resources = dict[str, float]
BYTES_PER_PROCESS = 1_500_000_000  # Python with torch and the memory of a batch, without the model.


@dataclass(frozen=True)
class TrialResources:
    """Resources that one trial needs."""

    worker: Resources
    """CPUs and GPUs of each worker."""
    workers: int

    @property
    def total(self) -> Resources:
        return {kind: each * self.workers for kind, each in self.worker.items()}

    @property
    def actor(self) -> Resources:
        """Resources that Ray Tune reserves for the trial's actor.

        Where there are several workers, Ray Train reserves theirs when it starts them. If the actor that waits for them
        held any CPU, trials could hold the CPUs that each other's workers need, and all would wait forever. Ray cannot
        reserve nothing, so it reserves a byte of memory.
        """
        return self.worker if self.workers == 1 else {"memory": 1.0}


def nodes_here(recipe: Recipe) -> Nodes:
    """Return the node of a cluster that is started on this machine; it has at least one CPU for each worker."""
    import torch

    return [{"CPU": float(max(recipe.scale.workers, os.cpu_count() or 1)), "GPU": float(torch.cuda.device_count())}]


def trial_resources(recipe: Recipe, nodes: Nodes) -> TrialResources:
    """Return the resources of one trial.

    Raises:
        ClusterError: the cluster has no room for one.
    """
    each = minimum_resources(recipe, nodes)
    refuse_without_room(recipe, recipe.scale.workers, each, nodes, is_trial=True)
    return TrialResources({kind: float(number) for kind, number in each.items() if number}, recipe.scale.workers)


def num_concurrent(plan: SearchPlan, nodes: Nodes, each: TrialResources) -> int:
    """Return the number of trials at a time: the recipe's, or as many as cores, GPUs and free memory allow.

    Trials of several workers are never more than the cluster has room for: one more would only wait.

    Args:
        each: resources of a trial.
    """
    by_devices = count_room(each.worker, nodes) // each.workers
    trials = max(1, plan.num_trials)
    if plan.search.concurrent != "auto":
        wanted = min(plan.search.concurrent, trials)
        return wanted if each.workers == 1 else min(wanted, by_devices)
    bytes_per_trial = each.workers * (BYTES_PER_PROCESS + BYTES_IN_TRAINING * plan.num_parameters)
    by_memory = psutil.virtual_memory().available // bytes_per_trial
    return max(1, min(by_devices, int(by_memory), trials))
