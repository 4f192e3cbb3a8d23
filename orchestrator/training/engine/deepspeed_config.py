"""What DeepSpeed is told, and what it must not leave behind in the process."""

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
    """DeepSpeed's configuration as the recipe implies it (keys: "Configuration JSON" in its documentation).

    Args:
        trained: numbers that are trained.
    """
    # It has the whole bucket from the beginning: 1 GB in bf16, also for a small adapter.
    bucket = min(BUCKET, max(1, trained))
    zero: dict[str, Any] = {"stage": recipe.scale.zero_stage, "reduce_bucket_size": bucket}
    if recipe.scale.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if recipe.scale.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    if recipe.scale.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    given = without_auto(recipe.scale.deepspeed or {})
    # What of it the recipe says too is refused when the recipe is read.
    zero |= given.get("zero_optimization", {})
    workers = recipe.scale.workers
    accumulation = -(-recipe.train.global_batch_size // (micro_batch * workers))
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * workers,
        "gradient_clipping": recipe.train.max_grad_norm or 0.0,
        # ZeRO keeps an fp32 copy of bf16 weights; without ZeRO there would be none, so the weights stay fp32.
        "bf16": {"enabled": precision == "bf16" and recipe.scale.zero_stage > 0},
        "torch_autocast": {"enabled": precision == "bf16" and recipe.scale.zero_stage == 0, "dtype": "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # PyTorch's AdamW wherever the optimizer runs: DeepSpeed's own for the CPU has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **{key: value for key, value in given.items() if key != "zero_optimization"},
    }


def disable_op_compilation() -> None:
    """Keep DeepSpeed from compiling a faster exchange between processes on one CPU, which only inference uses.

    It takes half a minute, and where it is killed meanwhile it leaves a lock at which every later run waits for ever.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def check_deepspeed(recipe: Recipe) -> None:
    """Raise RecipeError where DeepSpeed does not take what the recipe says about ZeRO in `scale.deepspeed`."""
    from deepspeed.runtime.zero.config import get_zero_config
    from pydantic import ValidationError

    try:
        get_zero_config(deepspeed_config(recipe, "fp32", 1, 1))
    except ValidationError as error:
        where = recipe.origin.where("scale.deepspeed.zero_optimization")
        found = [(".".join(map(str, each["loc"])), each["msg"], each["input"]) for each in error.errors()]
        raise RecipeError(
            Problem(f"DeepSpeed does not take zero_optimization.{key} = {value!r}: {why}", where, "mend or remove it")
            for key, why, value in found
        ) from error


@contextlib.contextmanager
def deferred_writes(model: Any) -> Iterator[list[Callable[[], None]]]:
    """Have DeepSpeed's engine `model` write no file while it saves; yields what is to be called to write them.

    Its workers wait for each other at the end of saving. There a worker that cannot write would be missing, and a slow
    disk could take longer than the others may wait.
    """
    later: list[Callable[[], None]] = []
    save, copy_script = model.checkpoint_engine.save, model._copy_recovery_script

    def write(state_dict: Any, path: str) -> None:
        try:
            save(state_dict, path)
        except RuntimeError as error:  # What PyTorch raises where a disk is full.
            raise OSError(str(error)) from error

    model.checkpoint_engine.save = lambda state_dict, path: later.append(partial(write, state_dict, path))
    model._copy_recovery_script = lambda folder: later.append(partial(copy_script, folder))
    try:
        yield later
    finally:
        del model.checkpoint_engine.save, model._copy_recovery_script


def release_engine(model: Any) -> None:
    """Remove from a model what DeepSpeed's engine `model` has hung on it, and DeepSpeed's own references to the model.

    The hooks on the parameters' gradients hold the engine, and so its optimizer, for as long as the parameters live.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    model.destroy()
    # ZeRO-3 never takes a model off this list, nor the modules that an error found in their forward pass.
    parameter_offload.FWD_MODULE_STACK.clear()
    # It caches a method, which holds the model's modules as arguments, under a decorator of its own.
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


@contextlib.contextmanager
def restoring_linear() -> Iterator[None]:
    """On the way out, PyTorch's linear function: ZeRO-3 puts its own in that place, where it would stay for good."""
    before = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = before


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group for DeepSpeed, which wants one even for a single worker in the calling process."""
    if dist.is_initialized():
        yield
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        import deepspeed

        # DeepSpeed's own function: it also forgets the groups that it keeps per process.
        deepspeed.comm.destroy_process_group()
        for name in alone:
            os.environ.pop(name, None)
