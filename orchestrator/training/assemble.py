"""Build the parts of a training from a prepared recipe: model, head, frozen blocks, adapter, parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from orchestrator import models
from orchestrator.models import Blocks, Frozen
from orchestrator.training.prepare import Prepared
from orchestrator.transfer.layer_rates import parameter_groups, rate_multipliers


@dataclass
class Parts:
    """What an engine and the loop work with."""

    module: Any
    """The model, with head and adapter."""
    blocks: Blocks
    frozen: Frozen
    groups: list[dict[str, Any]]
    """Parameter groups for the optimizer."""
    head_is_new: bool
    """Whether the head's weights are random; otherwise the source's own head is tuned further."""

    def count_parameters(self) -> dict[str, int]:
        parameters = list(self.module.parameters())
        return {
            "total": sum(value.numel() for value in parameters),
            "trained": sum(value.numel() for value in parameters if value.requires_grad),
        }


def assemble(prepared: Prepared) -> Parts:
    """Build the parts; the same recipe and seed give the same weights on every worker.

    Raises:
        ModelError: the source model cannot be used as the recipe asks.
    """
    recipe, task = prepared.recipe, prepared.task
    seed = recipe.train.seed
    config = models.load_config(prepared.source, **task.config_changes())
    loaded = models.load_model(prepared, config, seed)
    module = loaded.model
    blocks = models.find_blocks(module, task.example_inputs(), loaded.new_parameters)
    frozen = models.freeze_blocks(module, blocks, models.resolve_depth(recipe.transfer.freeze, len(blocks.layers)))
    if recipe.transfer.adapter is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = models.add_adapter(module, blocks, recipe.transfer.adapter)
    if recipe.train.gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    groups = parameter_groups(
        dict(module.named_parameters()),
        rate_multipliers(module, blocks, recipe.transfer),
        recipe.train.learning_rate,
        recipe.train.weight_decay,
    )
    return Parts(module, blocks, frozen, groups, bool(loaded.new_parameters & set(blocks.head.parameters)))
