"""What failures cost: the known formulae, where they hold, and a training that is failed at random."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning import (
    Disturbance,
    between_failures,
    daly_interval,
    expected_failures,
    useful_share,
    young_interval,
)

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
USUAL = Disturbance(between_failures=6 * HOUR, checkpoint=MINUTE, restart=5 * MINUTE)
disturbances = st.builds(
    Disturbance,
    between_failures=st.floats(10 * MINUTE, 1000 * DAY),
    checkpoint=st.floats(0.1, 10 * MINUTE),
    restart=st.floats(0.0, HOUR),
)


def best_interval(disturbance: Disturbance) -> float:
    """Where the share is the greatest, found by trying."""
    return max((10 ** (power / 500) for power in range(4000)), key=lambda each: useful_share(each, disturbance))


def test_the_intervals_are_those_of_the_papers() -> None:
    # sqrt(2 x 60 x 21600), and that with Daly's two terms more and without the checkpoint itself.
    assert young_interval(USUAL) == pytest.approx(1609.969, abs=1e-3)
    assert daly_interval(USUAL) == pytest.approx(1609.969 * (1 + 0.0372678 / 3 + 0.00138889 / 9) - 60, abs=0.01)


@pytest.mark.parametrize(("between", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_dalys_interval_is_the_one_that_he_names_for_his_examples(between: float, minutes: float) -> None:
    """Figures 3 to 5 of the paper: a checkpoint takes 5 minutes, a restart 10."""
    found = daly_interval(Disturbance(between, checkpoint=5 * MINUTE, restart=10 * MINUTE)) / MINUTE
    assert found == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


def test_where_a_checkpoint_takes_longer_than_there_is_time_the_interval_is_that_between_failures() -> None:
    for checkpoint in (2.0, 3.0, 100.0):
        assert daly_interval(Disturbance(between_failures=1.0, checkpoint=checkpoint, restart=0.0)) == 1.0


@pytest.mark.parametrize("hours", [0.25, 1, 6, 100, 10_000])
def test_no_interval_is_better_than_dalys_by_more_than_a_thousandth(hours: float) -> None:
    disturbance = replace(USUAL, between_failures=hours * HOUR)
    best = useful_share(best_interval(disturbance), disturbance)
    assert useful_share(daly_interval(disturbance), disturbance) == pytest.approx(best, abs=1e-3)


@given(disturbances)
def test_dalys_interval_is_never_worse_than_youngs(disturbance: Disturbance) -> None:
    young, daly = (useful_share(find(disturbance), disturbance) for find in (young_interval, daly_interval))
    assert daly >= young - 1e-9


@given(disturbances, st.floats(1.0, 10 * DAY))
def test_a_share_is_one_and_grows_with_the_time_between_failures(disturbance: Disturbance, interval: float) -> None:
    rarer = replace(disturbance, between_failures=2 * disturbance.between_failures)
    assert 0 <= useful_share(interval, disturbance) <= useful_share(interval, rarer) < 1


def test_machines_that_never_fail_lose_what_checkpoints_take() -> None:
    never = replace(USUAL, between_failures=1e15)
    assert useful_share(9 * MINUTE, never) == pytest.approx(0.9, rel=1e-6)


def test_the_loss_is_that_of_the_first_order_where_failures_are_rare() -> None:
    """A checkpoint each interval, half of an interval and a restart each failure."""
    rare = replace(USUAL, between_failures=1000 * HOUR)
    interval = young_interval(rare)
    lost = rare.checkpoint / interval + (interval / 2 + rare.restart) / rare.between_failures
    assert 1 - useful_share(interval, rare) == pytest.approx(lost, rel=0.02)


def test_more_machines_use_less_of_their_time_and_save_more_often() -> None:
    grown = [replace(USUAL, between_failures=between_failures(250 * DAY, nodes)) for nodes in (1, 4, 64, 1024, 16384)]
    for fewer, more in pairwise(grown):
        assert daly_interval(more) < daly_interval(fewer)
        assert useful_share(daly_interval(more), more) < useful_share(daly_interval(fewer), fewer)


def test_failures_are_counted_over_the_time_that_is_lost_too() -> None:
    interval = daly_interval(USUAL)
    assert expected_failures(6 * HOUR, interval, USUAL) == pytest.approx(1 / useful_share(interval, USUAL))
    hopeless = Disturbance(between_failures=1.0, checkpoint=800.0, restart=0.0)
    assert useful_share(1.0, hopeless) == 0.0
    assert math.isinf(expected_failures(DAY, 1.0, hopeless))


@pytest.mark.parametrize("seconds", [0.5 * HOUR, 6 * HOUR])
def test_a_training_that_is_failed_at_random_uses_the_expected_share(seconds: float) -> None:
    disturbance = replace(USUAL, between_failures=seconds)
    interval, chance = daly_interval(disturbance), Random(0)
    useful = spent = 0.0
    while spent < 10_000 * seconds:
        # One stretch between failures: the restart first, then as many whole intervals as end in time.
        lives = chance.expovariate(1 / seconds)
        whole = max(0.0, lives - disturbance.restart) // (interval + disturbance.checkpoint)
        useful, spent = useful + whole * interval, spent + lives
    assert useful / spent == pytest.approx(useful_share(interval, disturbance), abs=0.005)


def test_times_that_cannot_be_are_refused() -> None:
    for changes in ({"between_failures": 0.0}, {"checkpoint": 0.0}, {"restart": -1.0}, {"between_failures": math.nan}):
        with pytest.raises(ValueError, match=r"must be above 0|too little"):
            replace(USUAL, **changes)
    with pytest.raises(ValueError, match="checkpoints are 0 s apart"):
        useful_share(0, USUAL)
