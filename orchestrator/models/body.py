"""The body of a model: what its source learned, without the head that a task puts on it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def find_body(model: Any) -> Any:
    """Return the module that holds the source's body: `base_model` of transformers, where there is one.

    In some classes `base_model_prefix` names no module of theirs, and `base_model` is the model itself (SigLIP, CLIP,
    Llama 4). Their body is then the one model inside; where there is none (HGNetV2), it is the model itself, and the
    head is inside it.
    """
    if model.base_model is not model:
        return model.base_model
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model
