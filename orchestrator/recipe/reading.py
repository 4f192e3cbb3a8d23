"""Read YAML safely: plain data only, with the line of every value, and errors in plain words.

Scalars follow YAML 1.2: only `true` and `false` are booleans, `1e-4` is a number, and `on`, `12:30` and dates are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe.paths import show_path

MAX_BYTES = 2**20
MAX_VALUES = 20_000
"""Limit of values in the text, and again after aliases are expanded; a recipe has about a hundred."""
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 100

_TAG = "tag:yaml.org,2002:"
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_REAL = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)

# (part of the parser's message, what is wrong in plain words, what to do about it)
_SYNTAX = (
    (r"'\t'", "there is a tab where YAML needs spaces", "indent with spaces"),
    ("mapping values are not allowed", "a `:` is not allowed here", "check the indentation, put a space after each "
     "`:` and quotes around text that holds `: `"),
    ("sequence entries are not allowed", "a `-` is not allowed here", "start the list on a line of its own"),
    ("could not find expected ':'", "a key has no `:`", "write `key: value`"),
    ("undefined alias", "an alias (`*name`) has no anchor (`&name`)", "put text that begins with `*` in quotes"),
    ("end of stream", "a quote is not closed", "close the quote"),
    ("expected ',' or", "a bracket or brace is not closed, or a comma is missing", "close it, or add the comma"),
    ("expected <block end>", "the indentation does not match the lines above", "align it with its neighbours"),
    ("cannot start any token", "a value begins with a character that YAML reserves", "put the value in quotes"),
    ("unknown escape character", "a backslash in double quotes is not a known escape", "use single quotes"),
    ("too many values", f"the recipe has more than {MAX_VALUES:,} values", "check that the file is a recipe"),
    ("another document", "a second document begins (`---`)", "keep one recipe in a file"),
)  # fmt: skip


@dataclass
class Document:
    """A YAML text as plain data."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Line (from 1) of each dotted path; list items as `a.b.0`."""
    problems: list[Problem] = field(default_factory=list)
    """Mistakes that do not stop the reading, such as duplicate keys."""


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Parses text to nodes. It has no constructor, so that no tag can create an object."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem="too many values", problem_mark=self.get_mark())
        compose: Callable[..., Any] = super().compose_node
        return compose(parent, index)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0]:
            return resolve_scalar(value)
        return {ScalarNode: _TAG + "str", SequenceNode: _TAG + "seq", MappingNode: _TAG + "map"}[kind]


def resolve_scalar(text: str) -> str:
    """Return the tag of an unquoted text by YAML 1.2: bool, null, int, float or str."""
    if text in _BOOLEANS:
        return _TAG + "bool"
    if text in _NULLS:
        return _TAG + "null"
    if len(text) <= MAX_NUMBER_LENGTH:
        if _WHOLE.fullmatch(text):
            return _TAG + "int"
        if _REAL.fullmatch(text):
            return _TAG + "float"
    return _TAG + "str"


def read_text(path: Path) -> str:
    """Return the text of a recipe's file, without a byte-order mark.

    Raises:
        RecipeError: the file cannot be read, is larger than `MAX_BYTES`, or is not UTF-8.
    """
    shown = show_path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(Problem(f"the recipe cannot be read: {error.strerror}", shown)) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(
            Problem(f"the recipe is larger than {MAX_BYTES:,} bytes", shown, "check that the file is a recipe")
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"the recipe is not UTF-8: byte 0x{content[error.start]:02x}"
        raise RecipeError(Problem(what, f"{shown}:{line}", "save the file as UTF-8")) from None


def read_yaml(text: str, file: Path | None) -> Document:
    """Read a YAML mapping into plain data (dict, list, str, int, float, bool, None), with the line of each value.

    Raises:
        RecipeError: the text is not YAML, or not one mapping, or exceeds the limits when its aliases are expanded.
    """

    def place(line: int) -> str:
        return f"{show_path(file)}:{line}" if file else f"line {line}"

    node = _compose(text.removeprefix("\ufeff"), place)
    if node is None:
        where = show_path(file) if file else None
        raise RecipeError(Problem("the recipe is empty", where, "start from one that `orchestrator recipes` lists"))
    if not isinstance(node, MappingNode):
        line = node.start_mark.line + 1
        raise RecipeError(
            Problem("the recipe is not a mapping of keys to values", place(line), "write `key: value` lines")
        )
    converter = _Converter(place)
    data = converter.convert(node, "", 0)
    assert isinstance(data, dict)
    return Document(data, converter.lines, converter.problems)


def read_value(text: str, where: str) -> Any:
    """Parse a YAML value, as it follows `key=` on the command line; raises RecipeError as `read_yaml` does."""

    def place(_: int) -> str:
        return where

    node = _compose(text, place)
    if node is None:
        return None
    converter = _Converter(place)
    value = converter.convert(node, "", 0)
    if converter.problems:
        raise RecipeError(converter.problems)
    return value


def _compose(text: str, place: Callable[[int], str]) -> Node | None:
    try:
        node: Node | None = _Loader(text).get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise RecipeError(Problem(what, place(line), "remove it")) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(_explain_syntax(error, place(mark.line + 1 if mark else 1))) from None
    except RecursionError:
        raise RecipeError(Problem("the recipe is nested too deeply", place(1), "remove brackets")) from None
    return node


def _explain_syntax(error: yaml.MarkedYAMLError, where: str) -> Problem:
    problem = error.problem or error.context or "not valid YAML"
    for part, what, remedy in _SYNTAX:
        if part in problem:
            opened = error.context_mark
            if opened and error.problem_mark and opened.line != error.problem_mark.line:
                return Problem(f"{what} (begun in line {opened.line + 1})", where, remedy)
            return Problem(what, where, remedy)
    return Problem(f"this is not valid YAML: {problem}", where, "check the punctuation and the indentation")


class _Converter:
    """Converts nodes to plain data, and collects the line of each path, and mistakes that do not stop the reading."""

    def __init__(self, place: Callable[[int], str]) -> None:
        self.place = place
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []
        self.num_values = 0

    def convert(self, node: Node, path: str, depth: int) -> Any:
        self.num_values += 1
        line = node.start_mark.line + 1
        if self.num_values > MAX_VALUES:
            what = f"the recipe grows to more than {MAX_VALUES:,} values when its aliases (`*name`) are written out"
            raise RecipeError(Problem(what, self.place(line), "write the values out, without aliases"))
        if depth > MAX_DEPTH:
            what = f"the recipe is nested more than {MAX_DEPTH} levels deep"
            raise RecipeError(Problem(what, self.place(line), "remove levels, or an alias that holds itself"))
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._convert_mapping(node, path, depth)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return self._convert_sequence(node, path, depth)
        if isinstance(node, ScalarNode):
            return self._convert_scalar(node)
        return self._refuse_tag(node)

    def _convert_mapping(self, node: MappingNode, path: str, depth: int) -> dict[str, Any]:
        data: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.problems.append(Problem("a key is a list or mapping", self.place(line), "write the key as text"))
                continue
            key = key_node.value
            where = f"{path}.{key}" if path else key
            if key == "<<":
                self.problems.append(Problem("merge keys (`<<`) are not read", self.place(line), "write the keys out"))
                continue
            if key in first:
                what = f"the key `{where}` is given twice, first in line {first[key]}"
                self.problems.append(Problem(what, self.place(line), "keep one of the two"))
                continue
            first[key] = line
            self.lines.setdefault(where, line)
            data[key] = self.convert(value_node, where, depth + 1)
        return data

    def _convert_sequence(self, node: SequenceNode, path: str, depth: int) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            where = f"{path}.{index}"
            self.lines.setdefault(where, item.start_mark.line + 1)
            items.append(self.convert(item, where, depth + 1))
        return items

    def _convert_scalar(self, node: ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", resolve_scalar(text).removeprefix(_TAG)):
            return _read_scalar(kind, text)
        return self._refuse_tag(node)

    def _refuse_tag(self, node: Node) -> None:
        tag = node.tag.replace(_TAG, "!!")
        what = f"the tag `{tag}` is not allowed: a recipe holds plain values only"
        self.problems.append(Problem(what, self.place(node.start_mark.line + 1), "remove the tag"))


def _read_scalar(kind: str, text: str) -> Any:
    match kind:
        case "bool":
            return _BOOLEANS[text]
        case "null":
            return None
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return text
