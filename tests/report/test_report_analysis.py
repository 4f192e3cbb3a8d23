"""What is read out of trials is right, by definition and against the plainest way of computing it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report.analysis import (
    best_over_time,
    best_so_far,
    depth_order,
    pareto_front,
    readable_range,
    standard_deviation,
)

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def beaten(point: tuple[int, int], other: tuple[int, int], sign: int) -> bool:
    """Whether another point is as cheap and as good, and better in one of both."""
    as_good = other[0] <= point[0] and sign * other[1] >= sign * point[1]
    return as_good and other != point


@given(POINTS, st.booleans())
def test_the_front_holds_exactly_the_values_that_nothing_beats(points: list[tuple[int, int]], higher: bool) -> None:
    sign = 1 if higher else -1
    expected = {point for point in points if not any(beaten(point, other, sign) for other in points)}
    front = [points[index] for index in pareto_front(points, higher)]
    assert set(front) == expected
    assert len(front) == len(set(front)), "equal points count once"
    assert front == sorted(front), "cheapest first"


def test_a_front_by_hand() -> None:
    points = [(5.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (9.0, 0.9)]
    assert pareto_front(points, higher_is_better=True) == [1, 3, 0]
    assert pareto_front(points, higher_is_better=False) == [1, 2]
    assert pareto_front([], higher_is_better=True) == []


def test_the_best_so_far_never_gets_worse() -> None:
    assert best_so_far([0.2, 0.5, 0.3, 0.6], higher_is_better=True) == [0.2, 0.5, 0.5, 0.6]
    assert best_so_far([0.2, 0.5, 0.1], higher_is_better=False) == [0.2, 0.2, 0.1]


def test_the_best_over_time_takes_every_improvement_of_any_curve_once() -> None:
    curves = [[(1.0, 0.2), (3.0, 0.6)], [(2.0, 0.5), (3.0, 0.7), (4.0, 0.65)]]
    assert best_over_time(curves, higher_is_better=True) == [(1.0, 0.2), (2.0, 0.5), (3.0, 0.7)]
    assert best_over_time(curves, higher_is_better=False) == [(1.0, 0.2)]
    assert best_over_time([], higher_is_better=True) == []


def test_depths_stand_in_the_order_in_which_they_freeze() -> None:
    depths = ["all", 12, "50%", 3, "stem", "0%", 0, 1, "100%", "3%"]
    ordered = sorted(depths, key=lambda depth: depth_order(depth, 12))
    assert ordered == ["0%", 0, "stem", "3%", 1, 3, "50%", 12, "100%", "all"]


@pytest.mark.parametrize(("share", "layers"), [("50%", 6.0), ("34%", 4.0), ("1%", 0.5), ("100%", 12.0)])
def test_shares_are_rounded_down_to_layers(share: str, layers: float) -> None:
    assert depth_order(share, 12) == layers


def test_shares_of_an_unknown_model_are_in_order_too() -> None:
    assert sorted(["all", "80%", "0%", "20%"], key=lambda depth: depth_order(depth, None)) == [
        "0%",
        "20%",
        "80%",
        "all",
    ]


@pytest.mark.parametrize("odd", [None, True, "deep", {"a": 1}, [1], math.nan, 10**400])
def test_a_depth_that_is_none_stands_first_and_harms_nothing(odd: object) -> None:
    assert depth_order(odd, 12) == -1.0


def test_a_diverged_trial_does_not_stretch_the_range() -> None:
    chance = random.Random(0)
    scores = [chance.uniform(0.8, 0.9) for _ in range(30)]
    low, high = readable_range([*scores, 0.01], higher_is_better=True)
    assert high == max(scores) and 0.6 < low < 0.85
    low, high = readable_range([*(1 - score for score in scores), 1e9], higher_is_better=False)
    assert low == pytest.approx(1 - max(scores)) and high < 1


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40), st.booleans())
def test_at_most_a_tenth_of_the_scores_is_off_the_range_and_never_the_best(scores: list[float], higher: bool) -> None:
    low, high = readable_range(scores, higher)
    best = max(scores) if higher else min(scores)
    assert low <= best <= high
    assert sum(not low <= score <= high for score in scores) <= len(scores) / 10 + 1


def test_few_scores_are_all_in_range() -> None:
    assert readable_range([0.9, 0.89, 0.01], higher_is_better=True) == (0.01, 0.9)


def test_the_spread_is_that_of_a_sample() -> None:
    assert standard_deviation([1.0, 2.0, 4.0]) == pytest.approx(1.527525)
    assert standard_deviation([3.0]) == 0.0
