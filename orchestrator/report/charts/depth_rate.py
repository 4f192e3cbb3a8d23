"""Freeze depth against learning rate: cells if trials share rates, points if each trial has its own rate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from orchestrator.report.analysis import depth_order
from orchestrator.report.charts.base import FULL_WIDTH, HALF_WIDTH, Chart, View, describe
from orchestrator.report.drawing import Frame, Size, both_sizes, circle, rectangle, text, text_width
from orchestrator.report.numbers import compact, metric, number, plain
from orchestrator.report.records import Search, Trial
from orchestrator.report.scales import fit_scale

DEPTH, RATE = "transfer.freeze", "train.learning_rate"
_MOST_COLUMNS = 14
_MOST_COLUMNS_OF_HALF = 6


@dataclass(frozen=True)
class Plane:
    """The trials that have both a depth and a rate."""

    trials: list[Trial]
    """Best first; those without a score last."""
    depths: list[str]
    rates: list[float]

    @classmethod
    def of(cls, search: Search) -> Plane:
        unscored = [trial for trial in search.trials if trial.score is None]
        trials = [trial for trial in [*search.ranked, *unscored] if DEPTH in trial.parameters and rate_of(trial)]
        order = {depth_of(trial): depth_order(trial.parameters[DEPTH], search.num_layers) for trial in trials}
        return cls(trials, sorted(order, key=lambda depth: (order[depth], depth)), sorted(set(map(rate_of, trials))))

    @property
    def has_cells(self) -> bool:
        return len(self.rates) <= _MOST_COLUMNS and 2 * len(self.rates) <= len(self.trials)

    def best_at(self) -> dict[tuple[str, float], Trial]:
        found: dict[tuple[str, float], Trial] = {}
        for trial in self.trials:
            found.setdefault((depth_of(trial), rate_of(trial)), trial)
        return found


def depth_of(trial: Trial) -> str:
    return plain(trial.parameters[DEPTH])


def rate_of(trial: Trial) -> float:
    """Return the trial's rate, or 0 if it has none."""
    rate = number(trial.parameters.get(RATE))
    return rate if rate is not None and rate > 0 else 0.0


def depth_rate(view: View) -> Chart | None:
    """Return the chart; None unless depth and rate were both varied."""
    plane = Plane.of(view.search)
    if len(plane.depths) < 2 or len(plane.rates) < 2 or not view.search.ranked:
        return None
    full = not plane.has_cells or len(plane.rates) > _MOST_COLUMNS_OF_HALF
    draw = draw_cells if plane.has_cells else draw_points
    return Chart(
        title="Freeze depth and learning rate",
        drawing=both_sizes(lambda size: draw(view, plane, size), FULL_WIDTH if full else HALF_WIDTH),
        caption=caption(view, plane),
        full_width=full,
        key=view.key(),
    )


def caption(view: View, plane: Plane) -> str:
    leader = f"trial {view.search.leader.id}" if view.search.leader else "the best"
    if not plane.has_cells:
        return f"Each point is a trial, coloured by {view.score_title}; the ring is {leader}."
    words = f"The best {view.score_title} of the trials at each depth and rate; framed: {leader}."
    found = plane.best_at()
    if len(found) < len(plane.depths) * len(plane.rates):
        words += " Dashed: no trial there."
    if any(trial.score is None for trial in found.values()):
        words += " \N{MULTIPLICATION SIGN}: no trial there has a score."
    if any(ended_early(trial) for trial in found.values()):
        words += " Italic: ended early."
    return words if evenly_spaced(plane.rates) else f"{words} The rates are in order, not to scale."


def ended_early(trial: Trial) -> bool:
    return trial.score is not None and trial.status in ("stopped", "failed")


def evenly_spaced(rates: list[float]) -> bool:
    """Whether neighbouring rates have about the same ratio, so that equal columns are a logarithmic axis."""
    ratios = [high / low for low, high in pairwise(rates)]
    return max(ratios) <= 1.6 * min(ratios)


def row_height(plane: Plane, largest: float) -> float:
    return max(16.0, min(largest, 420 / len(plane.depths)))


def left_margin(plane: Plane) -> float:
    return max(40.0, max(text_width(depth) for depth in plane.depths) + 12)


def draw_cells(view: View, plane: Plane, size: Size) -> Markup:
    row = row_height(plane, 36)
    top, bottom, left = 28.0, 44.0, left_margin(plane)
    column = min(120.0, (size.width - left - 4) / len(plane.rates))
    right = size.width - left - column * len(plane.rates)
    frame = Frame(size, top + row * len(plane.depths) + bottom, left, right, top, bottom)
    found, leader = plane.best_at(), view.search.leader
    for index, depth in enumerate(plane.depths):
        y = frame.floor - (index + 1) * row
        frame.add(text(left - 8, y + row / 2 + 4, depth, "tick end"))
        for place, rate in enumerate(plane.rates):
            trial = found.get((depth, rate))
            frame.add(*draw_cell(view, trial, left + place * column, y, column, row))
    # Drawn last, so that no neighbour covers it.
    if leader is not None and found.get((depth_of(leader), rate_of(leader)) if leader in plane.trials else ("", 0.0)):
        x = left + plane.rates.index(rate_of(leader)) * column
        y = frame.floor - (plane.depths.index(depth_of(leader)) + 1) * row
        frame.add(rectangle(x + 1, y + 1, column - 2, row - 2, "winner-frame"))
    for place, label in enumerate(rate_labels(plane.rates, column)):
        frame.add(text(left + (place + 0.5) * column, frame.floor + 17, label, "tick middle"))
    frame.add(text(0, 14, "freeze depth", "title"))
    frame.add(text((left + frame.end) / 2, frame.height - 6, "learning rate", "title middle"))
    return frame.drawn(f"Heat map of {view.score_title} by freeze depth and learning rate")


def draw_cell(view: View, trial: Trial | None, x: float, y: float, width: float, height: float) -> list[Markup]:
    middle = (x + width / 2, y + height / 2 + 4)
    if trial is None or trial.score is None:
        cross = [text(*middle, "\N{MULTIPLICATION SIGN}", "tick middle")] if trial else []
        tip = describe(trial, view.search) if trial else None
        return [rectangle(x + 2, y + 2, width - 4, height - 4, "empty", tip), *cross]
    step = view.step(trial)
    slant = " slanted" if ended_early(trial) else ""
    label = text(*middle, cell_label(trial.score, width), f"value middle c{step}{slant}")
    return [rectangle(x + 1, y + 1, width - 2, height - 2, f"cell c{step}", describe(trial, view.search)), label]


def cell_label(score: float, width: float) -> str:
    """Return a score with as many decimals as fit into a cell."""
    choices = [metric(score)]
    if abs(score) < 10:
        choices += [f"{score:.3f}", f"{score:.2f}"]
        choices += [choice.replace("0.", ".", 1) for choice in choices if choice.startswith(("0.", "-0."))]
    return next((choice for choice in choices if text_width(choice, 11.5) <= width - 6), "")


def rate_labels(rates: list[float], column: float) -> list[str]:
    """Return a label per rate; every second or third is empty where there is no room for all."""
    labels = [compact(rate) for rate in rates]
    widest = max(text_width(label, 11) for label in labels) + 4
    every = max(1, -int(-widest // column))
    return [label if index % every == 0 else "" for index, label in enumerate(labels)]


def draw_points(view: View, plane: Plane, size: Size) -> Markup:
    row = row_height(plane, 40)
    left = left_margin(plane)
    frame = Frame(size, 28 + row * len(plane.depths) + 48, left, 10, 28, 48)
    for index, depth in enumerate(plane.depths):
        y = frame.floor - (index + 1) * row
        if index % 2 == 0:
            frame.add(rectangle(left, y, frame.end - left, row, "band"))
        frame.add(text(left - 8, y + row / 2 + 4, depth, "tick end"))
    scale = fit_scale(plane.rates, left + 12, frame.end - 12, log=True)
    frame.axis_x(scale, "learning rate (logarithmic)", 4 if size.narrow else 10)
    # Each trial has its own height within the row, so that equal rates do not overlap; the golden ratio spreads them.
    rows = {trial.id: (index * 0.618 % 1 - 0.5) * 0.6 for index, trial in enumerate(plane.trials)}
    for trial in reversed(plane.trials):
        y = frame.floor - (plane.depths.index(depth_of(trial)) + 0.5 + rows[trial.id]) * row
        x = scale(rate_of(trial))
        if trial.score is None:
            frame.add(text(x, y + 4, "\N{MULTIPLICATION SIGN}", "tick middle", view.tip(trial)))
        else:
            frame.add(circle(x, y, view.radius, view.dot(trial), view.tip(trial)))
        if trial is view.search.leader:
            frame.add(circle(x, y, view.radius + 4, "winner-frame"))
    frame.add(text(0, 14, "freeze depth", "title"))
    return frame.drawn(f"Trials by freeze depth and learning rate, coloured by {view.score_title}")
