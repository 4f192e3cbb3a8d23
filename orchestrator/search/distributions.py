"""Distributions of the values that a searched parameter may take: for a grid, for random sampling, for TPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from orchestrator.recipe.schema import Case

DIGITS = 10_000
"""Numbers are rounded to about this fraction of their range, so that they can be read and typed again."""


class Distribution(Protocol):
    """Values of one parameter."""

    @property
    def size(self) -> float:
        """Number of values; infinity for a range of floats."""

    def points(self, count: int) -> list[Any]:
        """Return `count` values, or as many as there are, evenly spaced from end to end; a single one in the middle."""

    def sample(self, generator: Random) -> Any:
        """Return a random value."""

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value that an `optuna.Trial` suggests under this name."""

    def clip(self, value: Any) -> Any:
        """Return the value, or the nearest value of the distribution."""


def distribution_of(case: Case) -> Distribution:
    """Return the distribution that a case of a recipe's space describes; its choices are written out."""
    if case.choice is not None:
        assert case.choice != "every", "boundaries are written out first"
        return Choice(tuple(case.choice))
    if case.integers is not None:
        return Integers(*case.integers)
    ends = case.loguniform or case.uniform
    assert ends is not None, "a case has values"
    low, high = ends
    return Floats(low, high, logarithmic=case.loguniform is not None)


@dataclass(frozen=True)
class Choice:
    """One of several values of any type."""

    values: tuple[Any, ...]

    @property
    def size(self) -> float:
        return len(self.values)

    def points(self, count: int) -> list[Any]:
        """Return all values, regardless of the count: they have no order to choose some by."""
        return list(self.values)

    def sample(self, generator: Random) -> Any:
        return generator.choice(self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        # By index, because Optuna takes no mappings, and takes 1 and true for the same.
        return self.values[trial.suggest_categorical(name, list(range(len(self.values))))]

    def clip(self, value: Any) -> Any:
        numbers = [each for each in self.values if isinstance(each, int | float)]
        return value if value in self.values else min(numbers, key=lambda each: abs(each - value))


@dataclass(frozen=True)
class Integers:
    """An integer from `low` to `high`, both included."""

    low: int
    high: int

    @property
    def size(self) -> float:
        return self.high - self.low + 1

    def points(self, count: int) -> list[Any]:
        span, gaps = self.high - self.low, min(count, self.high - self.low + 1) - 1
        if gaps == 0:
            return [self.low + span // 2]
        # In integer arithmetic, so that no two of them round to the same number.
        return [self.low + (2 * index * span + gaps) // (2 * gaps) for index in range(gaps + 1)]

    def sample(self, generator: Random) -> Any:
        return generator.randint(self.low, self.high)

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_int(name, self.low, self.high)

    def clip(self, value: Any) -> Any:
        return min(max(round(value), self.low), self.high)


@dataclass(frozen=True)
class Floats:
    """A float from `low` to `high`, both included, uniform or, where `logarithmic`, log-uniform."""

    low: float
    high: float
    logarithmic: bool

    @property
    def size(self) -> float:
        return math.inf

    def points(self, count: int) -> list[Any]:
        if count == 1:
            return [self._at(0.5)]
        return [self._at(index / (count - 1)) for index in range(count)]

    def sample(self, generator: Random) -> Any:
        return self._at(generator.random())

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_float(name, self.low, self.high, log=self.logarithmic)

    def clip(self, value: Any) -> Any:
        return min(max(float(value), self.low), self.high)

    def _at(self, fraction: float) -> float:
        """Return the number at this fraction (0 to 1) of the way from low to high."""
        if fraction in (0.0, 1.0):
            return self.high if fraction else self.low
        if self.logarithmic:
            value = math.exp(math.log(self.low) * (1 - fraction) + math.log(self.high) * fraction)
            step = value * (math.log(self.high) - math.log(self.low)) / DIGITS
        else:
            value = self.low * (1 - fraction) + self.high * fraction
            step = (self.high - self.low) / DIGITS
        if 0 < step < 1:
            value = round(value, -math.floor(math.log10(step)))
        return float(self.clip(value))
