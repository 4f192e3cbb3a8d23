"""JSON Lines (one object a line) and JSON (a list of objects, or `{"data": [...]}`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data.examples import LinesAt, Rows
from orchestrator.data.formats.raw import RawFile, bad_lines, read_utf8
from orchestrator.data.messages import show_name, show_value
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path

_TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


class _Repeated(dict[str, Any]):
    """An object in which a key stood twice; `json` would silently keep the last."""

    key: str


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    repeated = _Repeated(plain)
    repeated.key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return repeated


_decode = json.JSONDecoder(object_pairs_hook=_build_object).decode


_FAULTS = {
    "not UTF-8": "save the file as UTF-8 (it may be Latin-1 or Windows-1252)",
    "not valid JSON": 'write one object a line, such as {"text": "...", "label": "..."}',
    "not a JSON object": 'write each as an object: {"text": "...", "label": "..."}',
    "with a key that stands twice": "keep one of the two",
}


class LineReader:
    """Turns lines into objects, and notes those that hold none."""

    def __init__(self) -> None:
        self._faults: dict[str, list[tuple[int, str]]] = {kind: [] for kind in _FAULTS}

    def read(self, line: str, number: int) -> dict[str, Any] | None:
        """Return the object of a line; None where it holds none. `number` is that of the line."""
        try:
            row = _decode(line)
        except (ValueError, RecursionError) as error:
            self._faults["not valid JSON"].append((number, _explain(error)))
            return None
        if isinstance(row, _Repeated):
            self._faults["with a key that stands twice"].append((number, show_value(row.key)))
        elif isinstance(row, dict):
            return row
        else:
            self._faults["not a JSON object"].append((number, show_value(line)))
        return None

    def read_bytes(self, line: bytes, number: int) -> dict[str, Any] | None:
        """Return the object of a line that is not decoded yet."""
        try:
            return self.read(line.decode("utf-8"), number)
        except UnicodeDecodeError as error:
            self._faults["not UTF-8"].append((number, f"byte {error.start + 1} is {line[error.start]:#04x}"))
            return None

    def check(self, path: Path, line_of: Callable[[int], int] = int) -> None:
        """Raise DataError where lines of the file held no object, each kind counted and shown by line.

        Args:
            line_of: the line (from 1) of what a line went by.
        """
        problems = [
            bad_lines(path, kind, sorted(found), _FAULTS[kind], line_of)
            for kind, found in self._faults.items()
            if found
        ]
        if problems:
            raise DataError(problems)


def read_jsonl(path: Path) -> RawFile:
    """Read a file of one JSON object a line; blank lines are passed over.

    Raises:
        DataError: lines that are malformed, not objects, or hold a key twice; each kind counted and shown by line.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    reader = LineReader()
    # Not splitlines(): U+2028 and its like may stand inside a JSON text.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line or line.isspace():
            continue
        row = reader.read(line, number)
        if row is not None:
            rows.append(row)
            lines.append(number)
    reader.check(path)
    return raw_rows(path, rows, np.array(lines, dtype=np.int64), chain.from_iterable(rows))


def read_json(path: Path) -> RawFile:
    """Read a JSON list of objects, or an object whose `data` is one.

    Raises:
        DataError: malformed JSON, another shape, items that are not objects or hold a key twice.
    """
    place = show_path(path)
    text = read_utf8(path)
    try:
        content = _decode(text)
    except json.JSONDecodeError as error:
        remedy = "rename it to .jsonl if each line is an object of its own" if error.msg == "Extra data" else None
        what = f"the file is not valid JSON: {_explain(error)}"
        raise DataError(Problem(what, f"{place}:{error.lineno}", remedy or "mend it, or write it anew")) from None
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(f"the file is not valid JSON: {_explain(error)}", place, "write it anew")) from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        shape = f"an object with {', '.join(map(show_name, content))}" if isinstance(content, dict) else "one value"
        what = f"the file holds {show_name(shape)}, not a list of objects"
        raise DataError(Problem(what, place, 'write [{"text": ..., "label": ...}, ...]'))
    for number, row in enumerate(rows):
        where = f"{place} row {number}"
        if isinstance(row, _Repeated):
            raise DataError(Problem(f"the key {show_value(row.key)} stands twice", where, "keep one of the two"))
        if not isinstance(row, dict):
            raise DataError(Problem(f"{show_value(row)} is not an object", where, "write each example as an object"))
    return raw_rows(path, rows, None, chain.from_iterable(rows))


def _explain(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


def raw_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], lines: Rows | LinesAt | None, names: Iterable[str]
) -> RawFile:
    """Return a RawFile with objects as its rows.

    Args:
        names: of the columns, in their order; each may come several times.
    """
    place = show_path(path)

    def where(row: int) -> str:
        return f"{place} row {row}" if lines is None else f"{place}:{lines[row]}"

    def fetch(name: str) -> pa.ChunkedArray:
        return arrow_column([row.get(name) for row in rows], name, where)

    return RawFile(place, tuple(dict.fromkeys(names)), len(rows), fetch, lines)


def arrow_column(values: list[Any], name: str, where: Callable[[int], str]) -> pa.ChunkedArray:
    """Return Python values as an Arrow column of one type: null, text, integers, numbers, booleans, lists, objects.

    Raises:
        DataError: values of several types, whole numbers beyond 64 bits, text that is not Unicode.
    """
    kinds = set(map(type, values)) - {type(None)}
    if kinds == {list}:
        kinds = set(map(type, chain.from_iterable(value for value in values if value))) - {type(None)}
        wrap = pa.list_
        items = [(row, item) for row, value in enumerate(values) if value for item in value]
    else:
        wrap = _unwrapped
        items = list(enumerate(values))
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) > 1:
        raise DataError(_mixed(items, name, where))
    type_ = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}.get(
        next(iter(kinds), str), pa.struct([])
    )
    if pa.types.is_struct(type_):
        return _nested_column(values, name, where)
    try:
        return pa.chunked_array([pa.array(values, wrap(type_))])
    except OverflowError:
        row, value = next((row, value) for row, value in items if value is not None and abs(value) >= 2**63)
        what = f"{name} is {show_value(value)}, which is beyond 64 bits"
        raise DataError(Problem(what, where(row), "write it as text if it is a name")) from None
    except UnicodeEncodeError:
        row, value = next((row, value) for row, value in items if value is not None and _has_surrogate(value))
        what = f"{name} is {show_value(value)}, which holds half a surrogate pair and so is not Unicode text"
        raise DataError(Problem(what, where(row), "remove the \\ud800-\\udfff escape")) from None


def _nested_column(values: list[Any], name: str, where: Callable[[int], str]) -> pa.ChunkedArray:
    try:
        return pa.chunked_array([pa.array(values)])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        what = f"the column {show_name(name)} holds nested values that differ in type: {show_name(str(error))}"
        raise DataError(Problem(what, where(0), "write its values in one type, or as text")) from None


def _unwrapped(type_: pa.DataType) -> pa.DataType:
    return type_


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _mixed(items: list[tuple[int, Any]], name: str, where: Callable[[int], str]) -> Problem:
    firsts: dict[type, tuple[int, Any]] = {}
    for row, value in items:
        if value is not None:
            firsts.setdefault(type(value), (row, value))
    shown = " and ".join(
        f"{_TYPE_WORDS.get(kind, 'a list')} ({show_value(value)} at {where(row)})"
        for kind, (row, value) in firsts.items()
    )
    place = where(max(row for row, _ in firsts.values()))
    return Problem(f"the column {show_name(name)} holds values of several types: {shown}", place, "write all as text")
