"""Run the outline of a model: its parameters have shapes but no values."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

EXPERTS = "batched_mm"
"""The implementation of experts whose shapes do not depend on the routing, in any dtype."""


def is_outline(model: Any) -> bool:
    """Whether a model was built on the meta device, perhaps with some parameters elsewhere."""
    return any(parameter.is_meta for parameter in model.parameters())


def run_outline(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Return the output of a model on the meta device: tensors without values.

    If its code needs values, it runs again with fake tensors of a CPU, for which transformers skips checks of values
    that do not change the result. Hooks are then called twice, in the same order.

    Raises:
        RuntimeError: the code depends on values.
    """
    try:
        return model(**{name: value.to(model.device) for name, value in inputs.items()})
    except RuntimeError:
        return _run_fake_tensors(model, inputs)


def _run_fake_tensors(model: Any, inputs: dict[str, Tensor]) -> Any:
    chosen, logger = model.config._experts_implementation, logging.getLogger(FakeTensorMode.__module__)
    level = logger.level
    model.config._experts_implementation = EXPERTS
    logger.setLevel(logging.CRITICAL)  # It also raises what it would log.
    try:
        with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            named = [*model.named_parameters(), *model.named_buffers()]
            state = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in named}
            given = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in inputs.items()}
            return functional_call(model, state, (), given)
    finally:
        model.config._experts_implementation = chosen
        logger.setLevel(level)
