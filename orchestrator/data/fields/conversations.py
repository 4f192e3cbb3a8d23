"""What a language model learns from: examples of every form, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from orchestrator.data.examples import Examples
from orchestrator.data.fields.forms import (
    ANSWERS,
    COLUMNS,
    Find,
    Form,
    by_form,
    check_forms,
    find_form,
    find_prompt_form,
)
from orchestrator.data.fields.text import check_text
from orchestrator.data.fields.turns import Turn, read_turns
from orchestrator.data.messages import NUM_SHOWN, show_names, show_some, show_value
from orchestrator.errors import Problem

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Sample:
    """One example to learn from: a conversation, or text."""

    turns: tuple[Turn, ...] = ()
    """Each with `role` and `content`; empty where the example is text."""
    num_given: int = 0
    """The first turns are given: nothing of them is learned."""
    prompt: str = ""
    completion: str = ""
    """Learned, with the end of the text after it; without a prompt it is all there is."""


def read_samples(examples: Examples, form: Form | None) -> list[Sample]:
    """Return the examples of a split, in its order; those of each file in its own form where none is named.

    They have passed `check_samples`.
    """
    return _read(examples, form, find_form, _read_form)


def read_prompts(examples: Examples, form: Form | None) -> list[Sample]:
    """Return the given part of each example; conversations end before the last answer."""
    return _read(examples, form, find_prompt_form, _read_prompts)


def _read(
    examples: Examples, form: Form | None, find: Find, read: Callable[[Examples, Form], list[Sample]]
) -> list[Sample]:
    samples: dict[int, Sample] = {}
    for each, positions, some in by_form(examples, form, find):
        samples.update(zip(positions.tolist(), read(some, each), strict=True))
    return [samples[position] for position in range(len(examples))]


def _read_form(examples: Examples, form: Form) -> list[Sample]:
    table = {name: examples.table.column(name).to_pylist() for name in examples.table.column_names}
    if form == "messages":
        return [Sample(turns=_turns(row)) for row in table["messages"]]
    if form == "sharegpt":
        return [Sample(turns=tuple(map(_from_sharegpt, read_turns(row)))) for row in table["conversations"]]
    if form == "text":
        return [Sample(completion=text) for text in table["text"]]
    if form == "alpaca":
        nothing = [None] * len(examples)
        rows = zip(
            table["instruction"],
            table.get("input", nothing),
            table["output"],
            table.get("system", nothing),
            strict=True,
        )
        return [_from_alpaca(*row) for row in rows]
    return [sample_of_pair(*pair) for pair in zip(table["prompt"], table["completion"], strict=True)]


def _read_prompts(examples: Examples, form: Form) -> list[Sample]:
    table = examples.table
    for name in ANSWERS:
        if name in table.column_names:
            table = table.drop_columns([name])
        if name in {column.name for column in COLUMNS[form]}:
            table = table.append_column(name, pa.array([""] * len(examples), pa.string()))
    whole = _read_form(Examples(table, examples.rows, examples.files), form)
    return [sample if form in ("messages", "sharegpt", "text") else _before_answer(sample) for sample in whole]


def _before_answer(sample: Sample) -> Sample:
    return Sample(turns=sample.turns[: sample.num_given], num_given=sample.num_given, prompt=sample.prompt)


def _turns(row: Sequence[str | None]) -> tuple[Turn, ...]:
    return tuple(turn for turn in read_turns(row) if turn is not None)


def _from_sharegpt(turn: Turn | None) -> Turn:
    assert turn is not None
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _from_alpaca(instruction: str, context: str | None, output: str, system: str | None) -> Sample:
    asked = f"{instruction}\n\n{context}" if context and not context.isspace() else instruction
    before = [{"role": "system", "content": system}] if system and not system.isspace() else []
    turns = (*before, {"role": "user", "content": asked}, {"role": "assistant", "content": output})
    return Sample(turns=turns, num_given=len(turns) - 1)


def sample_of_pair(prompt: str | list[str], completion: str | list[str]) -> Sample:
    """Return a prompt and what is to follow it, each as text or as turns."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Sample(prompt=prompt, completion=completion)
    given = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else _turns(prompt)
    answer = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else _turns(completion)
    return Sample(turns=(*given, *answer), num_given=len(given))


def check_samples(splits: Mapping[str, Examples], form: Form | None) -> list[Problem]:
    """Return everything that is wrong with the examples: no known form, missing or blank texts, broken turns."""
    problems = (problem for split in splits.values() for problem in _check_split(split, form))
    return list(dict.fromkeys(problems))  # Splits that are cut from one file share its problem.


def check_prompts(examples: Examples, form: Form | None) -> list[Problem]:
    """Return everything that is wrong with examples that a model is to answer."""
    return _check_split(examples, form, find_prompt_form, needs_answers=False)


def _check_split(
    examples: Examples, form: Form | None, find: Find = find_form, needs_answers: bool = True
) -> list[Problem]:
    problems = check_forms(examples, form, find)
    if not problems:
        for each, _, some in by_form(examples, form, find):
            problems += _check_form(some, each, needs_answers)
    return problems


def _check_form(examples: Examples, form: Form, needs_answers: bool) -> list[Problem]:
    problems: list[Problem] = []
    for column in COLUMNS[form]:
        if column.name not in examples.table.column_names:
            continue
        if pa.types.is_list(examples.table.column(column.name).type):
            problems += check_turns(examples, column.name, form, needs_answers and column.name != "prompt")
        elif form in ("messages", "sharegpt"):
            what = f"{column.name} holds text; it must hold lists of objects, one a turn"
            problems.append(Problem(what, examples.where(0), 'write [{"role": "user", "content": ...}, ...]'))
        elif column.required and column.name != "prompt":
            problems += check_text(examples, column.name)
        else:
            # There may be no input to an instruction, and nothing before a completion.
            problems += [problem for problem in check_text(examples, column.name) if "NUL" in problem.what]
    return problems


def check_turns(examples: Examples, column: str, form: Form, needs_answer: bool) -> list[Problem]:
    """Return what is wrong with conversations, each kind of mistake with up to three of its rows."""
    found: dict[str, list[tuple[int, str]]] = {}
    for row, turns in enumerate(examples.values(column)):
        for kind, detail in _mistakes(turns, form, needs_answer):
            found.setdefault(kind, []).append((row, detail))
    problems = []
    for kind, rows in found.items():
        shown = [f"{examples.where(row)}{f' ({detail})' if detail else ''}" for row, detail in rows[:NUM_SHOWN]]
        what = f"{column} {kind} in {len(rows)} of {len(examples)} rows: {show_some(shown, len(rows))}"
        problems.append(Problem(what, examples.where(rows[0][0]), _REMEDIES[kind]))
    return problems


_MISSING, _EMPTY, _NULL = "is missing (null)", "has no turns", "has a turn that is null"
_KEYS, _ROLE, _CONTENT = "has a turn without its keys", "has an unknown role", "has a turn without content"
_ANSWER, _BLANK = "has no assistant turn", "has a blank assistant turn"
_REMEDIES = {
    _MISSING: "remove these rows, or fill them in",
    _EMPTY: "remove these rows, or fill them in",
    _NULL: "remove these turns",
    _KEYS: "give each turn `role` and `content` (messages), or `from` and `value` (ShareGPT)",
    _ROLE: f"use one of: {', '.join(ROLES)} (messages); system, human, gpt, tool (ShareGPT)",
    _CONTENT: "write its content as text",
    _ANSWER: "remove these rows: there is nothing to learn from them",
    _BLANK: "remove these rows, or write the answers: a model learns to say nothing from them",
}


def _mistakes(turns: list[str | None] | None, form: Form, needs_answer: bool) -> list[tuple[str, str]]:
    """Return the kinds of mistakes in a conversation, each with the first value found."""
    if turns is None:
        return [(_MISSING, "")]
    if not turns:
        return [(_EMPTY, "")]
    role_key, content_key = ("from", "value") if form == "sharegpt" else ("role", "content")
    known = SHAREGPT_ROLES if form == "sharegpt" else {role: role for role in ROLES}
    found: dict[str, str] = {}
    answers = 0
    for turn in read_turns(turns):
        if turn is None:
            found.setdefault(_NULL, "")
            continue
        role, content = turn.get(role_key), turn.get(content_key)
        if role is None:
            found.setdefault(_KEYS, f"it has {show_names(sorted(turn))}")
        elif role not in known:
            found.setdefault(_ROLE, show_value(role))
        elif not isinstance(content, str | list) and not ("tool_calls" in turn and known[role] == "assistant"):
            found.setdefault(_CONTENT, show_value(role))
        elif known[role] == "assistant":
            answers += 1
            if isinstance(content, str) and not content.strip() and "tool_calls" not in turn:
                found.setdefault(_BLANK, "")
    if needs_answer and not answers and not found:
        found[_ANSWER] = ""
    return list(found.items())
