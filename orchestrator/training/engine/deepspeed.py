"""The engine of DeepSpeed: ZeRO 0 to 3, with offload."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.recipe import Recipe
from orchestrator.recipe.deepspeed_rules import OFFLOADS
from orchestrator.training.engine.base import Engine, FormatOf, in_fp32, on_cpu
from orchestrator.training.engine.deepspeed_config import (
    compile_nothing,
    deepspeed_config,
    free_engine,
    writing_later,
)
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.transfer import TrainedPart


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
        self.has_whole_parts = recipe.scale.zero_stage == 0
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

    def trained_parts(self) -> Iterator[TrainedPart]:
        # Recipes with methods that add to gradients have neither stage 3 nor offload.
        for name, value in self.trained.items():
            if value.grad is not None and self.has_whole_parts:
                yield TrainedPart(name, value, value.grad)
            elif not self.has_whole_parts and (part := zero_part(name, value)) is not None:
                yield part

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
