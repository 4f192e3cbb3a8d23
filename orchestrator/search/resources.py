"""How many trials fit at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from orchestrator.errors import ClusterError, Problem
from orchestrator.recipe import Recipe
from orchestrator.search.plan import Plan

Resources = dict[str, float]
BYTES_OF_A_PROCESS = 1_500_000_000  # Python with torch and what a batch needs, before the model.
BYTES_OF_A_PARAMETER = 16  # Weight, gradient and the optimizer's two moments, in fp32.


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


def resources_here(recipe: Recipe) -> Resources:
    """CPUs and GPUs of a cluster that is started on this machine: more workers than cores share them."""
    import torch

    return {"CPU": float(max(recipe.scale.workers, os.cpu_count() or 1)), "GPU": float(torch.cuda.device_count())}


def trial_resources(recipe: Recipe, have: Resources) -> TrialResources:
    """CPUs and GPUs of one trial.

    Args:
        have: those of the cluster.

    Raises:
        ClusterError: the cluster can never hold one.
    """
    scale, workers = recipe.scale, recipe.scale.workers
    gpus = float(min(1, int(have["GPU"]) // workers)) if scale.gpus_per_worker == "auto" else scale.gpus_per_worker
    cpus = 1.0 if scale.cpus_per_worker == "auto" else float(scale.cpus_per_worker)
    wanted = {"CPU": cpus, "GPU": float(gpus)}
    short = [too_little(recipe, kind, each, have[kind]) for kind, each in wanted.items() if each * workers > have[kind]]
    if short:
        raise ClusterError("\n".join(map(str, short)))
    return TrialResources({kind: each for kind, each in wanted.items() if each}, workers)


def too_little(recipe: Recipe, kind: str, each: float, have: float) -> Problem:
    """What the cluster lacks of one kind of resource."""
    workers, lower = recipe.scale.workers, f"lower scale.{kind.lower()}s_per_worker"
    if workers == 1:
        return Problem(f"a trial needs {each:g} {kind}s, the cluster has {have:g}", None, f"{lower}, or give it more")
    what = (
        f"a trial has {workers} workers with {each:g} {kind} each, so it needs {workers * each:g} {kind}s; "
        f"the cluster has {have:g}"
    )
    remedy = f"set scale.workers to {have // each:g} or less" if have >= each else lower
    return Problem(what, recipe.origin.where("scale.workers"), f"{remedy}, or give the cluster more {kind}s")


def num_concurrent(plan: Plan, have: Resources, each: TrialResources) -> int:
    """Trials at a time: as the recipe says, or as many as cores, GPUs and free memory are for; no more than trials.

    Trials of several workers are never more than the cluster holds: one more would hold its actor, and only wait.
    """
    by_devices = min(int(have[kind] // wanted) for kind, wanted in each.total.items())
    trials = max(1, plan.num_trials)
    if plan.search.concurrent != "auto":
        wanted = min(plan.search.concurrent, trials)
        return wanted if each.workers == 1 else min(wanted, by_devices)
    bytes_of_a_trial = each.workers * (BYTES_OF_A_PROCESS + BYTES_OF_A_PARAMETER * plan.num_parameters)
    by_memory = psutil.virtual_memory().available // bytes_of_a_trial
    return max(1, min(by_devices, int(by_memory), trials))
