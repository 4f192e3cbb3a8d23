"""Parallel coordinates: each searched parameter is an axis, the score is the last one, each trial a line across them.

On narrow pages the axes are one below the other, so that their labels stay readable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from orchestrator.report.analysis import depth_order
from orchestrator.report.charts.base import (
    FULL_WIDTH,
    Chart,
    View,
    is_logarithmic,
    lines_words,
    short_names,
    trial_lines,
)
from orchestrator.report.charts.depth_rate import DEPTH
from orchestrator.report.drawing import Size, both_sizes, drawing, line, path, shortened, text, text_width
from orchestrator.report.numbers import number, plain
from orchestrator.report.records import Search, Trial
from orchestrator.report.scales import fit_scale

_NOT_SET = "not set"
_MOST_LABELS = 14
# On an axis with numbers and words, each word has this share of it, at its beginning.
_SHARE_OF_WORDS = 0.16


@dataclass(frozen=True)
class Axis:
    """The axis of one parameter; positions are shares of the axis, 0 at its beginning."""

    name: str
    place: Callable[[Trial], float]
    labels: list[tuple[float, str]]


def parallel(view: View) -> Chart | None:
    """Return the chart; None for fewer than two varied parameters."""
    search = view.search
    names, varied = short_names(search.searched), find_varied(search)
    if len(varied) < 2:
        return None
    axes = [parameter_axis(view, name, names[name]) for name in varied]
    axes.append(score_axis(view))
    words = f"Each line is a trial, {lines_words(view)}. The best lie on top; the thick line is the leader."
    beyond = view.beyond_note(trial.score or 0.0 for trial in search.ranked)
    return Chart(
        title="All parameters at once",
        drawing=both_sizes(lambda size: draw(view, axes, size), FULL_WIDTH),
        caption=words + beyond,
        full_width=True,
        key=view.key(),
    )


def find_varied(search: Search) -> list[str]:
    """Return the searched parameters that have more than one value among the trials with a score."""
    values = {
        path: {plain(trial.parameters.get(path, _NOT_SET)) for trial in search.ranked} for path in search.searched
    }
    return [path for path, found in values.items() if len(found) > 1]


def parameter_axis(view: View, path: str, name: str) -> Axis:
    """Return an axis to scale for more than a few numbers, otherwise one with equal room for each value."""
    values = {trial.id: trial.parameters.get(path, _NOT_SET) for trial in view.search.ranked}
    numbers = {amount for value in values.values() if (amount := number(value)) is not None}
    words = {plain(value) for value in values.values() if number(value) is None}
    if path == DEPTH or len(numbers) < 2 or len(words) > 2:
        return listed_axis(view, path, name, values)
    begin = _SHARE_OF_WORDS * len(words)
    scale = fit_scale(sorted(numbers), begin, 1.0, is_logarithmic(view.search, path))
    places = {word: index * _SHARE_OF_WORDS for index, word in enumerate(sorted(words))}

    def place(trial: Trial) -> float:
        amount = number(values[trial.id])
        return places[plain(values[trial.id])] if amount is None else scale(amount)

    ticks = [(scale(tick.value), tick.label) for tick in scale.ticks(7)]
    return Axis(name, place, [(share, word) for word, share in places.items()] + ticks)


def listed_axis(view: View, path: str, name: str, values: dict[str, Any]) -> Axis:
    """Return an axis of values in order, with room for the lines of trials with the same value."""

    def order(value: Any) -> tuple[float, float, str]:
        if path == DEPTH and value != _NOT_SET:
            return 1.0, depth_order(value, view.search.num_layers), plain(value)
        amount = number(value)
        return (0.0, 0.0, plain(value)) if amount is None else (1.0, amount, "")

    known = {plain(value): order(value) for value in values.values()}
    listed = sorted(known, key=lambda word: known[word])
    room = 1 / len(listed)
    middles = {word: (index + 0.5) * room for index, word in enumerate(listed)}
    # No room is needed if every trial has its own value.
    width = 0.5 * room if len(values) > len(listed) else 0.0
    offsets = {trial.id: (index * 0.618 % 1 - 0.5) * width for index, trial in enumerate(view.search.ranked)}
    every = -(-len(listed) // _MOST_LABELS)
    labels = [(middles[word], word) for word in listed[::every]]
    return Axis(name, lambda trial: middles[plain(values[trial.id])] + offsets[trial.id], labels)


def score_axis(view: View) -> Axis:
    """Return the axis of scores; better is always further along."""
    ends = (0.0, 1.0) if view.search.higher_is_better else (1.0, 0.0)
    scale = fit_scale([view.low, view.high], *ends, log=False)
    labels = [(scale(tick.value), tick.label) for tick in scale.ticks(7)]
    return Axis(view.score_title, lambda trial: scale(view.clamp(trial.score or 0.0)), labels)


def draw(view: View, axes: list[Axis], size: Size) -> Markup:
    if size.narrow:
        height, spot = lay_below(axes, size)
    else:
        height, spot = lay_beside(axes, size)

    def shape(trial: Trial) -> str:
        return path([spot(index, axis.place(trial)) for index, axis in enumerate(axes)])

    parts = trial_lines(view, view.search.ranked, shape)
    for index, axis in enumerate(axes):
        parts += draw_axis(axis, index, len(axes) - 1, size, spot, column_width(axes, size))
    return drawing(size, height, parts, f"Parallel coordinates of {len(view.search.ranked)} trials")


Spot = Callable[[int, float], tuple[float, float]]


def column_width(axes: list[Axis], size: Size) -> float:
    return size.width if size.narrow else (size.width - 150) / (len(axes) - 1)


def lay_beside(axes: list[Axis], size: Size) -> tuple[float, Spot]:
    """Lay out vertical axes from left to right; return the drawing's height and a function of (axis, share)."""
    top, height = 44.0, 400.0
    step = column_width(axes, size)
    return height, lambda index, share: (75 + index * step, height - 14 - share * (height - 14 - top))


def lay_below(axes: list[Axis], size: Size) -> tuple[float, Spot]:
    """Lay out horizontal axes from top to bottom."""
    step, margin = 92.0, 20.0
    length = size.width - 2 * margin
    return 60 + step * (len(axes) - 1), lambda index, share: (margin + share * length, 26 + index * step)


def draw_axis(axis: Axis, index: int, last: int, size: Size, spot: Spot, room: float) -> list[Markup]:
    start, end = spot(index, 0.0), spot(index, 1.0)
    parts = [line(*start, *end, "axis")]
    if not size.narrow:
        parts.append(text(start[0], 16, shortened(axis.name, room - 10), "title middle", axis.name))
        # There are no lines right of the last axis and left of the first.
        aside, class_ = (7, "tick halo") if index == last else (-7, "tick end halo")
        for share, label in axis.labels:
            x, y = spot(index, share)
            parts.append(text(x + aside, y + 4, shortened(label, room - 16, 11), class_, label))
        return parts
    parts.append(text(0, start[1] - 10, shortened(axis.name, room), "narrow-title halo", axis.name))
    taken = -1e9
    for share, label in sorted(axis.labels):
        x, y = spot(index, share)
        words = shortened(label, 90, 11)
        half = text_width(words, 11) / 2
        x = min(size.width - half, max(half, x))
        if x - half >= taken + 4:
            parts.append(text(x, y + 16, words, "tick middle halo", label))
            taken = x + half
    return parts
