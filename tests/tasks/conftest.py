"""A tiny language model, conversations for it, and recipes of the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from talk import ANSWERS, conversation

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    animals = list(ANSWERS)
    for split, (start, count) in {"train": (0, 48), "select": (48, 12), "test": (60, 12)}.items():
        rows = [
            {"messages": conversation(animals[number % 4], number) + conversation(animals[number % 3], number)}
            for number in range(start, start + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Path:
    """A folder with a Llama of 3 layers, 32 wide, random weights, untied, and a tokenizer of bytes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write(write_recipe: WriteRecipe, tiny_llama: Path, chats: Path) -> WriteRecipe:
    def write(options: dict[str, Any] | None = None, data: Any = None, **sections: Any) -> Path:
        target = {"task": "causal-lm", "data": data or str(chats), "options": {"max_length": 512, **(options or {})}}
        source = sections.pop("source", {"model": str(tiny_llama)})
        return write_recipe(source=source, target=target, **sections)

    return write
