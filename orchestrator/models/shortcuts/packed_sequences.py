"""Attention for several texts that stand in one row, without padding: each text attends to itself alone.

A mask over the whole row would do too, but costs its square: here attention costs the sum of the squares of the texts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "texts_in_a_row"
OWN = "sdpa"
LENGTHS = "text_lengths"
"""The input that holds the length of each text in the row; shape [texts]."""
CHOSEN = ("indices", "block_indices")
"""The arguments by which sparse attention is told which tokens or blocks of them each token attends to."""
STAND_IN = (1, 1, 1, 1)
"""The shape of what is given for a mask with them."""


def attend_within_sequences(model: Any) -> None:
    """Have the model take `text_lengths`, where it attends as PyTorch does (`sdpa`); else it stays as it is.

    Without them it attends by its own implementation: some models compute otherwise where its name is not `sdpa`.
    """
    both = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    configs = [config for config in both if config._attn_implementation == OWN]
    # Others never ask transformers for the function that is called by this name.
    if not configs or not model._supports_attention_backend:
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, **inputs: Any) -> Any:
        # Until the next pass: gradient checkpointing computes layers again during the backward pass.
        for config in configs:
            config._attn_implementation = NAME if LENGTHS in inputs else OWN
        return whole(*args, **inputs)

    model.forward = forward
    model.takes_packed_sequences = True


def takes_packed_sequences(model: Any) -> bool:
    """Whether `attend_within_texts` has changed the model."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(whole, "takes_packed_sequences", False))


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
    if any(given.get(name) is not None for name in CHOSEN):
        raise ValueError("the model chooses the tokens that it attends to, of the whole row")
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
