"""Run the outline of a model, whose parameters have shapes but no values."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

EXPERTS = "batched_mm"
"""The implementation of experts whose shapes do not depend on what is routed to them, in any number format."""


def is_outline(model: Any) -> bool:
    """Whether a model was built on the meta device; some make a parameter elsewhere all the same."""
    return any(parameter.is_meta for parameter in model.parameters())


def run_outline(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Return what a model on the meta device makes of inputs: tensors without values.

    Where its code asks for values, it runs once more, on tensors that stand for those of a CPU: with these,
    transformers skips checks of values that change no result. Hooks are then called twice, in the same order.

    Raises:
        RuntimeError: the code depends on values.
    """
    try:
        return model(**{name: value.to(model.device) for name, value in inputs.items()})
    except RuntimeError:
        return _run_stand_ins(model, inputs)


def _run_stand_ins(model: Any, inputs: dict[str, Tensor]) -> Any:
    chosen, logger = model.config._experts_implementation, logging.getLogger(FakeTensorMode.__module__)
    level = logger.level
    model.config._experts_implementation = EXPERTS
    logger.setLevel(logging.CRITICAL)  # What it would log is raised as well.
    try:
        with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            named = [*model.named_parameters(), *model.named_buffers()]
            state = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in named}
            given = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in inputs.items()}
            return functional_call(model, state, (), given)
    finally:
        model.config._experts_implementation = chosen
        logger.setLevel(level)
