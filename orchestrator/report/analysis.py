"""Statistics of trials: Pareto front, best so far, order of depths, ranges without outliers.

Scores are compared with `higher_is_better`; nothing here depends on what a score means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from orchestrator.recipe import FreezeDepth
from orchestrator.report.numbers import number

# A score is drawn at the edge of a chart, not to scale, if it is this many times further from the best one than the
# median, and among the worst tenth.
FURTHEST = 4.0
_FEWEST_FOR_A_CUT = 8


def better(first: float, second: float, higher_is_better: bool) -> bool:
    return first > second if higher_is_better else first < second


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Return the indices of points (cost, score) that no point of the same or a lower cost equals, cheapest first."""
    sign = -1.0 if higher_is_better else 1.0
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], sign * points[index][1], index)):
        if not front or better(points[index][1], points[front[-1]][1], higher_is_better):
            front.append(index)
    return front


def best_so_far(scores: Sequence[float], higher_is_better: bool) -> list[float]:
    """Return for each score the best of it and those before it."""
    found: list[float] = []
    for score in scores:
        found.append(score if not found or better(score, found[-1], higher_is_better) else found[-1])
    return found


def best_over_time(
    curves: Sequence[Sequence[tuple[float, float]]], higher_is_better: bool
) -> list[tuple[float, float]]:
    """Return (time, score) where any curve of (time, score) improves on the best score of all curves so far."""
    found: list[tuple[float, float]] = []
    for time, score in sorted(point for curve in curves for point in curve):
        if found and not better(score, found[-1][1], higher_is_better):
            continue
        if found and found[-1][0] == time:
            found.pop()
        found.append((time, score))
    return found


def readable_range(scores: Sequence[float], higher_is_better: bool, furthest: float = FURTHEST) -> tuple[float, float]:
    """Return the lowest and highest score to draw to scale, without a few that are far worse (diverged trials)."""
    low, high = min(scores), max(scores)
    best = high if higher_is_better else low
    middle = median(scores)
    if len(scores) < _FEWEST_FOR_A_CUT or middle == best:
        return low, high
    far, ordered, tenth = best + furthest * (middle - best), sorted(scores), len(scores) // 10
    if higher_is_better:
        return max(low, min(far, ordered[tenth])), high
    return low, min(high, max(far, ordered[-1 - tenth]))


def depth_order(freeze: Any, num_layers: int | None) -> float:
    """Return the rank of a freeze depth among others: 0, stem, 1, 2, ..., all.

    Args:
        num_layers: of the model; None if it is not known, when a percentage counts as a number of layers.
    """
    try:
        depth = FreezeDepth.parse(freeze)
    except ValueError:
        return -1.0
    if depth.freezes_body:
        return math.inf
    if num_layers is None or depth.percent is None:
        layers = depth.layers if depth.percent is None else depth.percent
    else:
        layers = depth.resolve(num_layers).num_layers
    rank = number(layers)
    if rank is None:
        return -1.0
    return max(0.5, rank) if depth.stem else rank


def standard_deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample (n - 1); 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
