"""How the search went: the score of each trial in the order they ended, and the best so far, over what was spent."""

from __future__ import annotations

from itertools import accumulate

from orchestrator.report.analysis import best_so_far
from orchestrator.report.charts.base import HALF_WIDTH, Chart, View
from orchestrator.report.drawing import Frame, Size, both_sizes, circle, curve, steps, text
from orchestrator.report.markup import Markup
from orchestrator.report.numbers import plain
from orchestrator.report.records import Search
from orchestrator.report.scales import Linear, fit_scale, widen

_SECONDS_OF_LARGE_SEARCH = 20_000


def progress(view: View) -> Chart | None:
    """Shown from two scored trials on."""
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
    drawing = both_sizes(lambda size: draw(view, size), HALF_WIDTH)
    return Chart(title="Best so far", drawing=drawing, caption=words)


def spent(search: Search) -> tuple[list[float], str]:
    """What the search had spent when each trial ended, and its unit; the number of trials where no cost is known."""
    costs = [trial.core_seconds for trial in search.trials]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or sum(known) == 0:
        return [float(index + 1) for index in range(len(costs))], "trials"
    large = sum(known) > _SECONDS_OF_LARGE_SEARCH
    return [total / (3600 if large else 1) for total in accumulate(known)], "core-hours" if large else "core-seconds"


def draw(view: View, size: Size) -> Markup:
    frame = Frame(size, 320, 52, 12, 30, 44)
    totals, unit = spent(view.search)
    x = fit_scale([0.0, totals[-1]], frame.left, frame.end, log=False)
    y = Linear(*widen(view.low, view.high), frame.floor, frame.top)
    frame.axis_y(y, view.score_title)
    frame.axis_x(x, "trials" if unit == "trials" else f"{unit} spent by all trials")
    ended = list(zip(view.search.trials, totals, strict=True))
    scored = [(trial, total, trial.score) for trial, total in ended if trial.score is not None]
    best = best_so_far([score for _, _, score in scored], view.search.higher_is_better)
    line = [(x(total), y(view.clamp(score))) for (_, total, _), score in zip(scored, best, strict=True)]
    frame.add(curve(steps(line, frame.end), "line winner"))
    for trial, total in ended:
        if trial.score is None:
            tip = f"trial {plain(trial.id)}: {trial.reason or trial.status}"
            frame.add(text(x(total), frame.floor - 3, "\N{MULTIPLICATION SIGN}", "tick middle", tip))
    for trial, total, score in scored:
        frame.add(circle(x(total), y(view.clamp(score)), view.radius, view.dot(trial), view.tip(trial)))
    return frame.drawn(f"Best {view.score_title} so far over {unit}")
