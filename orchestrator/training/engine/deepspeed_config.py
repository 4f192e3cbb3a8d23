"""DeepSpeed's configuration, and the process-wide state that it needs and leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe import Recipe
from orchestrator.recipe.deepspeed_rules import without_auto
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.sizes import BUCKET


def deepspeed_config(recipe: Recipe, precision: Precision, micro_batch: int, trained: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a recipe (keys: "Configuration JSON" in its documentation).

    Args:
        trained: the number of trained parameters.
    """
    # DeepSpeed allocates the whole bucket at the start: 1 GB in bf16, even for a small adapter.
    bucket = min(BUCKET, max(1, trained))
    zero: dict[str, Any] = {"stage": recipe.scale.zero_stage, "reduce_bucket_size": bucket}
    if recipe.scale.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if recipe.scale.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    if recipe.scale.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    given = without_auto(recipe.scale.deepspeed or {})
    # Keys that the recipe sets elsewhere are refused when the recipe is read.
    zero |= given.get("zero_optimization", {})
    workers = recipe.scale.workers
    accumulation = -(-recipe.train.global_batch_size // (micro_batch * workers))
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * workers,
        "gradient_clipping": recipe.train.max_grad_norm or 0.0,
        # ZeRO keeps an fp32 copy of bf16 weights. Without ZeRO there would be none, so the weights stay in fp32.
        "bf16": {"enabled": precision == "bf16" and recipe.scale.zero_stage > 0},
        "torch_autocast": {"enabled": precision == "bf16" and recipe.scale.zero_stage == 0, "dtype": "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for the CPU would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **{key: value for key, value in given.items() if key != "zero_optimization"},
    }


def init_distributed(device: torch.device) -> None:
    """Make DeepSpeed use the process group that exists.

    Without a GPU it would otherwise compile a faster exchange between the processes of one machine, which only
    inference uses. That takes half a minute, and if it is killed, the lock that it leaves blocks every later run.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    # Without a GPU it finds the group only if the backend is named.
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)


def check_deepspeed(recipe: Recipe) -> None:
    """Raise RecipeError if DeepSpeed rejects the values for ZeRO in `scale.deepspeed`."""
    from deepspeed.runtime.zero.config import get_zero_config
    from pydantic import ValidationError

    try:
        get_zero_config(deepspeed_config(recipe, "fp32", 1, 1))
    except ValidationError as error:
        where = recipe.origin.where("scale.deepspeed.zero_optimization")
        found = [(".".join(map(str, each["loc"])), each["msg"], each["input"]) for each in error.errors()]
        raise RecipeError(
            Problem(f"DeepSpeed rejects zero_optimization.{key} = {value!r}: {why}", where, "correct or remove it")
            for key, why, value in found
        ) from error


@contextlib.contextmanager
def deferred_writes(model: Any) -> Iterator[list[Callable[[], None]]]:
    """Keep DeepSpeed's engine `model` from writing files while it saves; yield functions that write them later.

    Its workers wait for each other at the end of saving. A worker that cannot write would never come, and with a slow
    disk the others could wait too long.
    """
    later: list[Callable[[], None]] = []
    save, copy_script = model.checkpoint_engine.save, model._copy_recovery_script

    def write(state_dict: Any, path: str) -> None:
        try:
            save(state_dict, path)
        except RuntimeError as error:  # Raised by PyTorch if the disk is full.
            raise OSError(str(error)) from error

    model.checkpoint_engine.save = lambda state_dict, path: later.append(partial(write, state_dict, path))
    model._copy_recovery_script = lambda folder: later.append(partial(copy_script, folder))
    try:
        yield later
    finally:
        del model.checkpoint_engine.save, model._copy_recovery_script


def release_engine(model: Any) -> None:
    """Remove the hooks of DeepSpeed's engine `model` from its parameters, and DeepSpeed's own references to the model.

    The hooks on gradients refer to the engine, and so to its optimizer, as long as the parameters exist.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    model.destroy()
    # ZeRO-3 never removes a model from this list, nor modules whose forward pass raised an error.
    parameter_offload.FWD_MODULE_STACK.clear()
    # A cache of its own decorator holds the model's modules as arguments.
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


@contextlib.contextmanager
def restoring_linear() -> Iterator[None]:
    """Restore PyTorch's linear function afterwards, which ZeRO-3 replaces for the whole process."""
    before = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = before


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Provide a process group for DeepSpeed, which needs one even for a single worker in the calling process."""
    if dist.is_initialized():
        yield
        return
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(variables)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        import deepspeed

        # Unlike PyTorch's function, this one also clears the groups that DeepSpeed keeps.
        deepspeed.comm.destroy_process_group()
        for name in variables:
            os.environ.pop(name, None)
