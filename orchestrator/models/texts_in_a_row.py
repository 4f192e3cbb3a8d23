"""Attention for several texts that stand in one row, without padding: each text attends to itself alone.

A mask over the whole row would do too, but costs its square: here attention costs the sum of the squares of the texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "texts_in_a_row"
LENGTHS = "text_lengths"
"""The input that holds the length of each text in the row; shape [texts]."""
STAND_IN = (1, 1, 1, 1)
"""The shape of what is given for a mask with them."""


def attend_within_texts(model: Any) -> None:
    """Have the model take `text_lengths`, where it attends as PyTorch does (`sdpa`); else it stays as it is."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if config._attn_implementation == "sdpa":
            config._attn_implementation = NAME


def takes_texts_in_a_row(model: Any) -> bool:
    """Whether `attend_within_texts` has changed the model."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def spell_out(inputs: dict[str, Any]) -> None:
    """Put what attention needs in the place of `text_lengths`, where inputs have it."""
    if LENGTHS in inputs:
        # Asked of the device once, not in every layer.
        inputs[LENGTHS] = inputs[LENGTHS].tolist()
        # A mask that transformers takes for one of the caller's own: it makes none, and nobody reads this one.
        inputs["attention_mask"] = torch.ones(STAND_IN, dtype=torch.bool)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """As transformers' own function: query, key and value of shape [1, heads, tokens, width of a head]."""
    lengths = given.pop(LENGTHS, None)
    if lengths is None:
        if attention_mask is not None and attention_mask.shape == STAND_IN and key.shape[2] > 1:
            raise ValueError("the model did not hand on the lengths of the texts")
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return output, None
    window = given.get("sliding_window")
    outputs: list[Tensor] = []
    for parts in zip(*(torch.split(whole, lengths, 2) for whole in (query, key, value)), strict=True):
        length = parts[0].shape[2]
        mask = None if window is None or length <= window else _band(length, window, query.device)
        outputs.append(sdpa_attention_forward(module, *parts, mask, **given)[0])
    return torch.cat(outputs, 1), None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which positions a token sees: itself and the ones before it, `window` of them in all."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return ((back >= 0) & (back < window))[None, None]
