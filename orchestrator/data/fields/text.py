"""Text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.column_types import plain_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import Field, group_rows
from orchestrator.errors import Problem


@dataclass(frozen=True)
class TextField(Field):
    """Text, held as strings."""

    needs = "text"
    plural = "texts"

    def wanted_type(self, type_: pa.DataType) -> pa.DataType | None:
        return pa.string() if plain_type(type_) == pa.string() else None

    def check(self, splits: Mapping[str, Examples], column: str) -> list[Problem]:
        return [problem for examples in splits.values() for problem in check_text(examples, column)]


def check_text(examples: Examples, column: str) -> list[Problem]:
    """Return problems of texts that are null, blank, or hold NUL characters."""
    values = examples.table.column(column)
    blank = pc.equal(pc.utf8_trim_whitespace(values), "")
    nul = pc.match_substring(values, "\0")
    fill = "remove these rows, or fill in their text"
    found = [
        group_rows(examples, column, values.is_null(), "is missing (null)", fill),
        group_rows(examples, column, blank, "is blank", fill),
        group_rows(examples, column, nul, "holds NUL characters (\\u0000)", "remove the characters from the text"),
    ]
    return [problem for problem in found if problem]
