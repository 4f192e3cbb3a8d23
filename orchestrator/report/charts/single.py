"""The score over the only parameter that was varied."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from orchestrator.report.charts.base import Chart, View
from orchestrator.report.charts.parallel import Axis, find_varied, parameter_axis
from orchestrator.report.charts.plot import Plot, Position
from orchestrator.report.drawing import Frame, circle, curve, line, path, shortened, text, text_width
from orchestrator.report.scales import Linear, Scale, add_margin


def single(view: View) -> Chart | None:
    """Return the chart; None unless exactly one parameter was varied."""
    varied = find_varied(view.search)
    if len(varied) != 1:
        return None
    axis = parameter_axis(view, varied[0], varied[0])
    words = "Each point is a trial; the line joins the best at each value, the ring is the leader."
    return Chart(
        title="Score over the parameter",
        drawing=plot(view, axis).both_sizes(),
        caption=words + view.beyond_note(trial.score or 0.0 for trial in view.search.ranked),
    )


def plot(view: View, axis: Axis) -> Plot:
    def axis_x(frame: Frame, x: Scale) -> None:
        frame.add(line(frame.left, frame.floor, frame.end, frame.floor, "axis"))
        frame.add(text((frame.left + frame.end) / 2, frame.height - 6, axis.name, "title middle"))
        labelled_to = -1e9
        for share, label in sorted(axis.labels):
            words = shortened(label, 90, 11)
            half = text_width(words, 11) / 2
            if x(share) - half > labelled_to + 6:
                frame.add(text(x(share), frame.floor + 17, words, "tick middle", label))
                labelled_to = x(share) + half

    def marks(_: Frame, position: Position) -> Iterator[Markup]:
        ranked, leader = view.search.ranked, view.search.leader
        positions = {trial.id: position(axis.place(trial), view.clamp(trial.score or 0.0)) for trial in ranked}
        best: dict[float, tuple[float, float]] = {}
        for each in positions.values():  # Best first.
            best.setdefault(each[0], each)
        yield curve(path(sorted(best.values())), "line rest")
        for trial in ranked[::-1]:
            yield circle(*positions[trial.id], view.radius, view.dot(trial), view.tip(trial))
        if leader is not None and leader.id in positions:
            yield circle(*positions[leader.id], view.radius + 4, "winner-frame")

    return Plot(
        axis.name,
        view.score_title,
        f"{view.score_title} over {axis.name}",
        lambda start, end: Linear(0.0, 1.0, start + 12, end - 12),
        lambda start, end: Linear(*add_margin(view.low, view.high), start, end),
        marks,
        right=16.0,
        axis_x=axis_x,
    )
