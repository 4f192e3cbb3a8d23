"""The parts of an SVG drawing: shapes, text, a frame with axes, a colour key.

Colours and fonts come from the page's style sheet, by class, so one drawing serves light and dark pages and print.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from orchestrator.report.colours import NUM_STEPS
from orchestrator.report.markup import clean, coordinate, element, join
from orchestrator.report.scales import Scale, Tick

# Width of a character in the widest common sans-serif font, as a share of its size.
_CHARACTER = 0.62
TEXT_SIZE = 12.0


@dataclass(frozen=True)
class Size:
    """The size of a drawing in CSS pixels."""

    width: float
    narrow: bool


Draw = Callable[[Size], Markup]


@dataclass
class Frame:
    """The rectangle that values are drawn in, and the drawn parts."""

    size: Size
    height: float
    left: float
    right: float
    top: float
    bottom: float
    parts: list[Markup] = field(default_factory=list)

    @property
    def end(self) -> float:
        return self.size.width - self.right

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def add(self, *parts: Markup) -> None:
        self.parts.extend(parts)

    def axis_x(self, scale: Scale, title: str, most: int | None = None) -> None:
        """Draw ticks and title below; as many ticks as there is room for labels."""
        ticks = spaced(scale, most or max(2, int((self.end - self.left) / 60)))
        for tick in ticks:
            at = scale(tick.value)
            label = min(at, self.size.width - text_width(tick.label, 11) / 2)
            self.add(line(at, self.top, at, self.floor, "grid"))
            self.add(text(label, self.floor + 17, tick.label, "tick middle"))
        self.add(line(self.left, self.floor, self.end, self.floor, "axis"))
        self.add(text((self.left + self.end) / 2, self.height - 6, title, "title middle"))

    def axis_y(self, scale: Scale, title: str, most: int = 6) -> None:
        """Draw ticks at the left, and the title above them, where it is horizontal."""
        for tick in scale.ticks(most):
            at = scale(tick.value)
            self.add(line(self.left, at, self.end, at, "grid"), text(self.left - 8, at + 4, tick.label, "tick end"))
        self.add(text(0, 14, title, "title"))

    def inside(self, parts: Iterable[Markup]) -> Markup:
        """Return drawn parts, clipped at the frame's sides."""
        width, height = self.end - self.left, self.floor - self.top
        box = " ".join(coordinate(value) for value in (self.left, self.top - 6, width + 6, height + 12))
        return element(
            "svg",
            *parts,
            x=self.left,
            y=self.top - 6.0,
            width=width + 6.0,
            height=height + 12.0,
            viewBox=box,
        )

    def drawn(self, description: str) -> Markup:
        return drawing(self.size, self.height, self.parts, description)


def drawing(size: Size, height: float, parts: Sequence[Markup], description: str) -> Markup:
    box = f"0 0 {coordinate(size.width)} {coordinate(height)}"
    return element(
        "svg",
        *parts,
        viewBox=box,
        width=float(size.width),
        height=float(height),
        role="img",
        aria_label=description,
        class_="drawing narrow" if size.narrow else "drawing wide",
    )


def both_sizes(draw: Draw, width: float, narrow_width: float = 360.0) -> Markup:
    """Return the drawing for wide pages and for phones; the style sheet shows one of them."""
    return join([draw(Size(width, narrow=False)), draw(Size(narrow_width, narrow=True))])


def text(x: float, y: float, words: str, class_: str, tip: str | None = None) -> Markup:
    return element("text", title(tip) if tip else None, words, x=float(x), y=float(y), class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def circle(x: float, y: float, radius: float, class_: str, tip: str | None = None) -> Markup:
    return element("circle", title(tip) if tip else None, cx=float(x), cy=float(y), r=float(radius), class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str, tip: str | None = None) -> Markup:
    return element(
        "rect",
        title(tip) if tip else None,
        x=float(x),
        y=float(y),
        width=float(width),
        height=float(height),
        class_=class_,
    )


def path(points: Sequence[tuple[float, float]]) -> str:
    """Return the path data of a line through the points."""
    return "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)


def steps(points: Sequence[tuple[float, float]], until: float) -> str:
    """Return the path data of a line that keeps its height until the next point, and the last one until `until`."""
    data = f"M{coordinate(points[0][0])} {coordinate(points[0][1])}"
    data += "".join(f"H{coordinate(x)}V{coordinate(y)}" for x, y in points[1:])
    return f"{data}H{coordinate(until)}"


def curve(data: str, class_: str, tip: str | None = None) -> Markup:
    return element("path", title(tip) if tip else None, d=data, class_=class_)


def title(words: str) -> Markup:
    """Return the text to show when the pointer rests on a shape."""
    return element("title", words)


def text_width(words: str, size: float = TEXT_SIZE) -> float:
    """Return an upper estimate of the width of text, in pixels."""
    units = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in words)
    return units * _CHARACTER * size


def shortened(words: str, width: float, size: float = TEXT_SIZE) -> str:
    """Return text on one line, cut at the end to fit the width."""
    words = " ".join(clean(words).split())
    if text_width(words, size) <= width:
        return words
    while words and text_width(words, size) > width - _CHARACTER * size:
        words = words[:-1]
    return f"{words.rstrip()}\N{HORIZONTAL ELLIPSIS}"


def spaced(scale: Scale, most: int) -> list[Tick]:
    """Return ticks whose labels do not touch."""
    kept: list[Tick] = []
    for tick in scale.ticks(most):
        room = (text_width(tick.label, 11) + text_width(kept[-1].label, 11)) / 2 + 6 if kept else 0.0
        if not kept or abs(scale(tick.value) - scale(kept[-1].value)) >= room:
            kept.append(tick)
    return kept


def colour_key(worst: str, best: str, words: str) -> Markup:
    """Return a strip of all colours with labels at its ends."""
    left, step = text_width(worst, 11) + 6, 9.0
    width = left + NUM_STEPS * step + 6 + text_width(best, 11)
    strips = [rectangle(left + index * step, 2, step + 0.3, 11, f"cell c{index}") for index in range(NUM_STEPS)]
    ends = [text(left - 6, 12, worst, "tick end"), text(left + NUM_STEPS * step + 6, 12, best, "tick")]
    return element(
        "svg",
        *strips,
        *ends,
        viewBox=f"0 0 {coordinate(width)} 15",
        width=width,
        height=15.0,
        role="img",
        aria_label=f"{words}: from {worst}, the palest, to {best}, the strongest",
        class_="key",
    )
