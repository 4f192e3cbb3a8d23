"""The confusion matrix, and the pairs of classes that are confused most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from orchestrator.report.charts.base import FULL_WIDTH, HALF_WIDTH, Chart
from orchestrator.report.colours import Colours
from orchestrator.report.drawing import Size, both_sizes, colour_key, drawing, rectangle, shortened, text, text_width
from orchestrator.report.markup import element
from orchestrator.report.numbers import number
from orchestrator.report.tables import TableColumn, table

_MOST_WITH_NUMBERS = 14
_MOST_WITH_NAMES = 45
_MOST_OF_HALF = 24
_LARGEST_MATRIX = 700.0
_MOST_DRAWN = 160
_MOST_PAIRS = 10


@dataclass(frozen=True)
class Confusion:
    """counts[true][predicted], in the order of the labels."""

    labels: list[str]
    counts: list[list[int]]

    @classmethod
    def of(cls, details: dict[str, Any]) -> Confusion | None:
        """Return the matrix of the details; None if they hold none, or one whose shape does not fit the labels."""
        labels, rows = details.get("labels"), details.get("confusion_matrix")
        if not isinstance(labels, list) or not isinstance(rows, list) or not labels:
            return None
        square = len(rows) == len(labels) and all(isinstance(row, list) and len(row) == len(labels) for row in rows)
        if not square:
            return None
        counts = [[int(number(value) or 0) for value in row] for row in rows]
        return cls([str(label) for label in labels], counts)

    def share(self, truth: int, predicted: int) -> float:
        """Return the share of a class's examples that were predicted as another; 0 for a class without examples."""
        return self.counts[truth][predicted] / max(1, sum(self.counts[truth]))

    def confused_pairs(self) -> list[tuple[int, int]]:
        """Return (true, predicted) of the errors, the most frequent first."""
        size = range(len(self.labels))
        errors = [(true, predicted) for true in size for predicted in size if true != predicted]
        found = [pair for pair in errors if self.counts[pair[0]][pair[1]] > 0]
        return sorted(found, key=lambda pair: (-self.counts[pair[0]][pair[1]], pair))


def confusion_chart(details: dict[str, Any], split: str) -> Chart | None:
    """Return the chart for single-label classification; None for other tasks."""
    found = Confusion.of(details)
    if found is None:
        return None
    # A matrix without names needs less room.
    small = not _MOST_OF_HALF < len(found.labels) <= _MOST_WITH_NAMES
    words = f"Rows are the true classes of {split}, columns the predicted ones; colours are shares of a row."
    if len(found.labels) > _MOST_WITH_NAMES:
        words += " In the order of the table of classes; rest the pointer on a cell for its names."
    matrix = Markup("")
    if len(found.labels) <= _MOST_DRAWN:
        matrix = both_sizes(lambda size: draw(found, split, size), HALF_WIDTH if small else FULL_WIDTH)
    return Chart(
        title="Confusion matrix" if matrix else "Confused classes",
        drawing=matrix,
        caption=words if matrix else "",
        full_width=not small,
        key=colour_key("0 %", "100 %", "share of the true class") if matrix else None,
        below=list_pairs(found),
    )


def list_pairs(found: Confusion) -> Markup:
    pairs = found.confused_pairs()
    if not pairs:
        return element("p", "No example was taken for another class.")
    columns = [
        TableColumn("true"),
        TableColumn("predicted"),
        TableColumn("examples", numeric=True),
        TableColumn("share", numeric=True),
    ]
    rows = [
        [
            found.labels[true],
            found.labels[predicted],
            f"{found.counts[true][predicted]:,}",
            f"{found.share(true, predicted):.0%}",
        ]
        for true, predicted in pairs[:_MOST_PAIRS]
    ]
    return table(columns, rows)


def draw(found: Confusion, split: str, size: Size) -> Markup:
    num = len(found.labels)
    named = num <= (_MOST_WITH_NUMBERS if size.narrow else _MOST_WITH_NAMES)
    longest = max(text_width(label, 11) for label in found.labels)
    left = min(size.width * 0.3, longest + 12) if named else 18.0
    # The names slant to the right, below the key.
    above = 22 + (min(110.0, longest * 0.72 + 12) if named else 0.0)
    cell = min(44.0, _LARGEST_MATRIX / num, (size.width - left - (above * 0.7 if named else 0)) / num)
    colours, parts = Colours(0.0, 1.0), []
    for true, row in enumerate(found.counts):
        y = above + true * cell
        if named:
            parts.append(text(left - 6, y + cell / 2 + 4, shortened(found.labels[true], left - 8, 11), "tick end"))
            x = left + (true + 0.5) * cell
            name = shortened(found.labels[true], (above - 34) / 0.72 + 1, 11)
            parts.append(slanted_text(x, above - 6, name))
        for predicted, amount in enumerate(row):
            if amount:
                parts += draw_cell(found, true, predicted, left + predicted * cell, y, cell, colours)
    parts.append(rectangle(left, above, num * cell, num * cell, "outline"))
    if not named:
        parts.append(text(left, 14, "predicted \N{RIGHTWARDS ARROW}", "title"))
    return drawing(size, above + num * cell + 4, parts, f"Confusion matrix of {num:,} classes on {split}")


def draw_cell(
    found: Confusion, true: int, predicted: int, x: float, y: float, cell: float, colours: Colours
) -> list[Markup]:
    amount, share = found.counts[true][predicted], found.share(true, predicted)
    step, gap = colours.step(share), 1.0 if cell > 12 else 0.0
    # Only errors have tooltips: those of the diagonal would double the page of a large matrix and say little.
    tip = (
        f"{found.labels[true]} taken for {found.labels[predicted]}: {amount:,} ({share:.0%})"
        if true != predicted
        else None
    )
    parts = [rectangle(x + gap, y + gap, cell - 2 * gap, cell - 2 * gap, f"cell c{step}", tip)]
    if len(found.labels) <= _MOST_WITH_NUMBERS and text_width(str(amount), 11) <= cell - 2:
        parts.append(text(x + cell / 2, y + cell / 2 + 4, str(amount), f"value middle c{step}"))
    return parts


def slanted_text(x: float, y: float, words: str) -> Markup:
    return element("text", words, x=float(x), y=float(y), class_="tick", transform=f"rotate(-45 {x:.1f} {y:.1f})")
