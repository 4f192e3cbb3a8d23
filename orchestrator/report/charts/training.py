"""The curves of one run: loss, the metric on *select* with its best step, learning rate, gradient norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from orchestrator.formatting import format_count
from orchestrator.report.analysis import readable_range
from orchestrator.report.charts.base import Chart
from orchestrator.report.charts.plot import Plot, Position
from orchestrator.report.drawing import Frame, circle, curve, line, path, text, text_width
from orchestrator.report.numbers import metric as show_metric
from orchestrator.report.numbers import number
from orchestrator.report.records import MetricRows, Run
from orchestrator.report.scales import Linear, Log, Scale, add_margin, fit_scale

_MOST_POINTS = 500
_MOST_DOTS = 40
# A spike is cut off if it is this many times further from the minimum than the median; a falling loss is not one.
_FURTHEST = 20.0
_RATIO_BY_MAGNITUDE = 100.0

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    name: str
    points: Points
    class_: str


@dataclass(frozen=True)
class Curves:
    """The content of one chart."""

    title: str
    y_title: str
    series: list[Series]
    caption: str
    cuts_spikes: bool = True
    best: tuple[float, float] | None = None
    """The point that is marked with a ring."""


def training_charts(run: Run, metric: str, best_step: float | None) -> list[Chart]:
    """Return the charts for which the run recorded values."""
    train, select = rows_of(run.rows, "train"), rows_of(run.rows, "select")
    losses = [Series("train", points(train, "loss"), "first"), Series("select", points(select, "loss"), "second")]
    scores = Series("select", points(select, metric), "second")
    best = next((point for point in scores.points if point[0] == best_step), None)
    rates = Series("rate", points(train, "learning_rate"), "first")
    norms = Series("norm", points(train, "gradient_norm"), "first")
    curves = [
        Curves("Loss", "loss", losses, "Mean of the examples; train: of those since the last record."),
        Curves("Score", f"{metric} on select", [scores], best_words(best), cuts_spikes=False, best=best),
        Curves("Learning rate", "learning rate", [rates], "As the schedule set it.", cuts_spikes=False),
        Curves("Gradient norm", "norm", [norms], "Of all gradients together, before they are clipped."),
    ]
    drawn = [chart(each) for each in curves if not (each.title == "Score" and metric == "loss")]
    return [item for item in drawn if item is not None]


def best_words(best: tuple[float, float] | None) -> str:
    if best is None:
        return "After each evaluation."
    return f"After each evaluation; the ring is the best, step {best[0]:,.0f}, whose weights were kept."


def rows_of(rows: MetricRows, split: str) -> MetricRows:
    return [row for row in rows if row.get("split") == split]


def points(rows: MetricRows, name: str) -> Points:
    """Return (step, value) of the rows that have both, ordered by step."""
    pairs = [(number(row.get("step")), number(row.get(name))) for row in rows]
    return sorted((step, value) for step, value in pairs if step is not None and value is not None)


def averaged(found: Points) -> Points:
    """Return means of neighbouring points, if there are more than a chart can show."""
    size = -(-len(found) // _MOST_POINTS)
    if size <= 1:
        return found
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def chart(curves: Curves) -> Chart | None:
    """Return the chart of some curves; None if they have no points."""
    shown = [item for item in curves.series if item.points]
    if not shown:
        return None
    values = [value for item in shown for _, value in item.points]
    ends = min(values), max(values)
    if curves.cuts_spikes:
        ends = readable_range(values, higher_is_better=False, furthest=_FURTHEST)
    caption, num_cut = curves.caption, sum(value > ends[1] for value in values)
    if num_cut:
        caption += f" {format_count(num_cut, 'record')} above {show_metric(ends[1])} cut off."
    if max(len(item.points) for item in shown) > _MOST_POINTS:
        caption += " Neighbouring records are averaged."
    return Chart(curves.title, plot(curves, shown, ends).both_sizes(), caption)


def plot(curves: Curves, series: Sequence[Series], ends: tuple[float, float]) -> Plot:
    last_step = max(step for item in series for step, _ in item.points)
    is_log = ends[0] > 0 and ends[1] / ends[0] >= _RATIO_BY_MAGNITUDE

    def scale_of_value(start: float, end: float) -> Scale:
        return Log(ends[0] / 1.1, ends[1] * 1.1, start, end) if is_log else Linear(*add_margin(*ends), start, end)

    def marks(frame: Frame, position: Position) -> Iterator[Markup]:
        for item in series:
            found = averaged(item.points)
            positions = [position(*point) for point in found]
            yield curve(path(positions), f"line series {item.class_}")
            for at, (step, value) in zip(positions, found, strict=True) if len(found) <= _MOST_DOTS else ():
                tip = f"step {step:,.0f}: {item.name} {show_metric(value)}"
                yield circle(*at, 3, f"point {item.class_}", tip)
        if curves.best is not None:
            yield circle(*position(*curves.best), 7, "winner-frame")

    return Plot(
        "step",
        f"{curves.y_title} (logarithmic)" if is_log else curves.y_title,
        f"{curves.y_title} over steps",
        lambda start, end: fit_scale([0.0, last_step], start, end, log=False),
        scale_of_value,
        marks,
        height=290.0,
        left=60.0,
        is_clipped=True,
        legend=(lambda frame: legend(series, frame)) if len(series) > 1 else None,
    )


def legend(series: Sequence[Series], frame: Frame) -> list[Markup]:
    """Return the names of the series with their colours, above the frame at its right."""
    parts, at = [], frame.end
    for item in reversed(series):
        at -= text_width(item.name)
        parts += [text(at, 14, item.name, "tick"), line(at - 24, 10, at - 6, 10, f"line series {item.class_}")]
        at -= 40
    return parts
