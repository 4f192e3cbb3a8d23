"""How many trials fit at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from orchestrator.launch.placement import Nodes, count_room, least_size, refuse_without_room
from orchestrator.recipe import Recipe
from orchestrator.search.plan import SearchPlan
from orchestrator.training.engine.sizes import BYTES_IN_TRAINING

Resources = dict[str, float]
BYTES_OF_A_PROCESS = 1_500_000_000  # Python with torch and what a batch needs, before the model.


@dataclass(frozen=True)
class TrialResources:
    """What one trial takes of the cluster."""

    worker: Resources
    """CPUs and GPUs of each of its processes that compute."""
    workers: int

    @property
    def total(self) -> Resources:
        return {kind: each * self.workers for kind, each in self.worker.items()}

    @property
    def actor(self) -> Resources:
        """What Ray Tune reserves for the trial's actor.

        Several workers take theirs when Ray Train starts them. If the actor that waits for them held any CPU, trials
        could take the CPUs that each other's workers need, and all would wait for ever. Ray cannot reserve nothing, so
        it is a byte.
        """
        return self.worker if self.workers == 1 else {"memory": 1.0}


def nodes_here(recipe: Recipe) -> Nodes:
    """The one node of a cluster that is started on this machine: more workers than cores share them."""
    import torch

    return [{"CPU": float(max(recipe.scale.workers, os.cpu_count() or 1)), "GPU": float(torch.cuda.device_count())}]


def trial_resources(recipe: Recipe, nodes: Nodes) -> TrialResources:
    """CPUs and GPUs of one trial.

    Raises:
        ClusterError: the cluster can never hold one.
    """
    each = least_size(recipe, nodes)
    refuse_without_room(recipe, recipe.scale.workers, each, nodes, is_trial=True)
    return TrialResources({kind: float(number) for kind, number in each.items() if number}, recipe.scale.workers)


def num_concurrent(plan: SearchPlan, nodes: Nodes, each: TrialResources) -> int:
    """Trials at a time: as the recipe says, or as many as cores, GPUs and free memory are for; no more than trials.

    Trials of several workers are never more than the cluster holds: one more would hold its actor, and only wait.
    """
    by_devices = count_room(each.worker, nodes) // each.workers
    trials = max(1, plan.num_trials)
    if plan.search.concurrent != "auto":
        wanted = min(plan.search.concurrent, trials)
        return wanted if each.workers == 1 else min(wanted, by_devices)
    bytes_of_a_trial = each.workers * (BYTES_OF_A_PROCESS + BYTES_IN_TRAINING * plan.num_parameters)
    by_memory = psutil.virtual_memory().available // bytes_of_a_trial
    return max(1, min(by_devices, int(by_memory), trials))
