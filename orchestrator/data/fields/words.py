"""Texts that are cut into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.column_types import is_list, plain_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import Field, group_rows
from orchestrator.data.messages import show_value
from orchestrator.errors import Problem


@dataclass(frozen=True)
class WordsField(Field):
    """The words of a text, held as lists of strings."""

    needs = "lists of text, one a word"
    plural = "texts"

    def wanted_type(self, type_: pa.DataType) -> pa.DataType | None:
        return pa.list_(pa.string()) if is_list(type_) and plain_type(type_) == pa.list_(pa.string()) else None

    def check(self, splits: Mapping[str, Examples], column: str) -> list[Problem]:
        """Return problems of texts that are null or have no words, and of words that are null or blank."""
        problems: list[Problem | None] = []
        for examples in splits.values():
            rows = list(examples.values(column))
            blank = [row is not None and any(word is None or not word.strip() for word in row) for row in rows]
            fill = "remove these rows, or fill in their words"
            found = {
                "is missing (null)": ([row is None for row in rows], fill),
                "has no words": ([row is not None and not row for row in rows], fill),
                "has blank words": (blank, "remove the blank words, and their tags"),
            }
            for what, (mask, remedy) in found.items():
                array = pa.chunked_array([pa.array(mask, pa.bool_())])
                problems.append(group_rows(examples, column, array, what, remedy, self.show))
        return [problem for problem in problems if problem is not None]

    def keys(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.binary_join(values, " ")

    def show(self, value: Any) -> str:
        return show_value(" ".join(word or "" for word in value))
