"""The JSON Schema of recipes: for editors, and for saying in messages what a key accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from orchestrator.recipe.schema import Recipe, Section

Node = dict[str, Any]


class _Generator(GenerateJsonSchema):
    """Leaves out the titles that pydantic makes up from field names; those that the schema gives are descriptions."""

    def field_title_should_be_set(self, _schema: Any) -> bool:
        return False


def json_schema() -> Node:
    """JSON Schema (draft 2020-12) of a recipe, with a description of every key. Editors use it for YAML too."""
    return section_schema(Recipe, "Recipe of transfer-orchestrator")


def section_schema(section: type[Section], title: str) -> Node:
    """The same of one part of a recipe, such as a task's options."""
    schema = section.model_json_schema(schema_generator=_Generator)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": title}


@cache
def shape_of(section: type[Section]) -> Shape:
    """The shape of a part of the recipe, made once."""
    return Shape(section.model_json_schema(schema_generator=_Generator))


class Shape:
    """What a part of a recipe may hold, looked up by path: keys and list indices, none for the whole."""

    def __init__(self, schema: Node) -> None:
        self._schema = schema

    def find(self, path: Sequence[str | int]) -> Node | None:
        """The schema of the value at `path`, or None where there is no such place."""
        node: Node | None = self._schema
        for part in path:
            found = (self._step(option, part) for option in self.options(node or {}))
            node = next((child for child in found if child is not None), None)
        return node

    def options(self, node: Node) -> list[Node]:
        """The alternatives that a value may be, `null` included; one for most."""
        return [self._resolve(option) for option in node.get("anyOf", [node])]

    def keys(self, path: Sequence[str | int]) -> list[str]:
        """The keys of the section at `path`."""
        return [key for option in self.options(self.find(path) or {}) for key in option.get("properties", {})]

    def required(self, path: Sequence[str | int]) -> list[str]:
        """The keys that the section at `path` cannot do without."""
        return [key for option in self.options(self.find(path) or {}) for key in option.get("required", [])]

    def sections(self, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        """The paths of every mapping with named keys."""
        keys = self.keys(path)
        if keys:
            yield path
        for key in keys:
            yield from self.sections((*path, key))

    def accepts(self, node: Node) -> str:
        """What a value may be, in words: `a whole number above 0, or auto`."""
        if "title" in node and node.get("type") != "object":
            return str(node["title"])
        if "anyOf" in node:
            return ", or ".join(dict.fromkeys(self.accepts(option) for option in self.options(node)))
        if "const" in node or "enum" in node:
            values = [f"`{value}`" for value in node.get("enum", [node.get("const")])]
            return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
        if "items" in node:
            return f"a list with {self.accepts(self._resolve(node['items']))} for each item"
        return _accepts_type(node)

    def _resolve(self, node: Node) -> Node:
        reference = node.get("$ref")
        if reference is None:
            return node
        found: Node = self._schema["$defs"][reference.rpartition("/")[2]]
        return {**found, **{key: value for key, value in node.items() if key != "$ref"}}

    def _step(self, node: Node, part: str | int) -> Node | None:
        if "items" in node:
            child = node["items"] if str(part).isdecimal() else None
        else:
            child = node.get("properties", {}).get(part, node.get("additionalProperties"))
        if child is True:
            return {}
        return self._resolve(child) if isinstance(child, dict) else None


def _accepts_type(node: Node) -> str:
    if "properties" in node:
        return f"a mapping with some of the keys {', '.join(f'`{key}`' for key in node['properties'])}"
    words = {"string": "text", "boolean": "`true` or `false`", "null": "`null`", "object": "a mapping"}
    words |= {"integer": f"a whole number{_bounds(node)}", "number": f"a number{_bounds(node)}"}
    return words.get(node.get("type", ""), "any value")


def _bounds(node: Node) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{word} {_number(node[key])}" for key, word in words.items() if key in node]
    return f" {' and '.join(said)}" if said else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
