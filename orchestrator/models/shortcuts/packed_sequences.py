"""Attention for sequences that are packed into one row, without padding: each sequence attends to itself alone.

A mask over the whole row would give the same, but cost grows with the square of the row. Here it grows with the sum of
the squares of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from orchestrator.models.shortcuts.forward import wrap_forward

NAME = "texts_in_a_row"
OWN = "sdpa"
LENGTHS = "text_lengths"
"""The input that holds the length of each sequence in the row; shape [sequences]."""
SPARSE = ("indices", "block_indices")
"""The arguments that hold the tokens, or blocks of tokens, that each token attends to in sparse attention."""
PLACEHOLDER = (1, 1, 1, 1)
"""The shape of the mask that is passed together with lengths."""


def attend_within_sequences(model: Any) -> None:
    """Make a model accept `text_lengths` if its attention implementation is `sdpa`; otherwise leave it unchanged.

    In calls without `text_lengths` the implementation is still called `sdpa`, because some models compute differently
    under any other name.
    """
    both = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    configs = [config for config in both if config._attn_implementation == OWN]
    # Other models never look up their attention function by its name.
    if not configs or not model._supports_attention_backend:
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)

    def choose_attention(_: Any, original: Callable[..., Any], args: Any, inputs: dict[str, Any]) -> Any:
        # Set until the next pass: gradient checkpointing computes layers again during the backward pass.
        for config in configs:
            config._attn_implementation = NAME if LENGTHS in inputs else OWN
        return original(*args, **inputs)

    wrap_forward(model, choose_attention)
    model.takes_packed_sequences = True


def takes_packed_sequences(model: Any) -> bool:
    """Whether `attend_within_sequences` has changed the model."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(whole, "takes_packed_sequences", False))


def prepare_lengths(inputs: dict[str, Any]) -> None:
    """Replace the tensor `text_lengths`, if inputs hold one, with a list, and add the mask that goes with it."""
    if LENGTHS in inputs:
        # Copied from the device once, not in every layer.
        inputs[LENGTHS] = inputs[LENGTHS].tolist()
        # transformers builds no mask where the caller passes one of four dimensions. Nothing reads this one.
        inputs["attention_mask"] = torch.ones(PLACEHOLDER, dtype=torch.bool)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers' own function; query, key and value: [1, heads, tokens, head size]."""
    lengths = given.pop(LENGTHS, None)
    if lengths is None:
        if attention_mask is not None and attention_mask.shape == PLACEHOLDER and key.shape[2] > 1:
            raise ValueError("the model did not pass the lengths of the sequences to its attention")
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return output, None
    if any(given.get(name) is not None for name in SPARSE):
        raise ValueError("the model selects the tokens that it attends to from the whole row")
    window = given.get("sliding_window")
    outputs: list[Tensor] = []
    for parts in zip(*(torch.split(whole, lengths, 2) for whole in (query, key, value)), strict=True):
        length = parts[0].shape[2]
        mask = None if window is None or length <= window else _window_mask(length, window, query.device)
        outputs.append(sdpa_attention_forward(module, *parts, mask, **given)[0])
    return torch.cat(outputs, 1), None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return the mask of a causal sliding window, [1, 1, length, length]; `window` counts the token itself."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return ((distance >= 0) & (distance < window))[None, None]
