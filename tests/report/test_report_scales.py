"""Axes: ticks are round, inside the range, few enough and named so that they differ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report.numbers import MISSING, compact, difference, duration, metric, moment, number, plain
from orchestrator.report.scales import Linear, Log, add_margin, fit_scale

NUMBERS = st.floats(-1e99, 1e99, allow_subnormal=False)


def test_ticks_of_a_linear_axis_are_round() -> None:
    assert [tick.label for tick in Linear(0.612, 0.889, 0, 100).ticks(6)] == ["0.65", "0.70", "0.75", "0.80", "0.85"]
    assert [tick.label for tick in Linear(0, 2600, 0, 100).ticks(6)] == ["0", "500", "1,000", "1,500", "2,000", "2,500"]
    assert [tick.label for tick in Linear(0, 4.4e-5, 0, 100).ticks(5)] == ["0", "1e-5", "2e-5", "3e-5", "4e-5"]


def test_ticks_of_a_logarithmic_axis_are_written_as_in_a_recipe() -> None:
    assert [tick.label for tick in Log(1e-5, 1e-3, 0, 100).ticks(4)] == ["1e-5", "1e-4", "1e-3"]
    assert [tick.label for tick in Log(1e-5, 1.2e-4, 0, 100).ticks(4)] == ["1e-5", "2e-5", "5e-5", "1e-4"]
    assert [tick.value for tick in Log(3.1e-5, 3.9e-5, 0, 100).ticks(5)] == [3.1e-5, 3.9e-5], "the ends, at least"


def test_a_logarithmic_axis_places_by_ratio() -> None:
    scale = Log(1e-5, 1e-3, 10, 210)
    assert [scale(value) for value in (1e-5, 1e-4, 1e-3)] == pytest.approx([10, 110, 210])


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.sampled_from([None, True, False]), st.integers(2, 12))
def test_any_values_get_an_axis_that_holds_them(values: list[float], log: bool | None, most: int) -> None:
    scale = fit_scale(values, 0.0, 100.0, log)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    ticks = scale.ticks(most)
    assert len(ticks) <= most + 1
    assert all(-1e-6 <= scale(tick.value) <= 100 + 1e-6 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks) or scale.high - scale.low < 1e-4 * abs(scale.high)


def test_what_is_spread_by_magnitude_gets_a_logarithmic_axis() -> None:
    assert isinstance(fit_scale([1e-5, 1e-4, 1e-3], 0, 1), Log)
    assert isinstance(fit_scale([0.001, 0.03, 0.05, 0.07, 0.1], 0, 1), Linear), "drawn evenly"
    assert isinstance(fit_scale([0.0, 0.01, 10.0], 0, 1), Linear), "zero has no magnitude"


def test_room_is_made_around_a_single_value() -> None:
    low, high = add_margin(0.5, 0.5)
    assert low < 0.5 < high
    assert add_margin(0.0, 0.0) == (-0.5, 0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5e-05, "5e-5"),
        (3.16227e-4, "3.16e-4"),
        (0.1, "0.1"),
        (0.0389, "0.0389"),
        (128.0, "128"),
        (12000.0, "12,000"),
        (0.0, "0"),
        (1234.56, "1,235"),
        (1.5e12, "1.5e12"),
        (-0.002, "-2e-3"),
    ],
)
def test_parameters_have_three_digits(value: float, text: str) -> None:
    assert compact(value) == text


def test_metrics_are_rounded_by_their_size() -> None:
    values = (0.91234, 0.0, 23.4567, 1204.0, 0.00002, None)
    assert [metric(value) for value in values] == ["0.9123", "0.0000", "23.46", "1,204.00", "2e-5", MISSING]
    assert difference(-0.01) == "\N{MINUS SIGN}0.0100" and difference(0.02) == "+0.0200"


def test_durations_have_their_units() -> None:
    seconds = (0.421, 8.34, 59.96, 125.0, 12_000.0, None)
    assert [duration(value) for value in seconds] == [
        "0.42 s",
        "8.3 s",
        "1 min 0 s",
        "2 min 5 s",
        "3 h 20 min",
        MISSING,
    ]


def test_a_moment_that_is_no_date_is_none() -> None:
    assert moment(1_790_000_000.0) == "2026-09-21 14:13 UTC"
    assert moment(1e50) is None and moment(-5.0) is None and moment(None) is None


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e200, 10**400, True, "3", None, [1]])
def test_what_cannot_be_drawn_is_no_number(odd: object) -> None:
    assert number(odd) is None


def test_values_are_written_as_in_a_recipe() -> None:
    values = (None, True, 3, 5e-05, "50%", {"type": "lora", "r": 16}, [1, None], 2.0)
    expected = ["none", "true", "3", "5e-5", "50%", "type: lora, r: 16", "[1, none]", "2"]
    assert [plain(value) for value in values] == expected
