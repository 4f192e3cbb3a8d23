"""Tables: plain ones, and those that a click on a heading sorts (with the page's few lines of script)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report.markup import Child, Markup, element, join

# A longer table scrolls in a box of its own.
_MOST_OPEN_ROWS = 40
# As many as the style sheet lets print.
_MOST_PRINTED_ROWS = 100


@dataclass(frozen=True)
class TableColumn:
    heading: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell that sorts by something other than what it shows."""

    shown: Child
    key: float | str | None
    """None sorts last, whichever way."""


Row = Sequence[Child | Cell]


def table(
    columns: Sequence[TableColumn],
    rows: Sequence[Row],
    sortable: bool = False,
    marked: int | None = None,
    fitted: bool = False,
) -> Markup:
    """A table in a box that scrolls sideways on narrow pages.

    Args:
        marked: index of a row that stands out.
        fitted: as wide as its content needs, not as the page.
    """
    head = element("tr", *(_heading(column, sortable) for column in columns))
    body = [
        element("tr", *map(_cell, row, columns), class_="marked" if index == marked else None)
        for index, row in enumerate(rows)
    ]
    drawn = element("table", element("thead", head), element("tbody", *body), class_="sortable" if sortable else None)
    long, cut = len(rows) > _MOST_OPEN_ROWS, len(rows) > _MOST_PRINTED_ROWS
    classes = [name for name, on in (("scroll", True), ("long", long), ("cut", cut), ("fitted", fitted)) if on]
    # Reachable by keyboard, so that it can be scrolled without a mouse.
    return element("div", drawn, class_=" ".join(classes), tabindex="0" if long else None)


def pairs(rows: Sequence[tuple[Child, Child]]) -> Markup:
    """Names with their values."""
    return element("dl", *(join([element("dt", name), element("dd", value)]) for name, value in rows))


def unbroken(words: Sequence[str]) -> Markup:
    """Words with commas, in lines that break between them and not within (`1e-3` holds a hyphen)."""
    with_commas = [*(f"{word}," for word in words[:-1]), *words[-1:]]
    return join([element("span", word, class_="unbroken") for word in with_commas], " ")


def _heading(column: TableColumn, sortable: bool) -> Markup:
    return element(
        "th",
        column.heading,
        scope="col",
        class_="number" if column.numeric else None,
        data_sort=("number" if column.numeric else "text") if sortable else None,
    )


def _cell(value: Child | Cell, column: TableColumn) -> Markup:
    class_ = "number" if column.numeric else None
    if not isinstance(value, Cell):
        return element("td", value, class_=class_)
    return element("td", value.shown, class_=class_, data_key="" if value.key is None else _key(value.key))


def _key(key: float | str) -> str:
    return key if isinstance(key, str) else repr(float(key))
