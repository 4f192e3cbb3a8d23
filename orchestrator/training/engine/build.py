"""Build the engine that a recipe asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from orchestrator.distributed import Exchange
from orchestrator.recipe import Recipe
from orchestrator.training.engine.base import Engine
from orchestrator.training.engine.deepspeed import DeepSpeedEngine
from orchestrator.training.engine.deepspeed_config import process_group
from orchestrator.training.engine.devices import choose_device
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.settings import uses_deepspeed
from orchestrator.training.engine.torch import TorchEngine


@contextlib.contextmanager
def build_engine(
    module: nn.Module,
    groups: list[dict[str, Any]],
    recipe: Recipe,
    precision: Precision,
    exchange: Exchange | None = None,
) -> Iterator[Engine]:
    """Yield the engine that the recipe asks for, and close it afterwards.

    Args:
        groups: parameter groups of the optimizer.
        exchange: of all workers; None where this process is the only one.
    """
    device, exchange = choose_device(recipe), exchange or Exchange()
    engine_class = DeepSpeedEngine if uses_deepspeed(recipe) else TorchEngine
    with process_group() if uses_deepspeed(recipe) else contextlib.nullcontext():
        engine = engine_class(module, groups, recipe, precision, device, exchange)
        try:
            yield engine
        finally:
            engine.close()
