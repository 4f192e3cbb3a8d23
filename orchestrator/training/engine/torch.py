"""The engine of plain PyTorch: AdamW, and DDP where there are several workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.recipe import Recipe
from orchestrator.training.engine.base import Engine, FormatOf, in_fp32, on_cpu, trained_statistics
from orchestrator.training.engine.devices import uses_gpu
from orchestrator.training.engine.precision import Precision
from orchestrator.transfer import TrainedPart


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

    def trained_parts(self) -> Iterator[TrainedPart]:
        for name, value in self.trained.items():
            if value.grad is not None:
                yield TrainedPart(name, value, value.grad)

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
