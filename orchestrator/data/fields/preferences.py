"""Two answers to one prompt, in the forms that people keep them: texts or turns, the prompt beside them or in both."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pyarrow as pa

from orchestrator.data.column_types import describe_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import group_rows
from orchestrator.data.fields.conversations import Sample, check_turns, sample_of_pair
from orchestrator.data.fields.text import check_text
from orchestrator.errors import Problem

SIDES = ("chosen", "rejected")
Answer = str | list[str]  # Text, or turns as `data.turns` keeps them.


def read_pairs(examples: Examples) -> tuple[list[Sample], list[Sample]]:
    """Return each example with its chosen answer, and each with its rejected one. They have passed `check_pairs`.

    What two conversations, or without a prompt two texts, begin with in common is given.
    """
    table = examples.table
    prompts = table["prompt"].to_pylist() if "prompt" in table.column_names else [None] * len(examples)
    found = [
        _split(prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(prompts, *(table[side].to_pylist() for side in SIDES), strict=True)
    ]
    return [chosen for chosen, _ in found], [rejected for _, rejected in found]


def _split(prompt: Answer | None, chosen: Answer, rejected: Answer) -> tuple[Sample, Sample]:
    if isinstance(chosen, list) and isinstance(rejected, list):
        pairs = zip(chosen, rejected, strict=False)
        shared: Answer = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        shared = _common_beginning(chosen, rejected)
    else:
        shared = ""
    given = shared or prompt or ""
    return sample_of_pair(given, chosen[len(shared) :]), sample_of_pair(given, rejected[len(shared) :])


def _common_beginning(chosen: str, rejected: str) -> str:
    """Return the common text, up to the space before the first word that differs."""
    differing = next(
        (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    words = chosen[:differing].rstrip()
    if differing < len(chosen) and not chosen[differing - 1 : differing].isspace():
        # The word that differs belongs to the answers, all of it.
        words = words[: max(words.rfind(space) for space in " \n\t") + 1].rstrip()
    return words


def check_pairs(examples: Examples) -> list[Problem]:
    """Return everything that is wrong with prompts and their two answers; a warning where both are the same."""
    types = [examples.table.column(side).type for side in SIDES]
    if pa.types.is_list(types[0]) != pa.types.is_list(types[1]):
        what = f"chosen holds {describe_type(types[0])}, rejected holds {describe_type(types[1])}"
        return [Problem(what, examples.where(0), "write both in one form")]
    problems = []
    for side in SIDES:
        is_turns = pa.types.is_list(examples.table.column(side).type)
        problems += check_turns(examples, side, "messages", True) if is_turns else check_text(examples, side)
    if "prompt" in examples.table.column_names and pa.types.is_list(examples.table.column("prompt").type):
        problems += check_turns(examples, "prompt", "messages", False)
    if problems:
        return problems
    chosen, rejected = (examples.values(side) for side in SIDES)
    same = pa.chunked_array([pa.array(np.array([one == other for one, other in zip(chosen, rejected, strict=True)]))])
    alike = group_rows(examples, "chosen", same, "is the same as rejected", "remove these rows: they prefer nothing")
    return [] if alike is None else [Problem(alike.what, alike.where, alike.remedy, fatal=False)]
