"""How many trials fit at a time."""

from __future__ import annotations

import os

import psutil

from orchestrator.errors import ClusterError
from orchestrator.recipe import Recipe
from orchestrator.search.plan import Plan

Resources = dict[str, float]
BYTES_OF_A_PROCESS = 1_500_000_000  # Python with torch and what a batch needs, before the model.
BYTES_OF_A_PARAMETER = 16  # Weight, gradient and the optimizer's two moments, in fp32.


def resources_here() -> Resources:
    """CPUs and GPUs of this machine."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def trial_resources(recipe: Recipe, have: Resources) -> Resources:
    """CPUs and GPUs of one trial.

    Args:
        have: those of the cluster.

    Raises:
        ClusterError: the cluster can never hold one.
    """
    scale = recipe.scale
    gpus = min(1.0, have["GPU"]) if scale.gpus_per_worker == "auto" else float(scale.gpus_per_worker)
    cpus = 1.0 if scale.cpus_per_worker == "auto" else float(scale.cpus_per_worker)
    for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > have[kind]:
            what = f"a trial needs {wanted:g} {kind}s, the cluster has {have[kind]:g}"
            raise ClusterError(f"{what}\n    -> lower scale.{kind.lower()}s_per_worker, or give it more")
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def num_concurrent(plan: Plan, have: Resources, each: Resources) -> int:
    """Trials at a time: as the recipe says, or as many as cores, GPUs and free memory are for; no more than trials."""
    if plan.search.concurrent != "auto":
        return min(plan.search.concurrent, max(1, plan.num_trials))
    by_devices = min(int(have[kind] // wanted) for kind, wanted in each.items())
    by_memory = psutil.virtual_memory().available // (BYTES_OF_A_PROCESS + BYTES_OF_A_PARAMETER * plan.num_parameters)
    return max(1, min(by_devices, int(by_memory), plan.num_trials))
