"""Plots of lines and points over two axes of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup

from orchestrator.report.charts.base import HALF_WIDTH
from orchestrator.report.drawing import Frame, Size, both_sizes
from orchestrator.report.scales import Scale

MakeScale = Callable[[float, float], Scale]
"""Returns a scale between two positions in a drawing."""
Position = Callable[[float, float], tuple[float, float]]
"""Returns the position of a pair of values in a drawing."""


@dataclass(frozen=True)
class Plot:
    """Two axes, and what is drawn over them."""

    x_title: str
    y_title: str
    description: str
    x: MakeScale
    y: MakeScale
    marks: Callable[[Frame, Position], Iterable[Markup]]
    """Draws lines and points."""
    height: float = 320.0
    left: float = 52.0
    right: float = 12.0
    is_clipped: bool = False
    """Whether marks end at the sides of the frame."""
    axis_x: Callable[[Frame, Scale], None] | None = None
    """Draws the horizontal axis, where it is not one of numbers."""
    legend: Callable[[Frame], Iterable[Markup]] | None = None

    def draw(self, size: Size) -> Markup:
        frame = Frame(size, self.height, self.left, self.right, 30, 44)
        x, y = self.x(frame.left, frame.end), self.y(frame.floor, frame.top)
        frame.axis_y(y, self.y_title)
        if self.axis_x is None:
            frame.axis_x(x, self.x_title)
        else:
            self.axis_x(frame, x)
        marks = list(self.marks(frame, lambda first, second: (x(first), y(second))))
        frame.add(*([frame.inside(marks)] if self.is_clipped else marks))
        if self.legend is not None:
            frame.add(*self.legend(frame))
        return frame.drawn(self.description)

    def both_sizes(self) -> Markup:
        return both_sizes(self.draw, HALF_WIDTH)
