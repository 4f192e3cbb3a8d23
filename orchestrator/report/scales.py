"""Scales: from values to positions, with ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol

from orchestrator.report.numbers import compact, shorten_exponent

# A range this wide, of positive values, is easier to read on a logarithmic scale.
_WIDE_RATIO = 20.0
# Ends closer than this share of their size look the same, and are too close for ticks.
_SAME = 1e-9


class Tick(NamedTuple):
    value: float
    label: str


class Scale(Protocol):
    """`scale(value)` is a position in the drawing; values beyond the ends are beyond its positions."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    def __call__(self, value: float) -> float: ...
    def ticks(self, most: int) -> list[Tick]: ...


@dataclass(frozen=True)
class Linear:
    """A linear scale with `low` at `start` and `high` at `end`, which differ."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[Tick]:
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [Tick(index * step, _label(index * step, step)) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Log:
    """A logarithmic scale; both ends are above 0."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[Tick]:
        for leads in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            found = self._at(leads)
            if len(found) <= most:
                break
        else:
            found = found[:: math.ceil(len(found) / most)]
        if len(found) < 2:
            found = [self.low, self.high]
        return [Tick(value, compact(value)) for value in found]

    def _at(self, leads: Sequence[int]) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        # Parsed from text: 3 * 10**-5 is not the float 3e-5.
        values = [float(f"{lead}e{power}") for power in range(first, last + 1) for lead in leads]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def fit_scale(values: Sequence[float], start: float, end: float, log: bool | None = None) -> Scale:
    """Return a scale for the values. If `log` is None, it is logarithmic where they differ widely and are spread so."""
    low, high = min(values), max(values)
    if high - low <= _SAME * max(abs(low), abs(high)):
        high = low
    if log is None:
        log = low > 0 and high / low >= _WIDE_RATIO and _spread_by_magnitude(values)
    if log and low > 0:
        return Log(low, high, start, end) if high > low else Log(low / 2, high * 2, start, end)
    if high > low:
        return Linear(low, high, start, end)
    room = abs(low) / 2 or 0.5
    return Linear(low - room, high + room, start, end)


def _spread_by_magnitude(values: Sequence[float]) -> bool:
    """Whether the median is nearer to the geometric middle of the range than to the arithmetic one."""
    low, high, middle = min(values), max(values), median(values)
    by_magnitude = (math.log(middle) - math.log(low)) / (math.log(high) - math.log(low))
    return abs(by_magnitude - 0.5) < abs((middle - low) / (high - low) - 0.5)


def add_margin(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return the range with some room at both ends, so that nothing touches the frame."""
    largest = max(abs(low), abs(high))
    room = (high - low) * share if high - low > _SAME * largest else largest * 0.05 or 0.5
    return low - room, high + room


def _round_step(step: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power = float(f"1e{math.floor(math.log10(step))}")
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= step * (1 - 1e-9))


def _label(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    if abs(value) >= 1e6 or step < 1e-4:
        return shorten_exponent(f"{value:.4g}")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"
