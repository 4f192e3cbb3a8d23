"""HTML and SVG in which no text from data can become markup: whatever is not `Markup` is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_WITHOUT_END = frozenset({"br", "wbr"})

Child = Markup | str | int | None


def clean(text: str) -> str:
    """Replace control characters, direction overrides and lone surrogates; line breaks and tabs stay."""
    if text.isprintable():
        return text
    kept = "\n\t\N{NO-BREAK SPACE}"
    return "".join(
        character if character.isprintable() or character in kept else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _printable(value: Any) -> Any:
    """Return a value as templates print it."""
    if value is None:
        return ""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = Environment(
    loader=PackageLoader("orchestrator.report"),
    autoescape=True,
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, /, **values: Any) -> Markup:
    """Return a template of this package with values filled in; text among them is cleaned and escaped."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


def escape(value: Child) -> Markup:
    """Return a value as markup: text is cleaned and escaped, None is empty."""
    return value if isinstance(value, Markup) else Markup.escape(_printable(value))


def join(children: Iterable[Child], between: str = "") -> Markup:
    """Return children one after the other, text among them escaped."""
    return Markup(between.join(escape(child) for child in children))


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return one element. `class_` stands for `class`, other `_` for `-`; None and False leave an attribute out."""
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _WITHOUT_END:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def coordinate(value: float) -> str:
    """Return a position in a drawing, rounded to a tenth of a pixel."""
    text = f"{value:.1f}"
    return "0" if text == "-0.0" else text.removesuffix(".0")


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{coordinate(value) if isinstance(value, float) else escape(str(value))}"'
