"""What happens to a loss: backward, summing over workers, clipping, the optimizer's step, saving and loading its state.

Two engines with the same shape, both built by Accelerate: plain PyTorch (DDP over several workers) and DeepSpeed
(ZeRO 0 to 3, with offload). They know nothing of tasks, epochs or metrics.

Losses come in as *this worker's share of the mean over the global batch*; the engine adds the shares up. Both DDP and
DeepSpeed average over workers instead, so the share is multiplied by their number on the way in.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.models import set_compute_dtype
from orchestrator.recipe import Recipe
from orchestrator.recipe.deepspeed_rules import OFFLOADS
from orchestrator.training.deepspeed_setup import (
    compile_nothing,
    deepspeed_config,
    free_engine,
    process_group,
    writing_later,
)
from orchestrator.training.devices import uses_gpu
from orchestrator.training.exchange import Exchange
from orchestrator.training.precision import Precision, dtype_of
from orchestrator.training.weight_formats import hold_frozen_in_bf16, may_narrow

_ACCELERATE_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEEPSPEED_ZERO_STAGE")

T = TypeVar("T")
TOKENS_PER_PASS_ON_CPU, TOKENS_PER_CAST_ON_CPU, TOKENS_PER_PASS_ON_GPU = 48, 192, 16_384


FormatOf = Callable[[str], torch.dtype]
"""Returns the number format that the value of this name is wanted in."""


def in_fp32(name: str) -> torch.dtype:
    return torch.float32


class Engine(ABC):
    """A model and its optimizer, spread over the workers."""

    model: Any
    """What to call with a batch."""
    optimizer: Any
    exchange: Exchange
    """How the workers tell each other what is no tensor."""
    float_type: torch.dtype | None = None
    """What floating inputs must be turned into, where the weights themselves are in another format."""
    autocasts = False
    """Whether each forward pass makes bf16 weights of fp32 ones."""
    rounds_weights = False
    """Whether weights are held in fewer digits than the source has, so that a model to keep is to be built anew."""

    def __init__(self, module: nn.Module, accelerator: Any) -> None:
        self.module = module
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.num_workers: int = accelerator.num_processes
        assert self.num_workers == (dist.get_world_size() if dist.is_initialized() else 1), "Accelerate missed workers"
        self.trained = {name: value for name, value in module.named_parameters() if value.requires_grad}

    @property
    def cost_of_pass(self) -> int:
        """As the function of this name."""
        return cost_of_pass(self.device.type, self.autocasts)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What trained modules learn without gradients; the engine may have put other tensors in their place."""
        return dict(trained_statistics(self.module))

    def narrow(self, recipe: Recipe, precision: Precision) -> None:
        """Hold frozen weights in the format that they are computed with, and have 4-bit weights multiplied in it."""
        set_compute_dtype(self.module, dtype_of(precision))
        if self.autocasts and may_narrow(recipe):
            # What lies under an adapter is not saved with it.
            self.rounds_weights = hold_frozen_in_bf16(self.module) and recipe.transfer.adapter is None

    @abstractmethod
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the model's forward pass, for parts of the model that are called without the rest."""

    @abstractmethod
    def in_pass(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return what the forward and the backward pass of a micro-batch are to be run inside.

        Gradients are summed over the workers in the `last` pass of a step, and where it can be avoided in no other.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's share of the loss."""

    @abstractmethod
    def step(self, rate_factor: float) -> float:
        """Clip, take the optimizer's step at `rate_factor` of each group's peak rate, clear the gradients.

        Returns the norm of the whole gradient before clipping.
        """

    @abstractmethod
    def write_state(self, folder: Path) -> None:
        """Write this worker's part of weights and optimizer; all workers call it."""

    @abstractmethod
    def read_state(self, folder: Path) -> None:
        """Read back what `write_state` wrote on the same number of workers."""

    @abstractmethod
    def trained_weights(self, format_of: FormatOf = in_fp32) -> dict[str, Tensor]:
        """Return all trained parameters, whole, and the statistics, on the CPU of worker 0; an empty dict elsewhere.

        All workers call it. One parameter after the other is put together, so that no worker but the first holds more
        than one of them.

        Args:
            format_of: returns the number format that a value is wanted in, given its name.
        """

    def close(self) -> None:
        """Free the gradients, and leave nothing behind that keeps the model and the optimizer from being freed."""
        self.module.zero_grad(set_to_none=True)

    def agree(self, trouble: str | None) -> str | None:
        """Wait for all workers; the first trouble that any of them had, on all of them."""
        return self.exchange.agree(trouble)

    def sum_over_workers(self, value: Tensor) -> Tensor:
        if self.num_workers > 1:
            dist.all_reduce(value)
        return value

    def from_first_worker(self, value: Any) -> Any:
        """Worker 0's value, on every worker."""
        return self.exchange.from_first(value)

    def first_worker_does(self, action: Callable[[], T]) -> T:
        """What `action` returns on worker 0, on every worker; an error that it raises there, on every worker too."""
        return self.exchange.first_does(action)

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, in the order of ranks, on worker 0; an empty list elsewhere."""
        return self.exchange.gather(value)

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


class TorchEngine(Engine):
    """PyTorch's own optimizer; DDP where there are several workers."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], recipe: Recipe, precision: Precision) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        has_statistics = any(True for _ in trained_statistics(module))
        kwargs = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True,
            broadcast_buffers=has_statistics,
            # Some models have parameters that their loss does not depend on, for which DDP would wait.
            find_unused_parameters=True,
        )
        accelerator = Accelerator(
            cpu=not uses_gpu(recipe),
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[kwargs],
        )
        super().__init__(module, accelerator)
        self.autocasts = precision == "bf16"
        self.max_grad_norm = recipe.train.max_grad_norm
        self.narrow(recipe, precision)
        module.to(self.device)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.model = accelerator.prepare_model(module)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def in_pass(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # DDP decides in the forward pass whether the backward pass will synchronize.
        context: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if last or self.num_workers == 1 else self.model.no_sync()
        )
        return context

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss * self.num_workers)

    def step(self, rate_factor: float) -> float:
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), limit)
        if torch.isfinite(norm):  # A broken gradient must not reach the weights; the loop ends the run.
            self._set_rates(rate_factor)
            self.optimizer.step()
        # DDP's gradients are views of its buckets. New ones would stand beside the buckets until they are synchronized.
        self.optimizer.zero_grad(set_to_none=self.num_workers == 1)
        return float(norm)

    def write_state(self, folder: Path) -> None:
        # Every worker holds the same state, so worker 0's is everybody's.
        if self.rank == 0:
            from safetensors.torch import save_file

            weights = {name: value.detach().contiguous() for name, value in self._state().items()}
            save_file(weights, folder / "weights.safetensors")
            save_file(self._named_optimizer_state(), folder / "optimizer.safetensors")

    def read_state(self, folder: Path) -> None:
        from safetensors.torch import load_file

        here = self._state()
        with torch.no_grad():
            for name, value in load_file(folder / "weights.safetensors", device=str(self.device)).items():
                here[name].copy_(value)
        # Adam's count of steps too: a fused step takes it from the device of the parameters alone.
        state = load_file(folder / "optimizer.safetensors", device=str(self.device))
        for joined, value in state.items():
            key, _, name = joined.partition(":")
            self.optimizer.state[self.trained[name]][key] = value

    def trained_weights(self, format_of: FormatOf = in_fp32) -> dict[str, Tensor]:
        if self.rank != 0:
            return {}
        return {name: on_cpu(value, format_of(name)) for name, value in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        return {**self.trained, **self.statistics}

    def _named_optimizer_state(self) -> dict[str, Tensor]:
        """Adam's tensors as `exp_avg:layer.weight`: names outlive the order of parameters."""
        return {
            f"{key}:{name}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }


class DeepSpeedEngine(Engine):
    """DeepSpeed through Accelerate: ZeRO stages 0 to 3, offload to main memory."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], recipe: Recipe, precision: Precision) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        trained = sum(getattr(value, "ds_numel", value.numel()) for group in groups for value in group["params"])
        config = deepspeed_config(recipe, precision, micro_batch_size(recipe), trained)
        compile_nothing()
        self.autocasts = config["torch_autocast"]["enabled"]
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        # Accelerate has DeepSpeed without a GPU see its process group only when the backend is named.
        backend = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
        accelerator = Accelerator(
            mixed_precision="bf16" if config["bf16"]["enabled"] else "no",
            deepspeed_plugin=plugin,
            kwargs_handlers=[backend],
        )
        super().__init__(module, accelerator)
        self.narrow(recipe, precision)
        is_offloaded = any(key in config["zero_optimization"] for key in OFFLOADS)
        optimizer = torch.optim.AdamW(groups, fused=not is_offloaded)
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        # Accelerate told transformers of ZeRO-3; a model loaded later, for the export, is not to be sharded.
        unset_hf_deepspeed_config()
        # Or spreads them over the workers.
        self.rounds_weights |= config["bf16"]["enabled"] or recipe.scale.zero_stage == 3
        # Without ZeRO, DeepSpeed leaves the gradients where PyTorch has them, and does not tell their norm.
        self.keeps_gradients = recipe.scale.zero_stage == 0
        # Accelerate steps inside its backward; here the step is the loop's to take, so DeepSpeed is driven directly.
        self.optimizer = optimizer
        self.float_type = torch.bfloat16 if config["bf16"]["enabled"] else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocasts else contextlib.nullcontext()

    def in_pass(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Stages 2 and 3 sum up gradients in every pass, because no worker keeps whole ones.
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self.num_workers, scale_wrt_gas=False)

    def step(self, rate_factor: float) -> float:
        self._set_rates(rate_factor)
        gradients = [value.grad for value in self.trained.values() if value.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if self.keeps_gradients else None
        self.model.step()
        return float(self.model.get_global_grad_norm() if norm is None else norm)

    def write_state(self, folder: Path) -> None:
        with writing_later(self.model) as files:
            self.model.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        for write in files:
            write()

    def read_state(self, folder: Path) -> None:
        # The optimizer's files are pickles: only folders whose manifest was checked come here.
        path, _ = self.model.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        assert path is not None, f"DeepSpeed found nothing in {folder}"

    def trained_weights(self, format_of: FormatOf = in_fp32) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.trained.items():
            # All workers take part in putting it together. Without ZeRO or bf16 there is no separate fp32 copy: the
            # parameter is it.
            whole = safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                weights[name] = on_cpu(parameter if whole is None else whole, format_of(name), copy=True)
        if self.rank == 0:
            weights |= {name: on_cpu(value, format_of(name)) for name, value in self.statistics.items()}
        return weights

    def close(self) -> None:
        free_engine(self.model)
        super().close()


def on_cpu(value: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Return a tensor on the CPU; floating-point values in `dtype`, or in fp32 where one is too large for `dtype`.

    Args:
        copy: make a copy even where the tensor is as wanted already.
    """
    wanted = dtype if value.is_floating_point() else value.dtype
    found = value.detach().to("cpu", wanted, copy=copy)
    is_too_large = wanted == torch.float16 and not found.isfinite().all()
    return value.detach().to("cpu", torch.float32, copy=copy) if is_too_large else found


def trained_statistics(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what trained modules learn without gradients, such as a batch norm's running mean."""
    for prefix, part in module.named_modules():
        if not any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            continue
        for name, value in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, value


def cost_of_pass(device: str, autocasts: bool) -> int:
    """What starting a pass through the model costs, in tokens that could be computed meanwhile.

    Autocast turns all weights into bf16 in every pass, and their gradients back.
    """
    if device == "cuda":
        return TOKENS_PER_PASS_ON_GPU
    return TOKENS_PER_CAST_ON_CPU if autocasts else TOKENS_PER_PASS_ON_CPU


def micro_batch_size(recipe: Recipe) -> int:
    """Examples per forward pass: as the recipe says, or a worker's whole share of the global batch up to 32."""
    if recipe.train.micro_batch_size != "auto":
        return recipe.train.micro_batch_size
    share = recipe.train.global_batch_size // recipe.scale.workers
    passes = -(-share // 32)
    return -(-share // passes)


def uses_deepspeed(recipe: Recipe) -> bool:
    if recipe.scale.engine == "auto":
        return recipe.scale.zero_stage > 0
    return recipe.scale.engine == "deepspeed"


@contextlib.contextmanager
def build_engine(
    module: nn.Module,
    groups: list[dict[str, Any]],
    recipe: Recipe,
    precision: Precision,
    exchange: Exchange | None = None,
) -> Iterator[Engine]:
    """The engine that the recipe asks for; on the way out, Accelerate's process-wide state is put back.

    Args:
        exchange: of all workers; None where this process is the only one.
    """
    from accelerate.state import AcceleratorState

    before = {name: os.environ.get(name) for name in _ACCELERATE_VARIABLES}
    AcceleratorState._reset_state(reset_partial_state=True)  # Somebody else's, from before, in another precision.
    engine_class = DeepSpeedEngine if uses_deepspeed(recipe) else TorchEngine
    with process_group() if uses_deepspeed(recipe) else contextlib.nullcontext():
        try:
            engine = engine_class(module, groups, recipe, precision)
            engine.exchange = exchange or Exchange()
            try:
                yield engine
            finally:
                engine.close()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
