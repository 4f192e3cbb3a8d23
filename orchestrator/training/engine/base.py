"""The interface of engines: backward passes, gradients summed over workers, clipping, optimizer steps, their state.

There are two engines: PyTorch (DDP with several workers) and DeepSpeed (ZeRO 0 to 3, with offload). They know nothing
of tasks, epochs or metrics.

A loss is *this worker's share of the mean over the global batch*, and the engine adds up the shares of all workers. DDP
and DeepSpeed average over workers instead, so the engine multiplies each share by the number of workers.
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


DtypeOf = Callable[[str], torch.dtype]
"""Returns the dtype to convert a value to, given its name."""


def in_fp32(name: str) -> torch.dtype:
    """Return fp32 for every name, as a `DtypeOf`."""
    return torch.float32


class Engine(ABC):
    """A model and its optimizer, on all workers."""

    model: Any
    """The model to call with a batch; it may wrap `module`."""
    optimizer: Any
    input_dtype: torch.dtype | None = None
    """The dtype that floating-point inputs must have; None where they need no conversion."""
    autocasts = False
    """Whether each forward pass converts fp32 weights to bf16."""
    has_whole_parts = True
    """Whether each worker's parts of trained parameters are whole ones, the same on all workers."""
    rounds_weights = False
    """Whether weights have fewer digits than those of the source, so that the export must load the source again."""

    def __init__(self, module: nn.Module, device: torch.device, exchange: Exchange) -> None:
        self.module = module
        self.device = device
        self.exchange = exchange
        self.rank = exchange.rank
        self.num_workers = exchange.size
        self.trained = {name: value for name, value in module.named_parameters() if value.requires_grad}

    @property
    def cost_of_pass(self) -> int:
        """Return what `cost_of_pass` returns for this engine."""
        return cost_of_pass(self.device.type, self.autocasts)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Return the values that trained modules learn without gradients. The engine may replace these tensors."""
        return dict(trained_statistics(self.module))

    def cast_weights(self, recipe: Recipe, precision: Precision) -> None:
        """Cast frozen weights to the dtype that they are used in, and set it for products with 4-bit weights."""
        set_compute_dtype(self.module, dtype_of(precision))
        if self.autocasts and may_cast_frozen(recipe):
            # An adapter is saved without the weights below it.
            self.rounds_weights = cast_frozen_to_bf16(self.module) and recipe.transfer.adapter is None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the model's forward pass, for calls of its modules alone."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocasts else contextlib.nullcontext()

    @abstractmethod
    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context for the forward and backward pass of a micro batch.

        Gradients are summed over the workers in the `last` pass of a step, and in no other unless the engine must.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's share of the loss."""

    @abstractmethod
    def step(self, rate_factor: float) -> float:
        """Clip gradients, take the optimizer's step at `rate_factor` of each group's peak rate, and clear gradients.

        Returns the norm of the whole gradient before clipping.
        """

    @abstractmethod
    def trained_parts(self) -> Iterator[TrainedPart]:
        """Return this worker's part of each trained parameter that has a gradient; between backward pass and step."""

    @abstractmethod
    def write_state(self, folder: Path) -> None:
        """Write this worker's part of the weights and the optimizer state. All workers call it."""

    @abstractmethod
    def read_state(self, folder: Path) -> None:
        """Read the files that `write_state` wrote with the same number of workers."""

    @abstractmethod
    def trained_weights(self, dtype_for: DtypeOf = in_fp32) -> dict[str, Tensor]:
        """Return all trained parameters, unsharded, and the statistics, on the CPU of worker 0; {} on other workers.

        All workers call it. Parameters are gathered one after the other, so that only worker 0 holds more than one.

        Args:
            dtype_for: returns the dtype to convert a value to, given its name.
        """

    def close(self) -> None:
        """Free the gradients, and drop every reference that would keep the model and the optimizer in memory."""
        self.module.zero_grad(set_to_none=True)

    def agree(self, trouble: str | None) -> str | None:
        """Wait for all workers, and return the first trouble that any of them has, on all of them."""
        return self.exchange.agree(trouble)

    def sum_over_workers(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all workers, in place."""
        if self.num_workers > 1:
            dist.all_reduce(value)
        return value

    def broadcast_from_first(self, value: Any) -> Any:
        """Return worker 0's value on every worker."""
        return self.exchange.broadcast(value)

    def run_on_first_worker(self, action: Callable[[], T]) -> T:
        """Run `action` on worker 0, and return its result, or raise its error, on every worker."""
        return self.exchange.run_on_first(action)

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, in the order of ranks, on worker 0; [] on other workers."""
        return self.exchange.gather(value)

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def on_cpu(value: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Return a tensor on the CPU; floating-point values in `dtype`, or in fp32 if `dtype` cannot hold one.

    Args:
        copy: copy the tensor even if it is on the CPU in that dtype.
    """
    wanted = dtype if value.is_floating_point() else value.dtype
    found = value.detach().to("cpu", wanted, copy=copy)
    is_too_large = wanted == torch.float16 and not found.isfinite().all()
    return value.detach().to("cpu", torch.float32, copy=copy) if is_too_large else found


def trained_statistics(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of what trained modules learn without gradients, such as a batch norm's running mean."""
    for prefix, part in module.named_modules():
        if not any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            continue
        for name, value in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, value


def cost_of_pass(device: str, autocasts: bool) -> int:
    """Return the fixed cost of a pass through the model, in tokens that could be computed in the same time.

    Autocast converts all weights to bf16 in every pass, and their gradients back.
    """
    if device == "cuda":
        return TOKENS_PER_PASS_ON_GPU
    return TOKENS_PER_CAST_ON_CPU if autocasts else TOKENS_PER_PASS_ON_CPU
