"""Linear weights in 4 bits, through bitsandbytes (Dettmers et al. 2023, "QLoRA")."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from orchestrator.errors import ModelError, Problem
from orchestrator.models.folder import MERGE
from orchestrator.models.head import head_modules
from orchestrator.models.source import SourceModel


def check_quantization(source: SourceModel, where: str) -> None:
    """Raise ModelError if bitsandbytes is not installed, or the source is an adapter."""
    if source.adapter is not None:
        what = f"{source.name!r} is an adapter, whose sum with its model 4 bits cannot hold"
        raise ModelError(Problem(what, where, MERGE))
    if find_spec("bitsandbytes") is None:
        what = "4-bit weights need the package bitsandbytes, which is not installed"
        raise ModelError(Problem(what, where, "pip install 'transfer-orchestrator[quant]'"))


def quantization(format_name: str, whole: list[str]) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that quantize all linear weights but those of the layers `whole`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format_name,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=whole,
    )
    return {"quantization_config": config}


def layers_outside_body(model: Any) -> list[str]:
    """Return the names of the linear layers of the head, which may be trained."""
    return [name for name, module in head_modules(model) if isinstance(module, nn.Linear)]


def keep_quantized_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from changing 4-bit weights: on some CPUs it rounds their scales to bf16 when it first computes
    without gradients, and a model that was evaluated would then learn differently from one that was not.
    """
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype of products with 4-bit weights. By default it is fp32, whatever the dtype of their inputs."""
    for layer in quantized_layers(model).values():
        layer.compute_dtype = dtype


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose weights are quantized, by name."""
    if "bitsandbytes" not in sys.modules:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
