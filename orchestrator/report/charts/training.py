"""The curves of one run: loss, the metric on *select* with its best step, learning rate, size of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.formatting import format_count
from orchestrator.report.analysis import readable_range
from orchestrator.report.charts.base import HALF_WIDTH, Chart
from orchestrator.report.drawing import Frame, Size, both_sizes, circle, curve, line, path, text, text_width
from orchestrator.report.markup import Markup
from orchestrator.report.numbers import metric as show_metric
from orchestrator.report.numbers import number
from orchestrator.report.records import Rows, Run
from orchestrator.report.scales import Linear, Log, Scale, fit_scale, widen

_MOST_POINTS = 500
_MOST_DOTS = 40
# A spike this many times further from the least than the median is, is cut off; a loss that falls is not one.
_FURTHEST = 20.0
_RATIO_BY_MAGNITUDE = 100.0

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    name: str
    points: Points
    class_: str


@dataclass(frozen=True)
class Plot:
    """What one picture shows."""

    title: str
    y_title: str
    series: list[Series]
    caption: str
    cuts_spikes: bool = True
    best: tuple[float, float] | None = None
    """The point that the ring is around."""


def training_charts(run: Run, metric: str, best_step: float | None) -> list[Chart]:
    """Those for which the run recorded something."""
    train, select = rows_of(run.rows, "train"), rows_of(run.rows, "select")
    losses = [Series("train", points(train, "loss"), "first"), Series("select", points(select, "loss"), "second")]
    scores = Series("select", points(select, metric), "second")
    best = next((point for point in scores.points if point[0] == best_step), None)
    rates = Series("rate", points(train, "learning_rate"), "first")
    norms = Series("norm", points(train, "gradient_norm"), "first")
    plots = [
        Plot("Loss", "loss", losses, "Mean of the examples; train: of those since the last record."),
        Plot("Score", f"{metric} on select", [scores], best_words(best), cuts_spikes=False, best=best),
        Plot("Learning rate", "learning rate", [rates], "As the schedule set it.", cuts_spikes=False),
        Plot("Gradient norm", "norm", [norms], "Of all gradients together, before they are clipped."),
    ]
    drawn = [chart(plot) for plot in plots if not (plot.title == "Score" and metric == "loss")]
    return [item for item in drawn if item is not None]


def best_words(best: tuple[float, float] | None) -> str:
    if best is None:
        return "After each evaluation."
    return f"After each evaluation; the ring is the best, step {best[0]:,.0f}, whose weights were kept."


def rows_of(rows: Rows, split: str) -> Rows:
    return [row for row in rows if row.get("split") == split]


def points(rows: Rows, name: str) -> Points:
    """(step, value) of the rows that have both, in order of the steps."""
    pairs = [(number(row.get("step")), number(row.get(name))) for row in rows]
    return sorted((step, value) for step, value in pairs if step is not None and value is not None)


def averaged(found: Points) -> Points:
    """Means of neighbours, where there are more points than a picture can show."""
    size = -(-len(found) // _MOST_POINTS)
    if size <= 1:
        return found
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def chart(plot: Plot) -> Chart | None:
    """None where the plot has no points."""
    shown = [item for item in plot.series if item.points]
    if not shown:
        return None
    values = [value for item in shown for _, value in item.points]
    ends = min(values), max(values)
    if plot.cuts_spikes:
        ends = readable_range(values, higher_is_better=False, furthest=_FURTHEST)
    caption, num_cut = plot.caption, sum(value > ends[1] for value in values)
    if num_cut:
        caption += f" {format_count(num_cut, 'record')} above {show_metric(ends[1])} cut off."
    if max(len(item.points) for item in shown) > _MOST_POINTS:
        caption += " Neighbouring records are averaged."
    return Chart(plot.title, both_sizes(lambda size: draw(plot, shown, ends, size), HALF_WIDTH), caption)


def draw(plot: Plot, series: Sequence[Series], ends: tuple[float, float], size: Size) -> Markup:
    frame = Frame(size, 290, 60, 12, 30, 44)
    x = fit_scale([0.0, max(step for item in series for step, _ in item.points)], frame.left, frame.end, log=False)
    y = upright(ends, frame)
    frame.axis_y(y, plot.y_title if isinstance(y, Linear) else f"{plot.y_title} (logarithmic)")
    frame.axis_x(x, "step")
    inner: list[Markup] = []
    for item in series:
        found = averaged(item.points)
        spots = [(x(step), y(value)) for step, value in found]
        inner.append(curve(path(spots), f"line series {item.class_}"))
        if len(spots) <= _MOST_DOTS:
            inner += [
                circle(*spot, 3, f"point {item.class_}", f"step {step:,.0f}: {item.name} {show_metric(value)}")
                for spot, (step, value) in zip(spots, found, strict=True)
            ]
    if plot.best is not None:
        inner.append(circle(x(plot.best[0]), y(plot.best[1]), 7, "winner-frame"))
    frame.add(frame.inside(inner))
    if len(series) > 1:
        frame.add(*legend(series, frame))
    return frame.drawn(f"{plot.y_title} over steps")


def upright(ends: tuple[float, float], frame: Frame) -> Scale:
    """By magnitude for what falls by magnitudes."""
    low, high = ends
    if low > 0 and high / low >= _RATIO_BY_MAGNITUDE:
        return Log(low / 1.1, high * 1.1, frame.floor, frame.top)
    return Linear(*widen(low, high), frame.floor, frame.top)


def legend(series: Sequence[Series], frame: Frame) -> list[Markup]:
    """Names with their colours, above the frame at its right."""
    parts, at = [], frame.end
    for item in reversed(series):
        at -= text_width(item.name)
        parts += [text(at, 14, item.name, "tick"), line(at - 24, 10, at - 6, 10, f"line series {item.class_}")]
        at -= 40
    return parts
