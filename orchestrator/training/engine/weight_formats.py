"""The number formats that weights are held in while a model is trained in bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orchestrator.recipe import Recipe
from orchestrator.training.engine.precision import Precision

# Autocast turns the weights of these into bf16 in every pass.
_MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)


def may_cast_frozen(recipe: Recipe) -> bool:
    """Whether frozen weights may be held in bf16: DoRA computes with the weights themselves."""
    adapter = recipe.transfer.adapter
    return adapter is None or adapter.variant != "dora"


def may_load_as_stored(recipe: Recipe, precision: Precision) -> bool:
    """Whether a source's bf16 weights may stay so when it is loaded: nothing is to be added to them in fp32 first."""
    adapter = recipe.transfer.adapter
    begins_as_stored = adapter is None or (adapter.init == "zero" and adapter.quantize is None)
    return precision == "bf16" and may_cast_frozen(recipe) and begins_as_stored


def is_exact_in_bf16(weight: Tensor) -> bool:
    """Whether a weight is the same in bf16."""
    return weight.dtype == torch.bfloat16 or torch.equal(weight.data.bfloat16().float(), weight.data)


def cast_frozen_to_bf16(module: nn.Module, is_exact_in_bf16: Callable[[Tensor], bool] = is_exact_in_bf16) -> bool:
    """Hold the frozen weights of matrix products in bf16: half the memory, and nothing to convert in each pass.

    For a model that runs under autocast; what it computes stays the same to the bit. So embeddings follow only where
    nothing is lost, as in models that were stored in bf16. Trained weights, norms and the rest are in fp32 afterwards,
    also where the model was loaded in bf16.

    Args:
        survives: whether a weight is the same in bf16, for weights without values.

    Returns:
        Whether digits of any weight were lost.
    """
    is_rounded = False
    narrow: dict[int, bool] = {}
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            multiplies = isinstance(part, _MULTIPLYING) and not weight.requires_grad
            fits = multiplies or (type(part) is nn.Embedding and not weight.requires_grad and is_exact_in_bf16(weight))
            narrow[id(weight)] = narrow.get(id(weight), True) and fits
    any_narrow = any(narrow.values())
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if narrow[id(weight)] and weight.dtype == torch.float32:
                is_rounded = is_rounded or not is_exact_in_bf16(weight)
                weight.data = weight.data.bfloat16()
            elif weight.dtype == torch.bfloat16 and not narrow[id(weight)]:
                weight.data = weight.data.float()
            elif any_narrow and weight.dtype == torch.float32 and not weight.is_meta:
                # Weights are pieces of the file that they were read from, which would stay in memory for a norm.
                weight.data = weight.data.clone()
        if type(part) is nn.Embedding and part.weight.dtype == torch.bfloat16:
            part.register_forward_hook(_widen)
    return is_rounded


def _widen(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # What the layers add to stays in fp32.
    return output.float()
