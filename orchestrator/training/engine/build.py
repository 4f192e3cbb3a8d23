"""Build the engine that a recipe asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from orchestrator.distributed import Exchange
from orchestrator.recipe import Recipe
from orchestrator.training.engine.base import Engine
from orchestrator.training.engine.deepspeed import DeepSpeedEngine
from orchestrator.training.engine.deepspeed_config import (
    process_group,
)
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.settings import uses_deepspeed
from orchestrator.training.engine.torch import TorchEngine

_ACCELERATE_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


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
