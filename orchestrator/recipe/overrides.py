"""Overrides of the command line: `train.learning_rate=1e-4`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe.reading import read_value
from orchestrator.recipe.schema import Case

_EXAMPLE = "write it as `train.learning_rate=1e-4`"


class _OverrideError(Exception):
    """Raised for an override of a path that cannot exist, with what is wrong and the remedy."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def apply_overrides(
    data: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """Apply each `dotted.path=value` to a copy of `data`; later ones replace earlier ones.

    Values are YAML (`[64, 32]`, `{type: lora}`, `null`). Missing sections are created, items of lists have their index.

    Returns:
        The new data, the text of each override by its dotted path, and the problems of those that were not applied.
    """
    data = deepcopy(data)
    texts: dict[str, str] = {}
    problems: list[Problem] = []
    for text in overrides:
        place = f"{text} (command line)"
        try:
            path, value = _parse(text, place)
            _set(data, _split(path), value)
        except RecipeError as error:
            problems.extend(error.problems)
        except _OverrideError as error:
            problems.append(Problem(error.what, place, error.remedy))
        else:
            texts = {other: given for other, given in texts.items() if not other.startswith(f"{path}.")}
            texts[path] = text
    return data, texts, problems


def _parse(text: str, place: str) -> tuple[str, Any]:
    path, equals, written = text.partition("=")
    path = path.strip()
    if not equals:
        raise _OverrideError("an override has no `=`", _EXAMPLE)
    if not all(path.split(".")):
        raise _OverrideError("an override has an empty key", _EXAMPLE)
    if not written.strip():
        raise _OverrideError("an override has no value", f"write `{path}=VALUE`, or `{path}=null` for none")
    return path, read_value(written, place)


def _split(path: str) -> list[str]:
    """Split a path into keys, one for each part; the keys of `search.space` are dotted paths themselves."""
    parts = path.split(".")
    if parts[:2] != ["search", "space"]:
        return parts
    # The dotted key ends before the keys of a case (or misspelt ones), or the index of a case.
    ends = (i for i, part in enumerate(parts) if i > 2 and (part.isdigit() or nearest(part, Case.model_fields)))
    end = next(ends, len(parts))
    return [*parts[:2], ".".join(parts[2:end]), *parts[end:]] if len(parts) > 2 else parts


def _set(data: dict[str, Any], parts: list[str], value: Any) -> None:
    here: Any = data
    for depth, part in enumerate(parts[:-1]):
        key = _key_of(here, part, parts[:depth])
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        elif isinstance(here, list) and key == len(here):
            here.append({})
        here = here[key]
    last = _key_of(here, parts[-1], parts[:-1])
    if isinstance(here, list) and last == len(here):
        here.append(value)
    else:
        here[last] = value


def _key_of(here: Any, part: str, above: list[str]) -> Any:
    """Return `part` as a key of `here`: the text for a mapping, the index for a list (one past the end appends)."""
    if isinstance(here, dict):
        return part
    path = ".".join(above)
    if not isinstance(here, list):
        what = f"`{path}` is {here!r}, which has no key `{part}`"
        raise _OverrideError(what, f"replace it as a whole: `{path}={{{part}: ...}}`")
    if not (part.isascii() and part.isdigit() and len(part) < 7 and int(part) <= len(here)):
        what = f"`{path}` is a list of {len(here)}, which has no item `{part}`"
        raise _OverrideError(what, f"use a number from 0 to {len(here)}, or replace the list: `{path}=[...]`")
    return int(part)
