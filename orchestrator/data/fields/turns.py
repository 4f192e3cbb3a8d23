"""Conversations: lists of objects, one a turn, held as JSON texts, so that their keys may differ; or plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.column_types import is_list
from orchestrator.data.examples import Examples, SourceFile
from orchestrator.data.fields.text import TextField
from orchestrator.errors import Problem

Turn = dict[str, Any]
_ROWS_TOGETHER = 4096


@dataclass(frozen=True)
class TurnsField(TextField):
    """Text, held as strings; or conversations, held as lists of strings, one a turn (see `conversations`)."""

    needs = "text, or lists of objects such as {role, content}"

    def convert(self, values: pa.ChunkedArray, name: str, source: str, file: SourceFile) -> pa.ChunkedArray:
        found = convert_turns(values)
        return super().convert(values, name, source, file) if found is None else found

    def check(self, splits: Mapping[str, Examples], column: str) -> list[Problem]:
        """Return nothing: what is wrong depends on the form of the data, which `conversations` checks."""
        return []

    def keys(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.binary_join(values, "\x1e") if pa.types.is_list(values.type) else values


def convert_turns(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return lists of objects as lists of JSON texts without keys that are null; None for a column of something else.

    Arrow gives every object of a column the keys of all, null where it has none.
    """
    if not is_list(values.type) or not pa.types.is_struct(values.type.value_type):
        return None
    type_ = pa.list_(pa.string())
    parts = (values.slice(start, _ROWS_TOGETHER) for start in range(0, len(values), _ROWS_TOGETHER))
    return pa.chunked_array([pa.array(map(_to_texts, part.to_pylist()), type_) for part in parts], type_)


def read_turns(row: Sequence[str | None]) -> list[Turn | None]:
    """Return a value of `convert_turns` as objects again."""
    return [None if turn is None else json.loads(turn) for turn in row]


def _to_texts(row: list[Turn | None] | None) -> list[str | None] | None:
    return None if row is None else [_to_json(turn) for turn in row]


def _to_json(turn: Turn | None) -> str | None:
    return None if turn is None else json.dumps(_without_nulls(turn), ensure_ascii=False, sort_keys=True, default=str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
