"""The dtypes of weights while a model is trained in bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orchestrator.recipe import Recipe
from orchestrator.training.engine.precision import Precision

# Autocast converts the weights of these to bf16 in every pass.
_MATRIX_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)


def may_cast_frozen(recipe: Recipe) -> bool:
    """Whether frozen weights may be cast to bf16: DoRA computes with the weights themselves."""
    adapter = recipe.transfer.adapter
    return adapter is None or adapter.variant != "dora"


def may_load_as_stored(recipe: Recipe, precision: Precision) -> bool:
    """Whether a source's bf16 weights may be loaded as bf16: nothing has to be added to them in fp32 first."""
    adapter = recipe.transfer.adapter
    keeps_weights = adapter is None or (adapter.init == "zero" and adapter.quantize is None)
    return precision == "bf16" and may_cast_frozen(recipe) and keeps_weights


def is_exact_in_bf16(weight: Tensor) -> bool:
    """Whether a weight is the same in bf16."""
    return weight.dtype == torch.bfloat16 or torch.equal(weight.data.bfloat16().float(), weight.data)


def cast_frozen_to_bf16(module: nn.Module, is_exact_in_bf16: Callable[[Tensor], bool] = is_exact_in_bf16) -> bool:
    """Cast the frozen weights of matrix products to bf16: half the memory, and no conversion in each pass.

    The model has to run under autocast; its outputs stay the same to the bit. Therefore embeddings are cast only if
    their values are exact in bf16, as in models that were stored in bf16. Trained weights, norms and all others are in
    fp32 afterwards, even if the model was loaded in bf16.

    Args:
        is_exact_in_bf16: whether a weight is the same in bf16; another function serves weights without values.

    Returns:
        Whether any weight was rounded.
    """
    is_rounded = False
    casts: dict[int, bool] = {}
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            multiplies = isinstance(part, _MATRIX_MODULES) and not weight.requires_grad
            fits = multiplies or (type(part) is nn.Embedding and not weight.requires_grad and is_exact_in_bf16(weight))
            casts[id(weight)] = casts.get(id(weight), True) and fits
    any_cast = any(casts.values())
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if casts[id(weight)] and weight.dtype == torch.float32:
                is_rounded = is_rounded or not is_exact_in_bf16(weight)
                weight.data = weight.data.bfloat16()
            elif weight.dtype == torch.bfloat16 and not casts[id(weight)]:
                weight.data = weight.data.float()
            elif any_cast and weight.dtype == torch.float32 and not weight.is_meta:
                # Weights are views of the file that they were read from, which a norm would keep in memory.
                weight.data = weight.data.clone()
        if type(part) is nn.Embedding and part.weight.dtype == torch.bfloat16:
            part.register_forward_hook(_output_to_fp32)
    return is_rounded


def _output_to_fp32(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # The residual stream stays in fp32.
    return output.float()
