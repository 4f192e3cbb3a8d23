"""Score against cost: the trials that no cheaper one equals are the Pareto front, numbered and listed."""

from __future__ import annotations

from orchestrator.report.analysis import pareto_front
from orchestrator.report.charts.base import HALF_WIDTH, Chart, View, describe_parameters
from orchestrator.report.drawing import Frame, Size, both_sizes, circle, curve, steps, text
from orchestrator.report.markup import Markup
from orchestrator.report.numbers import metric, tenths
from orchestrator.report.records import Trial
from orchestrator.report.scales import Linear, fit_scale, widen
from orchestrator.report.tables import TableColumn, table, unbroken

_MOST_LISTED = 12


def cost(view: View) -> Chart | None:
    """Shown from two trials on whose score and cost are known."""
    trials = [trial for trial in view.search.ranked if trial.core_seconds is not None]
    if len(trials) < 2:
        return None
    found = front_of(trials, view)
    better = "up" if view.search.higher_is_better else "down"
    words = (
        f"Further {better} is better, further left is cheaper. The numbered trials are the Pareto front: none that "
        "costs as little is as good."
    )
    return Chart(
        title="Score against cost",
        drawing=both_sizes(lambda size: draw(view, trials, found, size), HALF_WIDTH),
        caption=words + view.beyond_note(trial.score or 0.0 for trial in trials),
        below=list_front(view, found),
    )


def front_of(trials: list[Trial], view: View) -> list[Trial]:
    costs = [(trial.core_seconds or 0.0, trial.score or 0.0) for trial in trials]
    return [trials[index] for index in pareto_front(costs, view.search.higher_is_better)]


def draw(view: View, trials: list[Trial], found: list[Trial], size: Size) -> Markup:
    frame = Frame(size, 320, 52, 12, 30, 44)
    costs = [trial.core_seconds or 0.0 for trial in trials]
    room = (frame.left + 12, frame.end - 12)
    x = fit_scale(costs, *room)
    if isinstance(x, Linear) and min(costs) < max(costs) / 2:
        x = fit_scale([0.0, *costs], frame.left, room[1], log=False)
    y = Linear(*widen(view.low, view.high, 0.1), frame.floor, frame.top)
    frame.axis_y(y, view.score_title)
    frame.axis_x(x, "core-seconds of the trial")

    def spot(trial: Trial) -> tuple[float, float]:
        return x(trial.core_seconds or 0.0), y(view.clamp(trial.score or 0.0))

    frame.add(curve(steps([spot(trial) for trial in found], frame.end), "line front"))
    on_front = {trial.id for trial in found}
    for trial in trials[::-1]:
        kind = "front-dot" if trial.id in on_front else view.dot(trial)
        frame.add(circle(*spot(trial), view.radius + (trial.id in on_front), kind, view.tip(trial)))
    taken: list[tuple[float, float]] = []
    for number, trial in enumerate(found, start=1):
        at, height = spot(trial)
        if all(abs(at - other) > 16 or abs(height - level) > 13 for other, level in taken):
            frame.add(text(at - 8, height - 7, str(number), "number end halo"))
            taken.append((at, height))
    return frame.drawn(f"{view.score_title} against core-seconds; {len(found)} trials on the Pareto front")


def list_front(view: View, found: list[Trial]) -> Markup:
    """The front from its best end; the cheapest and poorest are left out where it is long."""
    listed = list(enumerate(found, start=1))[::-1][:_MOST_LISTED]
    columns = [
        TableColumn("", numeric=True),
        TableColumn("trial"),
        TableColumn(view.search.metric, numeric=True),
        TableColumn("core-seconds", numeric=True),
        TableColumn("parameters"),
    ]
    rows = [
        [
            str(number),
            trial.id,
            metric(trial.score),
            tenths(trial.core_seconds or 0.0),
            unbroken(describe_parameters(trial, view.search)),
        ]
        for number, trial in listed
    ]
    return table(columns, rows)
