"""The engine of PyTorch: AdamW, and DDP with several workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.distributed import Exchange
from orchestrator.models.shortcuts.forward import wrap_forward
from orchestrator.recipe import Recipe
from orchestrator.training.engine.base import DtypeOf, Engine, in_fp32, on_cpu, trained_statistics
from orchestrator.training.engine.precision import Precision
from orchestrator.transfer import TrainedPart


class TorchEngine(Engine):
    """PyTorch's AdamW; `DistributedDataParallel` with several workers."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        recipe: Recipe,
        precision: Precision,
        device: torch.device,
        exchange: Exchange,
    ) -> None:
        super().__init__(module, device, exchange)
        self.autocasts = precision == "bf16"
        self.max_grad_norm = recipe.train.max_grad_norm
        self.cast_weights(recipe, precision)
        module.to(device)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self._unwrap = wrap_forward(module, self._run_under_autocast) if self.autocasts else None
        self.model = self._distribute(module) if self.num_workers > 1 else module

    def _distribute(self, module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=any(True for _ in trained_statistics(module)),
            # Some models have parameters that their loss does not depend on, for which DDP would wait.
            find_unused_parameters=True,
        )

    def _run_under_autocast(self, _: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the model's forward function; return its output with bf16 tensors in fp32, which losses need."""
        with self.autocast():
            output = original(*args, **kwargs)
        if isinstance(output, Tensor):
            return _to_fp32(output)
        return type(output)(**{name: _to_fp32(value) for name, value in output.items()})

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.num_workers == 1:
            return contextlib.nullcontext()
        # DDP decides in the forward pass whether the backward pass will synchronize.
        context: contextlib.AbstractContextManager[Any] = self.model.no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss * self.num_workers)

    def step(self, rate_factor: float) -> float:
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), limit)
        if torch.isfinite(norm):  # Otherwise the loop ends the run, and weights keep their values.
            self._set_rates(rate_factor)
            self.optimizer.step()
        # DDP's gradients are views of its buckets. New ones would take memory besides the buckets until the next sum.
        self.optimizer.zero_grad(set_to_none=self.num_workers == 1)
        return float(norm)

    def trained_parts(self) -> Iterator[TrainedPart]:
        for name, value in self.trained.items():
            if value.grad is not None:
                yield TrainedPart(name, value, value.grad)

    def write_state(self, folder: Path) -> None:
        # All workers hold the same state.
        if self.rank == 0:
            from safetensors.torch import save_file

            weights = {name: value.detach().contiguous() for name, value in self._state().items()}
            save_file(weights, folder / "weights.safetensors")
            save_file(self._named_optimizer_state(), folder / "optimizer.safetensors")

    def read_state(self, folder: Path) -> None:
        from safetensors.torch import load_file

        current = self._state()
        with torch.no_grad():
            for name, value in load_file(folder / "weights.safetensors", device=str(self.device)).items():
                current[name].copy_(value)
        # Adam's count of steps too: a fused step expects it on the device of the parameters.
        state = load_file(folder / "optimizer.safetensors", device=str(self.device))
        for joined, value in state.items():
            key, _, name = joined.partition(":")
            self.optimizer.state[self.trained[name]][key] = value

    def trained_weights(self, dtype_for: DtypeOf = in_fp32) -> dict[str, Tensor]:
        if self.rank != 0:
            return {}
        return {name: on_cpu(value, dtype_for(name)) for name, value in self._state().items()}

    def close(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
        super().close()

    def _state(self) -> dict[str, Tensor]:
        return {**self.trained, **self.statistics}

    def _named_optimizer_state(self) -> dict[str, Tensor]:
        """Return Adam's tensors by names like `exp_avg:layer.weight`; the order of parameters does not matter then."""
        return {
            f"{key}:{name}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
