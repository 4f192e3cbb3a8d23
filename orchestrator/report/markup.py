"""HTML and SVG built from parts, so that no text from data can become markup: what is not `Markup` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

_WITHOUT_END = frozenset({"br", "link", "meta", "wbr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = Markup | str | int | None


def clean(text: str) -> str:
    """The text without control characters, direction overrides and lone surrogates; line breaks and tabs stay."""
    if text.isprintable():
        return text
    kept = "\n\t\N{NO-BREAK SPACE}"
    return "".join(
        character if character.isprintable() or character in kept else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def escape(value: Child) -> Markup:
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else html.escape(clean(str(value))))


def join(children: Iterable[Child], between: str = "") -> Markup:
    return Markup(between.join(escape(child) for child in children))


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """One element. `class_` stands for `class`, other `_` for `-`; None and False leave an attribute out."""
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _WITHOUT_END:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def coordinate(value: float) -> str:
    """A position in a drawing: a tenth of a pixel is as fine as anyone sees."""
    text = f"{value:.1f}"
    return "0" if text == "-0.0" else text.removesuffix(".0")


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{coordinate(value) if isinstance(value, float) else escape(str(value))}"'
