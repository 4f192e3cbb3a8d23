"""Conversations about what animals say, and a tiny Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from talk import ANSWERS, conversation
from task_sample import SPLITS, Sample, write_splits
from torch.nn import functional


def run_plain(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the loss of each target, and whether it is the model's likeliest token."""
    targets = inputs["target_ids"]
    given = {name: value for name, value in inputs.items() if name != "target_ids"}
    logits = model(**given, use_cache=False).logits.float()
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    hits = (logits.argmax(-1) == targets).float()
    return SimpleNamespace(token_losses=torch.stack([losses, hits], -1))


def make(folder: Path, fixture: Callable[[str], Path]) -> Sample:
    animals = list(ANSWERS)
    talks = [conversation(animals[number % 4], number)[: 4 - number % 2 * 2] for number in range(sum(SPLITS.values()))]
    unknown = [{"messages": [{**turn, "role": "stranger"} for turn in talk]} for talk in talks]
    questions = [{"messages": talk[:1]} for talk in talks]
    return Sample(
        model=fixture("tiny_llama"),
        data=write_splits(folder / "data", [{"messages": talk} for talk in talks]),
        options={"max_length": 200},
        bad=[
            (write_splits(folder / "unknown", unknown), "has an unknown role"),
            (write_splits(folder / "questions", questions), "has no assistant turn"),
            (write_splits(folder / "labels", [{"label": 1}] * 50), "there is none of the columns"),
        ],
        shown="what does the cat say",
        run_plain=run_plain,
    )
