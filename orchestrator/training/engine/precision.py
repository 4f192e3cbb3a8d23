"""The precision of matrix products that the hardware supports."""

from __future__ import annotations

from typing import Literal

import torch

from orchestrator.errors import ModelError, Problem
from orchestrator.recipe import Recipe

Precision = Literal["fp32", "bf16"]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: GPUs from Ampere on, AMX, AVX512-BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype that matrix products are computed in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_precision(recipe: Recipe, has_bf16: bool) -> Precision:
    """Return the precision that the recipe asks for on hardware that computes bf16, or does not."""
    if recipe.train.precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return recipe.train.precision


def choose_precision(recipe: Recipe, device: torch.device) -> Precision:
    """Return the precision to train in on this device.

    Raises:
        ModelError: the recipe asks for bf16, and the hardware lacks it.
    """
    has_it = has_bf16(device)
    precision = resolve_precision(recipe, has_it)
    if precision == "bf16" and not has_it:
        raise ModelError(
            Problem(
                f"precision is bf16, which this {device.type} does not compute in hardware",
                recipe.origin.where("train.precision"),
                "set train.precision to auto or fp32",
            )
        )
    return precision
