"""JSON Lines files of records, one JSON object a line: read whatever is whole in them, add lines that survive a crash.

Files with the data of users are read in `data/formats/`, where a damaged line is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JsonObject = dict[str, Any]


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_object(data: bytes | None) -> JsonObject:
    """Return a JSON object; an empty one for anything else, such as a damaged file or no file."""
    try:
        found = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_json_lines(data: bytes) -> tuple[list[JsonObject], int]:
    """Return the objects of all lines, and the number of lines that hold none, such as a torn last one."""
    # Not `splitlines`: texts in JSON may hold other line separators.
    lines = [line for line in data.split(b"\n") if line.strip()]
    found = [row for line in lines if (row := parse_object(line))]
    return found, len(lines) - len(found)


def read_damaged_json_lines(path: Path) -> tuple[list[JsonObject], int]:
    """Return the same for a file; no objects where there is no file."""
    try:
        return parse_json_lines(path.read_bytes())
    except FileNotFoundError:
        return [], 0


def read_json_lines(path: Path) -> list[JsonObject]:
    """Return the objects of a file; lines that hold none are skipped."""
    return read_damaged_json_lines(path)[0]


def format_json_lines(rows: Iterable[JsonObject]) -> str:
    """Return the text of a JSON Lines file; numbers that are not finite become null."""
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)


def append_json_line(path: Path, row: JsonObject) -> None:
    """Add a line to a file, which is created where it does not exist; a torn last line is ended first."""
    text = format_json_lines([row])
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


class JsonLinesFollower:
    """Reads each line once that other processes add to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_bytes_read = 0

    def read_new(self) -> list[JsonObject]:
        """Return the objects that were added since the last call; a line that is not ended yet is left for later."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._num_bytes_read)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._num_bytes_read += len(whole)
        return parse_json_lines(whole)[0]
