"""Linear weights in 4 bits, through bitsandbytes (Dettmers et al. 2023, "QLoRA")."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from torch import nn

from orchestrator.errors import ModelError, Problem


def check_quantization(where: str) -> None:
    """Raise ModelError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        what = "4-bit weights need the package bitsandbytes, which is not installed"
        raise ModelError(Problem(what, where, "pip install 'transfer-orchestrator[quant]'"))


def quantization(format_name: str, outline: Any) -> dict[str, Any]:
    """Arguments for `from_pretrained`: every linear weight of the body becomes so many bits.

    Args:
        outline: the model without weights. What is outside its body, the head, stays whole: it may be trained.
    """
    from transformers import BitsAndBytesConfig

    body = {module for module in outline.base_model.modules()}
    head = [name for name, module in outline.named_modules() if isinstance(module, nn.Linear) and module not in body]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format_name,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=head,
    )
    return {"quantization_config": config}


def keep_quantized_weights(model: nn.Module) -> None:
    """Have 4-bit weights stay as they are: on some CPUs bitsandbytes rounds their scales to bf16 when it first computes
    without gradients, and a model that was evaluated would learn otherwise than one that was not.
    """
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False


def quantized_layers(model: nn.Module) -> Iterator[Any]:
    """The layers whose weights are quantized."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        yield from (module for module in model.modules() if isinstance(module, Linear4bit))
