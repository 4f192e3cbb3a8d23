"""The device that this process computes on, and checks that it is usable as the recipe wants."""

from __future__ import annotations

import torch

from orchestrator.errors import ClusterError, Problem
from orchestrator.recipe import Recipe
from orchestrator.training.engine.settings import uses_deepspeed


def uses_gpu(recipe: Recipe) -> bool:
    """Whether this process may train on a GPU, and has one."""
    return recipe.scale.gpus_per_worker != 0 and torch.cuda.is_available()


def choose_device(recipe: Recipe) -> torch.device:
    """Return the device that this process trains on, a GPU with its index.

    Raises:
        ClusterError: there is a GPU that PyTorch cannot use.
    """
    check_gpu(recipe)
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu(recipe) else torch.device("cpu")


def check_gpu(recipe: Recipe) -> None:
    """Check that this process computes on the device that the recipe wants.

    Raises:
        ClusterError: PyTorch cannot use the GPU, or DeepSpeed would use one that the recipe does not want.
    """
    where = recipe.origin.where("scale.gpus_per_worker")
    if recipe.scale.gpus_per_worker == 0:
        if torch.cuda.is_available() and uses_deepspeed(recipe):
            what = "gpus_per_worker is 0, but DeepSpeed computes on any GPU that it sees, and this process sees one"
            remedy = "export CUDA_VISIBLE_DEVICES= before the command, which hides it"
            raise ClusterError(str(Problem(what, where, remedy)))
        return
    reason = find_gpu_problem()
    if reason is not None:
        what = f"this machine has a GPU that PyTorch cannot use: {reason}"
        remedy = f"{driver_remedy()}, or set scale.gpus_per_worker to 0, which trains on the CPU"
        raise ClusterError(str(Problem(what, where, remedy)))


def find_gpu_problem() -> str | None:
    """Return why PyTorch cannot use the GPUs that the driver finds; None if it can, or if there are none."""
    # Before CUDA is initialised, the number comes from the driver, even if PyTorch cannot use that driver.
    if torch.cuda.device_count() == 0 or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error).split(". ")[0].strip()
    return "CUDA does not start"


def driver_remedy() -> str:
    """Return what to install so that PyTorch and the driver fit."""
    built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}"
    return f"{built}: install a driver for that, or a PyTorch for this driver (https://pytorch.org)"
