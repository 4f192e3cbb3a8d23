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


def choose_precision(recipe: Recipe, device: torch.device) -> Precision:
    """Return the precision that a recipe asks for, with `auto` resolved for the device.

    Raises:
        ModelError: the recipe asks for bf16, which the hardware does not support.
    """
    wanted = recipe.train.precision
    if wanted == "fp32" or (wanted == "auto" and not has_bf16(device)):
        return "fp32"
    if not has_bf16(device):
        raise ModelError(
            Problem(
                f"precision is bf16, which this {device.type} does not compute in hardware",
                recipe.origin.where("train.precision"),
                "set train.precision to auto or fp32",
            )
        )
    return "bf16"
