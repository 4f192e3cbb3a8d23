"""Sections about the classes of a result: which are confused, and the scores of each."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from orchestrator.report.charts.confusion import confusion_chart
from orchestrator.report.colours import Colours
from orchestrator.report.markup import element, join
from orchestrator.report.numbers import MISSING, compact, metric
from orchestrator.report.page import Section, figures, section
from orchestrator.report.records import as_dict, finite_values, texts_of
from orchestrator.report.tables import Cell, Row, TableColumn, table


def class_sections(result: dict[str, Any], first_figure: int, heading: str) -> list[Section]:
    """Return a section for each split with details of classes: a confusion matrix, and a table of all classes."""
    sections = []
    for split, value in as_dict(result.get("details")).items():
        details = as_dict(value)
        chart, found = confusion_chart(details, split), class_table(details)
        drawn = figures([chart], first_figure) if chart else None
        first_figure += drawn is not None
        if (made := section(f"{heading} {split}", drawn, found)) is not None:
            sections.append(made)
    return sections


def class_table(details: dict[str, Any]) -> Markup | None:
    """Return precision, recall and F1 of each class, in the order of the labels; None if they were not computed."""
    labels, per_class = texts_of(details.get("labels")), as_dict(details.get("per_class"))
    rows: list[Row] = []
    for label in labels:
        values = finite_values(per_class.get(label))
        shown = [Cell(metric(values.get(name)), values.get(name)) for name in ("precision", "recall")]
        rows.append([label, *shown, share_cell(values.get("f1-score")), support_cell(values.get("support"))])
    if not per_class or not rows:
        return None
    names = ("precision", "recall", "F1", "examples")
    return table(
        [TableColumn("class"), *(TableColumn(name, numeric=True) for name in names)], rows, sortable=True, fitted=True
    )


def share_cell(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING, None)
    return Cell(join([element("i", class_=f"swatch c{Colours(0.0, 1.0).step(value)}"), metric(value)]), value)


def support_cell(value: float | None) -> Cell:
    return Cell(MISSING if value is None else compact(value), value)
