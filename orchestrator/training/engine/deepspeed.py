"""The engine of DeepSpeed: ZeRO stages 0 to 3, with offload to main memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.distributed import Exchange
from orchestrator.recipe import Recipe
from orchestrator.recipe.deepspeed_rules import OFFLOADS
from orchestrator.training.engine.base import DtypeOf, Engine, in_fp32, on_cpu
from orchestrator.training.engine.deepspeed_config import (
    deepspeed_config,
    deferred_writes,
    init_distributed,
    release_engine,
)
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.transfer import TrainedPart


class DeepSpeedEngine(Engine):
    """`deepspeed.DeepSpeedEngine`, with PyTorch's AdamW."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        recipe: Recipe,
        precision: Precision,
        device: torch.device,
        exchange: Exchange,
    ) -> None:
        import deepspeed

        super().__init__(module, device, exchange)
        trained = sum(getattr(value, "ds_numel", value.numel()) for group in groups for value in group["params"])
        config = deepspeed_config(recipe, precision, micro_batch_size(recipe), trained)
        self.autocasts = config["torch_autocast"]["enabled"]
        self.cast_weights(recipe, precision)
        is_offloaded = any(key in config["zero_optimization"] for key in OFFLOADS)
        self.optimizer = torch.optim.AdamW(groups, fused=not is_offloaded)
        init_distributed(device)
        self.model, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        # Sharded weights cannot be exported from the model either.
        self.rounds_weights |= config["bf16"]["enabled"] or recipe.scale.zero_stage == 3
        self.has_whole_parts = recipe.scale.zero_stage == 0
        # Without ZeRO, DeepSpeed leaves gradients in the parameters, and does not compute their norm.
        self.keeps_gradients = recipe.scale.zero_stage == 0
        self.input_dtype = torch.bfloat16 if config["bf16"]["enabled"] else None

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Stages 2 and 3 sum gradients in every pass, because no worker keeps all of them.
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

    def trained_parts(self) -> Iterator[TrainedPart]:
        # Recipes with methods that add to gradients have neither stage 3 nor offload.
        for name, value in self.trained.items():
            if value.grad is not None and self.has_whole_parts:
                yield TrainedPart(name, value, value.grad)
            elif not self.has_whole_parts and (part := zero_part(name, value)) is not None:
                yield part

    def write_state(self, folder: Path) -> None:
        with deferred_writes(self.model) as files:
            self.model.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        for write in files:
            write()

    def read_state(self, folder: Path) -> None:
        # The optimizer's files are pickles. Only folders whose manifest was checked are read.
        path, _ = self.model.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        assert path is not None, f"DeepSpeed found nothing in {folder}"

    def trained_weights(self, dtype_for: DtypeOf = in_fp32) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.trained.items():
            # All workers take part in gathering it. Without ZeRO or bf16 there is no fp32 copy besides the parameter.
            gathered = safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                weights[name] = on_cpu(parameter if gathered is None else gathered, dtype_for(name), copy=True)
        if self.rank == 0:
            weights |= {name: on_cpu(value, dtype_for(name)) for name, value in self.statistics.items()}
        return weights

    def close(self) -> None:
        release_engine(self.model)
        super().close()


def zero_part(name: str, parameter: Any) -> TrainedPart | None:
    """Return the part of a parameter whose optimizer state this worker holds under ZeRO 1 or 2; None for no part.

    DeepSpeed has a function for the whole gradient alone (`safe_get_full_grad`), which asks all workers for theirs.
    """
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    place = fragment.lp_fragment_address
    gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group)
    assert gradient.numel() == place.numel, f"DeepSpeed holds {gradient.numel()} gradients of {place.numel} in {name}"
    return TrainedPart(name, fragment.hp_fragment.flatten(), gradient.view(-1), place.start)
