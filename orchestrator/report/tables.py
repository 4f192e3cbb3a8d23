"""Tables, which a click on a heading may sort (with the page's script)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from orchestrator.report.markup import Child, element, join, render

# A longer table scrolls in a box of its own.
_MOST_OPEN_ROWS = 40
# The number of rows that the style sheet prints.
_MOST_PRINTED_ROWS = 100


@dataclass(frozen=True)
class TableColumn:
    heading: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell that sorts by another value than it shows."""

    shown: Child
    key: float | str | None
    """None sorts last in both directions."""

    @property
    def sort_key(self) -> str:
        if self.key is None:
            return ""
        return self.key if isinstance(self.key, str) else repr(float(self.key))


Row = Sequence[Child | Cell]


def table(
    columns: Sequence[TableColumn],
    rows: Sequence[Row],
    sortable: bool = False,
    marked: int | None = None,
    fitted: bool = False,
) -> Markup:
    """Return a table in a box that scrolls sideways on narrow pages.

    Args:
        marked: index of a row to highlight.
        fitted: as wide as its content needs, not as the page.
    """
    # A long one is reachable by keyboard, so that it can be scrolled without a mouse.
    is_long, is_cut = len(rows) > _MOST_OPEN_ROWS, len(rows) > _MOST_PRINTED_ROWS
    classes = [name for name, on in (("scroll", True), ("long", is_long), ("cut", is_cut), ("fitted", fitted)) if on]
    return render(
        "table.html",
        columns=columns,
        rows=rows,
        sortable=sortable,
        marked=marked,
        is_long=is_long,
        **{"class": " ".join(classes)},
    )


def unbroken(words: Sequence[str]) -> Markup:
    """Return words separated by commas, in lines that break only between them (`1e-3` holds a hyphen)."""
    with_commas = [*(f"{word}," for word in words[:-1]), *words[-1:]]
    return join([element("span", word, class_="unbroken") for word in with_commas], " ")
