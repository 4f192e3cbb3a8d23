"""The score of each trial in the order in which they ended, and the best so far, over the cost of the search."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from markupsafe import Markup

from orchestrator.report.analysis import best_so_far
from orchestrator.report.charts.base import Chart, View
from orchestrator.report.charts.plot import Plot, Position
from orchestrator.report.drawing import Frame, circle, curve, steps, text
from orchestrator.report.numbers import plain
from orchestrator.report.records import Search
from orchestrator.report.scales import Linear, add_margin, fit_scale

_SECONDS_OF_LARGE_SEARCH = 20_000


def progress(view: View) -> Chart | None:
    """Return the chart; None for fewer than two trials with a score."""
    if len(view.search.ranked) < 2:
        return None
    words = (
        "Each point is a trial, at what the search had spent when it ended. The steps are the best so far: where they "
        "stay level, more trials of this kind bring little."
    )
    failed = any(trial.score is None for trial in view.search.trials)
    if failed:
        words += " \N{MULTIPLICATION SIGN}: without a score."
    words += view.beyond_note(trial.score or 0.0 for trial in view.search.ranked)
    return Chart(title="Best so far", drawing=plot(view).both_sizes(), caption=words)


def spent(search: Search) -> tuple[list[float], str]:
    """Return the cost of the search when each trial ended, and its unit; the number of trials if costs are unknown."""
    costs = [trial.core_seconds for trial in search.trials]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or sum(known) == 0:
        return [float(index + 1) for index in range(len(costs))], "trials"
    large = sum(known) > _SECONDS_OF_LARGE_SEARCH
    return [total / (3600 if large else 1) for total in accumulate(known)], "core-hours" if large else "core-seconds"


def plot(view: View) -> Plot:
    totals, unit = spent(view.search)
    ended = list(zip(view.search.trials, totals, strict=True))
    scored = [(trial, total, trial.score) for trial, total in ended if trial.score is not None]
    best = best_so_far([score for _, _, score in scored], view.search.higher_is_better)

    def marks(frame: Frame, position: Position) -> Iterator[Markup]:
        line = [position(total, view.clamp(score)) for (_, total, _), score in zip(scored, best, strict=True)]
        yield curve(steps(line, frame.end), "line winner")
        for trial, total in ended:
            if trial.score is None:
                tip = f"trial {plain(trial.id)}: {trial.reason or trial.status}"
                x, _ = position(total, view.low)
                yield text(x, frame.floor - 3, "\N{MULTIPLICATION SIGN}", "tick middle", tip)
        for trial, total, score in scored:
            yield circle(*position(total, view.clamp(score)), view.radius, view.dot(trial), view.tip(trial))

    return Plot(
        "trials" if unit == "trials" else f"{unit} spent by all trials",
        view.score_title,
        f"Best {view.score_title} so far over {unit}",
        lambda start, end: fit_scale([0.0, totals[-1]], start, end, log=False),
        lambda start, end: Linear(*add_margin(view.low, view.high), start, end),
        marks,
    )
