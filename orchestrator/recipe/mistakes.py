"""Find mistakes against the schema, each one once, even if pydantic reports it for several members of a union."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from orchestrator.errors import nearest
from orchestrator.recipe.reference import Node, Shape

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """A value, or a missing one, that does not match the schema."""

    kind: Literal["unknown", "missing", "invalid"]
    path: Path
    meant: str | None = None
    """For an unknown key: the key of its section that is closest to it."""

    @property
    def touches(self) -> list[str]:
        """The dotted paths whose values are unreliable: this one, and the one that was probably meant."""
        return [dotted(self.path), *([dotted((*self.path[:-1], self.meant))] if self.meant else [])]


def dotted(path: Path) -> str:
    """Return a path as text: `train.learning_rate`."""
    return ".".join(map(str, path))


def value_at(data: Any, path: Path) -> Any:
    """Return the value at a path of plain data, or None."""
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and str(part).isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data


def find_mistakes(error: ValidationError, data: dict[str, Any], shape: Shape) -> list[Mistake]:
    """Return each mistake once, in pydantic's order. A misspelt key is not also reported as missing."""
    mistakes: dict[Mistake, None] = {}
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        loc = detail["loc"]
        if detail["type"] == "extra_forbidden":
            section, key = _path_of(loc[:-1], shape), loc[-1]
            mistake = Mistake("unknown", (*section, key), nearest(str(key), shape.keys(section)))
        elif detail["type"] == "missing":
            mistake = Mistake("missing", _path_of(loc, shape))
        else:
            mistake = Mistake("invalid", _shorten(_path_of(loc, shape), data, shape))
        mistakes[mistake] = None
    misspelt = {path for mistake in mistakes if mistake.kind == "unknown" for path in mistake.touches}
    return [
        mistake
        for mistake in mistakes
        if not _said_deeper(mistake, list(mistakes), data, shape)
        and not (mistake.kind == "missing" and dotted(mistake.path) in misspelt)
    ]


def leave_out(mistakes: Sequence[Mistake], data: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Return a copy of the data without the mistakes; required values become the text `unknown`."""
    data = deepcopy(data)
    for mistake in mistakes:
        if mistake.kind == "unknown":
            _remove(data, mistake.path)
            if mistake.meant:
                _reset(data, (*mistake.path[:-1], mistake.meant), shape)
        else:
            _reset(data, mistake.path, shape)
    return data


def _path_of(loc: tuple[str | int, ...], shape: Shape) -> Path:
    """Return pydantic's location without the names of union members."""
    path: Path = ()
    for part in loc:
        if shape.find((*path, part)) is not None and part != "[key]":
            path = (*path, part)
    return path


def _shorten(path: Path, data: Any, shape: Shape) -> Path:
    """Return the path up to the first union without a member of the value's own kind (mapping or list)."""
    for length in range(1, len(path)):
        node = shape.find(path[:length]) or {}
        if len(shape.options(node)) > 1 and not _has_own_member(node, value_at(data, path[:length]), shape):
            return path[:length]
    return path


def _said_deeper(mistake: Mistake, mistakes: Sequence[Mistake], data: Any, shape: Shape) -> bool:
    """Whether a mistake comes from other members of a union than the one of the value's kind."""
    length = len(mistake.path)
    if mistake.kind != "invalid" or not _has_own_member(
        shape.find(mistake.path) or {}, value_at(data, mistake.path), shape
    ):
        return False
    return any(len(other.path) > length and other.path[:length] == mistake.path for other in mistakes)


def _has_own_member(node: Node, value: Any, shape: Shape) -> bool:
    kind = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else None
    return kind is not None and any(option.get("type") == kind for option in shape.options(node))


def _remove(data: Any, path: Path) -> None:
    parent = value_at(data, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def _reset(data: dict[str, Any], path: Path, shape: Shape) -> None:
    """Set the default at a path; without one, drop the optional section around it, or set a placeholder."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for length in range(len(path), 0, -1):
        if path[length - 1] not in shape.required(path[: length - 1]):
            _remove(data, path[:length])
            return
    parent = value_at(data, path[:-1])
    if isinstance(parent, dict):
        parent[path[-1]] = _placeholder(path, shape)


def _placeholder(path: Path, shape: Shape) -> Any:
    required = shape.required(path)
    return {key: _placeholder((*path, key), shape) for key in required} if required else "unknown"
