"""What happens to a loss: backward, summing over workers, clipping, the optimizer's step, saving and loading its state.

Two engines with the same shape, both built by Accelerate: plain PyTorch (DDP over several workers) and DeepSpeed
(ZeRO 0 to 3, with offload). They know nothing of tasks, epochs or metrics.

Losses come in as *this worker's share of the mean over the global batch*; the engine adds the shares up. Both DDP and
DeepSpeed average over workers instead, so the share is multiplied by their number on the way in.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.distributed import Exchange
from orchestrator.models import set_compute_dtype
from orchestrator.recipe import Recipe
from orchestrator.training.engine.precision import Precision, dtype_of
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, may_cast_frozen
from orchestrator.transfer import TrainedPart

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
    has_whole_parts = True
    """Whether each worker's parts of trained parameters are whole ones, the same on all workers."""
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
        if self.autocasts and may_cast_frozen(recipe):
            # What lies under an adapter is not saved with it.
            self.rounds_weights = cast_frozen_to_bf16(self.module) and recipe.transfer.adapter is None

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
    def trained_parts(self) -> Iterator[TrainedPart]:
        """Return this worker's part of each trained parameter that has a gradient; between backward pass and step."""

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
