"""The metric over a trial's time: one curve a trial, and the best that any trial had reached by then."""

from __future__ import annotations

from orchestrator.report.analysis import best_over_time, readable_range
from orchestrator.report.charts.base import HALF_WIDTH, Chart, View, lines_words, trial_lines
from orchestrator.report.drawing import Frame, Size, both_sizes, circle, curve, path, steps
from orchestrator.report.markup import Markup
from orchestrator.report.records import Trial
from orchestrator.report.scales import Linear, fit_scale, widen

# What a curve may run along, the best first, with how it is named.
_CLOCKS = (("seconds", "seconds since the trial began to train"), ("epoch", "epochs"), ("step", "steps"))
_MOST_POINTS = 30_000
Curve = list[tuple[float, float]]


def history(view: View) -> Chart | None:
    """Shown when any trial recorded more than its final score."""
    clock, words = find_clock(view)
    curves = {trial.id: points(trial, clock, view.search.metric) for trial in view.search.ranked}
    if not any(curves.values()):
        return None
    curves = thinned(curves)
    drawing = both_sizes(lambda size: draw(view, curves, words, size), HALF_WIDTH)
    caption = "After each evaluation."
    if len(curves) > 1:
        caption = (
            f"Each curve is a trial, from evaluation to evaluation, {lines_words(view)}. The thick curve is the "
            "leader, the dashed steps the best that any trial had reached by then."
        )
    return Chart(title="Score over time", drawing=drawing, caption=caption)


def find_clock(view: View) -> tuple[str, str]:
    """The first of seconds, epochs and steps that every recorded evaluation has."""
    rows = [row for trial in view.search.ranked for row in trial.history]
    return next(((clock, words) for clock, words in _CLOCKS if all(clock in row for row in rows)), _CLOCKS[-1])


def points(trial: Trial, clock: str, metric: str) -> Curve:
    return sorted((row[clock], row[metric]) for row in trial.history if clock in row and metric in row)


def thinned(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Every second, third ... point of long curves, so that a large search stays a small page; the last one is kept."""
    total = sum(map(len, curves.values()))
    every = -(-total // _MOST_POINTS)
    return {name: [*found[:-1:every], *found[-1:]] for name, found in curves.items()}


def draw(view: View, curves: dict[str, Curve], words: str, size: Size) -> Markup:
    frame = Frame(size, 320, 52, 12, 30, 44)
    flat = [point for found in curves.values() for point in found]
    low, high = readable_range([score for _, score in flat], view.search.higher_is_better)
    y = Linear(*widen(low, high), frame.floor, frame.top)
    latest = max(time for time, _ in flat)
    x = fit_scale([0.0, latest], frame.left, frame.end, log=False)
    frame.axis_y(y, view.score_title)
    frame.axis_x(x, words)

    def shape(trial: Trial) -> str:
        return path([(x(time), y(score)) for time, score in curves[trial.id]])

    inner = trial_lines(view, [trial for trial in view.search.ranked if len(curves[trial.id]) > 1], shape)
    for trial in view.search.ranked[::-1]:
        if len(curves[trial.id]) == 1:
            time, score = curves[trial.id][0]
            inner.append(circle(x(time), y(score), view.radius - 1, view.dot(trial), view.tip(trial)))
    if len(curves) > 1:
        best = best_over_time(list(curves.values()), view.search.higher_is_better)
        inner.append(curve(steps([(x(time), y(score)) for time, score in best], x(latest)), "line best"))
    frame.add(frame.inside(inner))
    return frame.drawn(f"{view.score_title} of each trial over {words}")
