"""Score against cost, with the Pareto front: the trials that no cheaper one equals, numbered and listed."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from orchestrator.report.analysis import pareto_front
from orchestrator.report.charts.base import Chart, View, describe_parameters
from orchestrator.report.charts.plot import Plot, Position
from orchestrator.report.drawing import Frame, circle, curve, steps, text
from orchestrator.report.numbers import metric, tenths
from orchestrator.report.records import Trial
from orchestrator.report.scales import Linear, Scale, add_margin, fit_scale
from orchestrator.report.tables import TableColumn, table, unbroken

_MOST_LISTED = 12


def cost(view: View) -> Chart | None:
    """Return the chart; None for fewer than two trials with a score and a cost."""
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
        drawing=plot(view, trials, found).both_sizes(),
        caption=words + view.beyond_note(trial.score or 0.0 for trial in trials),
        below=list_front(view, found),
    )


def front_of(trials: list[Trial], view: View) -> list[Trial]:
    """Return the trials on the Pareto front, cheapest first."""
    costs = [(trial.core_seconds or 0.0, trial.score or 0.0) for trial in trials]
    return [trials[index] for index in pareto_front(costs, view.search.higher_is_better)]


def plot(view: View, trials: list[Trial], front: list[Trial]) -> Plot:
    costs = [trial.core_seconds or 0.0 for trial in trials]
    on_front = {trial.id for trial in front}

    def scale_of_cost(start: float, end: float) -> Scale:
        scale = fit_scale(costs, start + 12, end - 12)
        if isinstance(scale, Linear) and min(costs) < max(costs) / 2:
            scale = fit_scale([0.0, *costs], start, end - 12, log=False)
        return scale

    def marks(frame: Frame, position: Position) -> Iterator[Markup]:
        def position_of(trial: Trial) -> tuple[float, float]:
            return position(trial.core_seconds or 0.0, view.clamp(trial.score or 0.0))

        yield curve(steps([position_of(trial) for trial in front], frame.end), "line front")
        for trial in trials[::-1]:
            kind = "front-dot" if trial.id in on_front else view.dot(trial)
            yield circle(*position_of(trial), view.radius + (trial.id in on_front), kind, view.tip(trial))
        numbered: list[tuple[float, float]] = []
        for number, (x, y) in enumerate(map(position_of, front), start=1):
            if all(abs(x - other_x) > 16 or abs(y - other_y) > 13 for other_x, other_y in numbered):
                yield text(x - 8, y - 7, str(number), "number end halo")
                numbered.append((x, y))

    return Plot(
        "core-seconds of the trial",
        view.score_title,
        f"{view.score_title} against core-seconds; {len(front)} trials on the Pareto front",
        scale_of_cost,
        lambda start, end: Linear(*add_margin(view.low, view.high, 0.1), start, end),
        marks,
    )


def list_front(view: View, found: list[Trial]) -> Markup:
    """Return a table of the front, best first; of a long one, the cheapest and worst trials are left out."""
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
