"""The body of a model: what its source learned, without the head that a task puts on it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def find_body(model: Any) -> nn.Module:
    """Return the module that holds the source's body: `base_model` of transformers, where there is one.

    In some classes `base_model_prefix` names no module of theirs, and `base_model` is the model itself (SigLIP, CLIP,
    Llama 4). Their body is then the one model inside; where there is none (HGNetV2), it is the model itself, and the
    head is inside it.
    """
    body: nn.Module = model.base_model
    if body is not model:
        return body
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else body
