"""Conversations about what animals say, and a tiny Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from talk import ANSWERS, conversation
from task_sample import SPLITS, Sample, compute_token_losses, write_splits


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
        run_plain=compute_token_losses,
    )
