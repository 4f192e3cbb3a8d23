"""The score over one parameter, where only one was varied."""

from __future__ import annotations

from orchestrator.report.charts.base import HALF_WIDTH, Chart, View
from orchestrator.report.charts.parallel import Axis, find_varied, parameter_axis
from orchestrator.report.drawing import Frame, Size, both_sizes, circle, curve, line, path, shortened, text, text_width
from orchestrator.report.markup import Markup
from orchestrator.report.scales import Linear, widen


def single(view: View) -> Chart | None:
    """Shown when one parameter was varied."""
    varied = find_varied(view.search)
    if len(varied) != 1:
        return None
    axis = parameter_axis(view, varied[0], varied[0])
    words = "Each point is a trial; the line joins the best at each value, the ring is the leader."
    return Chart(
        title="Score over the parameter",
        drawing=both_sizes(lambda size: draw(view, axis, size), HALF_WIDTH),
        caption=words + view.beyond_note(trial.score or 0.0 for trial in view.search.ranked),
    )


def draw(view: View, axis: Axis, size: Size) -> Markup:
    frame = Frame(size, 320, 52, 16, 30, 44)
    x = Linear(0.0, 1.0, frame.left + 12, frame.end - 12)
    y = Linear(*widen(view.low, view.high), frame.floor, frame.top)
    frame.axis_y(y, view.score_title)
    frame.add(line(frame.left, frame.floor, frame.end, frame.floor, "axis"))
    frame.add(text((frame.left + frame.end) / 2, frame.height - 6, axis.name, "title middle"))
    taken = -1e9
    for share, label in sorted(axis.labels):
        words = shortened(label, 90, 11)
        half = text_width(words, 11) / 2
        if x(share) - half > taken + 6:
            frame.add(text(x(share), frame.floor + 17, words, "tick middle", label))
            taken = x(share) + half
    spots = {trial.id: (x(axis.place(trial)), y(view.clamp(trial.score or 0.0))) for trial in view.search.ranked}
    best: dict[float, tuple[float, float]] = {}
    for spot in spots.values():  # Best first.
        best.setdefault(spot[0], spot)
    frame.add(curve(path(sorted(best.values())), "line rest"))
    for trial in view.search.ranked[::-1]:
        frame.add(circle(*spots[trial.id], view.radius, view.dot(trial), view.tip(trial)))
    if view.search.leader is not None and view.search.leader.id in spots:
        frame.add(circle(*spots[view.search.leader.id], view.radius + 4, "winner-frame"))
    return frame.drawn(f"{view.score_title} over {axis.name}")
