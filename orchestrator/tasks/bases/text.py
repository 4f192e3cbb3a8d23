"""What tasks ask of a tokenizer."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import Problem
from orchestrator.recipe import Recipe

LONGEST_LENGTH_TOLD = 1_000_000  # transformers writes 1e30 where a tokenizer has no limit


def longest_input(tokenizer: Any, config: Any) -> int | None:
    """How many tokens the model reads at most; None where nothing says it."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return min((limit for limit in limits if limit and 0 < limit < LONGEST_LENGTH_TOLD), default=None)


def longest_conversation(tokenizer: Any, model: Any) -> int | None:
    """Return how many tokens a language model reads and writes together at most; None where nothing limits it."""
    from orchestrator import models

    limits = [longest_input(tokenizer, model.config), models.find_max_length(model.config, "AutoModelForCausalLM", 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def check_length(wanted: int, tokenizer: Any, config: Any, auto_class: str, recipe: Recipe) -> list[Problem]:
    """Return a problem where texts of `target.options.max_length` (`wanted`) tokens are too long for the model.

    Config and tokenizer tell what it was trained for; what it holds is tried.
    """
    from orchestrator import models

    held = models.find_max_length(config, auto_class, wanted, recipe.source.trust_remote_code)
    limits = [limit for limit in (longest_input(tokenizer, config), held) if limit is not None]
    if wanted <= min(limits, default=wanted):
        return []
    longest = min(limits)
    what = f"max_length is {wanted}, but {recipe.source.model} reads at most {longest} tokens"
    remedy = f"set target.options.max_length to {longest} or less"
    return [Problem(what, recipe.origin.where("target.options.max_length"), remedy)]


def tokenizer_state(tokenizer: Any) -> str:
    """Everything that decides what a tokenizer makes of a text, for the cache's key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__} {words} {tokenizer.special_tokens_map} {tokenizer.model_input_names}"
