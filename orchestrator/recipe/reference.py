"""The JSON Schema of recipes, for editors, and for messages about the values that a key accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from orchestrator.recipe.schema import Recipe, Section

Node = dict[str, Any]


class _Generator(GenerateJsonSchema):
    """Leaves out titles that pydantic derives from names of fields; titles of the schema itself are descriptions."""

    def field_title_should_be_set(self, _schema: Any) -> bool:
        return False


def json_schema() -> Node:
    """Return the JSON Schema (draft 2020-12) of recipes, with a description of each key; editors use it for YAML."""
    return section_schema(Recipe, "Recipe of transfer-orchestrator")


def section_schema(section: type[Section], title: str) -> Node:
    """Return the JSON Schema of a section of recipes, such as a task's options."""
    schema = section.model_json_schema(schema_generator=_Generator)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": title}


@cache
def shape_of(section: type[Section]) -> Shape:
    """Return the shape of a section of recipes, built once."""
    return Shape(section.model_json_schema(schema_generator=_Generator))


class Shape:
    """The schema of a section of recipes, by path: keys and list indices, none for the whole section."""

    def __init__(self, schema: Node) -> None:
        self._schema = schema

    def find(self, path: Sequence[str | int]) -> Node | None:
        """Return the schema of the value at `path`, or None if the path cannot exist."""
        node: Node | None = self._schema
        for part in path:
            found = (self._step(option, part) for option in self.options(node or {}))
            node = next((child for child in found if child is not None), None)
        return node

    def options(self, node: Node) -> list[Node]:
        """Return the alternatives of a value, including `null`; most values have one."""
        return [self._resolve(option) for option in node.get("anyOf", [node])]

    def keys(self, path: Sequence[str | int]) -> list[str]:
        """Return the keys of the section at `path`."""
        return [key for option in self.options(self.find(path) or {}) for key in option.get("properties", {})]

    def required(self, path: Sequence[str | int]) -> list[str]:
        """Return the required keys of the section at `path`."""
        return [key for option in self.options(self.find(path) or {}) for key in option.get("required", [])]

    def sections(self, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        """Return the paths of all mappings with named keys."""
        keys = self.keys(path)
        if keys:
            yield path
        for key in keys:
            yield from self.sections((*path, key))

    def accepts(self, node: Node) -> str:
        """Return the accepted values in words: `a whole number above 0, or auto`."""
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
