"""Conversations in data: lists of objects, one a turn, kept as JSON texts, so that their keys may differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

Turn = dict[str, Any]
_ROWS_TOGETHER = 4096


def convert_turns(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Lists of objects as lists of JSON texts, without their keys that are null; None for a column of something else.

    Arrow gives every object of a column the keys of all, null where it has none.
    """
    if not is_list(values.type) or not pa.types.is_struct(values.type.value_type):
        return None
    type_ = pa.list_(pa.string())
    parts = (values.slice(start, _ROWS_TOGETHER) for start in range(0, len(values), _ROWS_TOGETHER))
    return pa.chunked_array([pa.array(map(_to_texts, part.to_pylist()), type_) for part in parts], type_)


def is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def read_turns(row: Sequence[str | None]) -> list[Turn | None]:
    """What `convert_turns` made of a conversation, as objects again."""
    return [None if turn is None else json.loads(turn) for turn in row]


def _to_texts(row: list[Turn | None] | None) -> list[str | None] | None:
    return None if row is None else [_to_json(turn) for turn in row]


def _to_json(turn: Turn | None) -> str | None:
    return None if turn is None else json.dumps(_without_nulls(turn), ensure_ascii=False, sort_keys=True, default=str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
