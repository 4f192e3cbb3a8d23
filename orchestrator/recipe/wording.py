"""Explain mistakes in plain words: what is wrong with a value, where, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import Problem, nearest
from orchestrator.recipe.mistakes import Mistake, Path, dotted, value_at
from orchestrator.recipe.origin import Origin
from orchestrator.recipe.reading import resolve_scalar
from orchestrator.recipe.reference import Node, Shape

_SWITCHES = ("yes", "no", "on", "off", "true", "false")
_LONGEST_VALUE = 60
_PLAIN = re.compile(r"[\w%./-]+")


def explain_mistakes(
    mistakes: Sequence[Mistake], data: dict[str, Any], shape: Shape, origin: Origin, within: str = ""
) -> list[Problem]:
    """Return a problem for each mistake in `data`, which is at the dotted path `within` of the recipe."""
    prefix: Path = tuple(within.split(".")) if within else ()
    words = {"unknown": _explain_unknown, "missing": _explain_missing, "invalid": _explain_invalid}
    return [words[mistake.kind](mistake, data, shape, origin, prefix) for mistake in mistakes]


def show_value(value: Any) -> str:
    """Return a value as in YAML, shortened to one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def write_value(value: Any) -> str:
    """Return a value in YAML's one-line form, such as `{type: lora, r: 8}`, with quotes only where YAML needs them."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {write_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) and _is_text(value) else show_value(value)


def explain_value(mistake: Mistake, data: dict[str, Any], shape: Shape) -> tuple[str, str]:
    """Return what is wrong with a new value for the recipe, and the remedy."""
    if mistake.kind != "invalid":
        words = {"unknown": _explain_unknown, "missing": _explain_missing}
        problem = words[mistake.kind](mistake, data, shape, Origin(), ())
        return problem.what, problem.remedy or ""
    node, value = shape.find(mistake.path) or {}, value_at(data, mistake.path)
    what = f"`{dotted(mistake.path)}` cannot be {show_value(value)}, must be {shape.accepts(node)}"
    return what, _explain_slip(shape.options(node), value) or "change it, or remove it"


def _explain_unknown(mistake: Mistake, _: Any, shape: Shape, origin: Origin, prefix: Path) -> Problem:
    key, section = str(mistake.path[-1]), mistake.path[:-1]
    place = dotted((*prefix, *section))
    of = f"`{place}`" if place else "a recipe"
    homes = [dotted((*prefix, *path)) for path in shape.sections() if key in shape.keys(path)]
    guess = f"did you mean `{mistake.meant}`? " if mistake.meant else ""
    if section[:2] == ("search", "space") and shape.find((*str(section[-1]).split("."), key)):
        guess = f"write places of the recipe with dots: `{section[-1]}.{key}: ...`; "
    elif homes:
        guess = f"move it to {' or '.join(f'`{home}`' if home else 'the top level' for home in homes)}; "
    keys = ", ".join(f"`{name}`" for name in shape.keys(section))
    what = f"unknown key `{key}` in {of}"
    return Problem(what, origin.where(dotted((*prefix, *mistake.path))), f"{guess}the keys of {of} are {keys}")


def _explain_missing(mistake: Mistake, _: Any, shape: Shape, origin: Origin, prefix: Path) -> Problem:
    node, path = shape.find(mistake.path) or {}, (*prefix, *mistake.path)
    remedy = f"add it, {shape.accepts(node)}: {node.get('description', '').rstrip('.')}"
    return Problem(f"`{dotted(path)}` is missing", origin.where(dotted(path[:-1] or path)), remedy)


def _explain_invalid(mistake: Mistake, data: Any, shape: Shape, origin: Origin, prefix: Path) -> Problem:
    node, value, path = shape.find(mistake.path) or {}, value_at(data, mistake.path), (*prefix, *mistake.path)
    what = f"`{dotted(path)}` is {show_value(value)}, must be {shape.accepts(node)}"
    return Problem(what, origin.where(dotted(path)), _remedy(node, shape, value))


def _remedy(node: Node, shape: Shape, value: Any) -> str:
    slip = _explain_slip(shape.options(node), value)
    if slip:
        return slip
    if value is None and any("properties" in option for option in shape.options(node)):
        return "put keys below it, or remove the line"
    if "default" in node and (node["default"] is not None or {"type": "null"} in shape.options(node)):
        return f"change it, or remove the key for the default, {show_value(node['default'])}"
    return "change it"


def _explain_slip(options: Sequence[Node], value: Any) -> str | None:
    """Return the remedy for wrong quotes, or a typing mistake; None for anything else."""
    types = {option.get("type") for option in options}
    takes_numbers = bool(types & {"integer", "number"})
    if isinstance(value, bool | int | float):
        return "put it in quotes" if "string" in types and not takes_numbers else None
    if not isinstance(value, str):
        return None
    if takes_numbers and not resolve_scalar(value.strip()).endswith(("str", "null")):
        return "remove the quotes"
    if "boolean" in types and value.lower() in _SWITCHES:
        return "write `true` or `false`, without quotes"
    close = nearest(value, [name for option in options for name in _names(option)])
    return f"did you mean `{close}`?" if close else None


def _is_text(text: str) -> bool:
    return resolve_scalar(text).endswith("str")


def _names(option: Node) -> list[str]:
    return [str(name) for name in option.get("enum", [option["const"]] if "const" in option else [])]
