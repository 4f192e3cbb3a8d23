"""The forms in which people keep what a language model learns from: plain text, prompts with their completions,
instructions (Alpaca), conversations (messages; ShareGPT). The files of a split may be of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from orchestrator.data.examples import Examples, Indices, SourceFile
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.text import TextField
from orchestrator.data.fields.turns import TurnsField
from orchestrator.data.messages import show_names
from orchestrator.errors import Problem

Form = Literal["messages", "sharegpt", "prompt-completion", "alpaca", "text"]
Find: TypeAlias = Callable[[Sequence[str]], Form | None]
"""Tells the form from the names of columns."""

COLUMNS: dict[Form, tuple[Column, ...]] = {
    "messages": (Column("messages", TurnsField(), aliases=("conversation", "chat", "dialogue")),),
    "sharegpt": (Column("conversations", TurnsField()),),
    "prompt-completion": (
        Column("prompt", TurnsField(), aliases=("question", "query")),
        Column("completion", TurnsField(), aliases=("response", "answer")),
    ),
    "alpaca": (
        Column("instruction", TextField()),
        Column("input", TextField(), required=False, aliases=("context",), may_vary=True),
        Column("output", TextField(), aliases=("response",)),
        Column("system", TextField(), required=False, may_vary=True),
    ),
    "text": (Column("text", TextField(), aliases=("content",)),),
}
"""What each form reads. Where a file has the columns of several, the first one is taken."""
ANSWERS = ("completion", "output")


def columns_of(form: Form | None) -> tuple[Column, ...]:
    """Return the columns of a form; of all forms, none of them required, where the data decide."""
    if form is not None:
        return COLUMNS[form]
    every: dict[str, Column] = {}
    for columns in COLUMNS.values():
        for column in columns:
            # Other names lead astray where several forms are looked for: an alias of one is the column of another.
            every.setdefault(column.name, Column(column.name, column.field, required=False, may_vary=True))
    return tuple(every.values())


def find_form(names: Sequence[str]) -> Form | None:
    """Return the form that has these columns; None where none has."""
    for form, columns in COLUMNS.items():
        if all(column.name in names for column in columns if column.required):
            return form
    return None


def prompt_columns(form: Form | None) -> tuple[Column, ...]:
    """Return the columns without those that hold answers: all that a model needs to write some."""
    return tuple(column for column in columns_of(form) if column.name not in ANSWERS)


def find_prompt_form(names: Sequence[str]) -> Form | None:
    """Return the form that has these columns, without answers; None where none has."""
    for form in COLUMNS:
        if all(column.name in names for column in prompt_columns(form) if column.required):
            return form
    return None


def forms_of(examples: Examples, form: Form | None, find: Find = find_form) -> list[Form | None]:
    """Return the form of each file: the one that is named, or that of its columns; None where there is none."""
    table = examples.table.column_names
    return [form or find(table if file.columns is None else file.columns) for file in examples.files]


def check_forms(examples: Examples, form: Form | None, find: Find = find_form) -> list[Problem]:
    """Return problems of files that are of no form."""
    forms = zip(examples.files, forms_of(examples, form, find), strict=True)
    return [_no_form(file, examples.table.column_names) for file, found in forms if found is None]


def by_form(examples: Examples, form: Form | None, find: Find) -> Iterator[tuple[Form, Indices, Examples]]:
    """Return the examples of each form, and their positions. All files are of one."""
    forms = forms_of(examples, form, find)
    numbers = examples.file_numbers()
    for each in dict.fromkeys(forms):
        assert each is not None
        positions = np.flatnonzero(np.isin(numbers, [number for number, own in enumerate(forms) if own == each]))
        if len(positions) == len(examples):
            yield each, positions, examples
        elif len(positions):
            yield each, positions, examples.take(positions)


def _no_form(file: SourceFile, table: Sequence[str]) -> Problem:
    names = table if file.columns is None else file.columns
    forms = "; ".join(
        f"{form}: {' and '.join(column.name for column in columns if column.required)}"
        for form, columns in COLUMNS.items()
    )
    found = f"only {show_names(names)} of the columns that are known" if names else "none of the columns that are known"
    remedy = "map them in the recipe, `target.columns: {prompt: QUESTION, completion: ANSWER}`"
    return Problem(f"the file has {found}; a form needs ({forms})", file.place, remedy)
