"""The metric over the time of a trial: one curve per trial, and the best that any trial had reached by then."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from orchestrator.report.analysis import best_over_time, readable_range
from orchestrator.report.charts.base import Chart, View, lines_words, trial_lines
from orchestrator.report.charts.plot import Plot, Position
from orchestrator.report.drawing import Frame, circle, curve, path, steps
from orchestrator.report.records import Trial
from orchestrator.report.scales import Linear, add_margin, fit_scale

# Possible units of time, the best one first, with their titles.
_CLOCKS = (("seconds", "seconds since the trial began to train"), ("epoch", "epochs"), ("step", "steps"))
_MOST_POINTS = 30_000
Curve = list[tuple[float, float]]


def history(view: View) -> Chart | None:
    """Return the chart; None if no trial recorded more than its final score."""
    clock, words = find_clock(view)
    curves = {trial.id: points(trial, clock, view.search.metric) for trial in view.search.ranked}
    if not any(curves.values()):
        return None
    curves = thinned(curves)
    caption = "After each evaluation."
    if len(curves) > 1:
        caption = (
            f"Each curve is a trial, from evaluation to evaluation, {lines_words(view)}. The thick curve is the "
            "leader, the dashed steps the best that any trial had reached by then."
        )
    return Chart(title="Score over time", drawing=plot(view, curves, words).both_sizes(), caption=caption)


def find_clock(view: View) -> tuple[str, str]:
    """Return the first of seconds, epochs and steps that every recorded evaluation has, and its title."""
    rows = [row for trial in view.search.ranked for row in trial.history]
    return next(((clock, words) for clock, words in _CLOCKS if all(clock in row for row in rows)), _CLOCKS[-1])


def points(trial: Trial, clock: str, metric: str) -> Curve:
    return sorted((row[clock], row[metric]) for row in trial.history if clock in row and metric in row)


def thinned(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Return curves with every n-th point and the last one, so that a large search has a small page."""
    total = sum(map(len, curves.values()))
    every = -(-total // _MOST_POINTS)
    return {name: [*found[:-1:every], *found[-1:]] for name, found in curves.items()}


def plot(view: View, curves: dict[str, Curve], words: str) -> Plot:
    flat = [point for found in curves.values() for point in found]
    low, high = readable_range([score for _, score in flat], view.search.higher_is_better)
    latest = max(time for time, _ in flat)

    def marks(frame: Frame, position: Position) -> Iterator[Markup]:
        def shape(trial: Trial) -> str:
            return path([position(*point) for point in curves[trial.id]])

        yield from trial_lines(view, [trial for trial in view.search.ranked if len(curves[trial.id]) > 1], shape)
        for trial in view.search.ranked[::-1]:
            if len(curves[trial.id]) == 1:
                yield circle(*position(*curves[trial.id][0]), view.radius - 1, view.dot(trial), view.tip(trial))
        if len(curves) > 1:
            best = best_over_time(list(curves.values()), view.search.higher_is_better)
            end, _ = position(latest, low)
            yield curve(steps([position(*point) for point in best], end), "line best")

    return Plot(
        words,
        view.score_title,
        f"{view.score_title} of each trial over {words}",
        lambda start, end: fit_scale([0.0, latest], start, end, log=False),
        lambda start, end: Linear(*add_margin(low, high), start, end),
        marks,
        is_clipped=True,
    )
