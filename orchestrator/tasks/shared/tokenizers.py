"""What tasks ask of a tokenizer."""

from __future__ import annotations

from typing import Any

LONGEST_LENGTH_TOLD = 1_000_000  # transformers writes 1e30 where a tokenizer has no limit


def longest_input(tokenizer: Any, config: Any) -> int | None:
    """How many tokens the model reads at most; None where nothing says it."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return min((limit for limit in limits if limit and 0 < limit < LONGEST_LENGTH_TOLD), default=None)


def tokenizer_state(tokenizer: Any) -> str:
    """Everything that decides what a tokenizer makes of a text, for the cache's key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__} {words} {tokenizer.special_tokens_map} {tokenizer.model_input_names}"
