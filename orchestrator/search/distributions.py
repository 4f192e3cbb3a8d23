"""The kinds of values that a searched place may take: what a grid, a random draw and TPE need of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from orchestrator.recipe.schema import Case

DIGITS = 10_000
"""Numbers are rounded to about this part of their range, so that they can be read and typed again."""


class Distribution(Protocol):
    """Values of one place."""

    @property
    def size(self) -> float:
        """How many values there are; infinite for a range of numbers."""

    def points(self, count: int) -> list[Any]:
        """`count` values (fewer where there are no more), evenly spread from end to end; one stands in the middle."""

    def draw(self, generator: Random) -> Any:
        """A random value."""

    def suggest(self, trial: Any, name: str) -> Any:
        """The value that an `optuna.Trial` suggests under this name."""

    def clip(self, value: Any) -> Any:
        """The value, moved into the domain where it lies outside."""


def distribution_of(case: Case) -> Distribution:
    """The domain that a case of a recipe's space describes; its choices are written out."""
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
    """One of some values of any kind."""

    values: tuple[Any, ...]

    @property
    def size(self) -> float:
        return len(self.values)

    def points(self, count: int) -> list[Any]:
        """All values, whatever the count: they have no order in which some could stand for the others."""
        return list(self.values)

    def draw(self, generator: Random) -> Any:
        return generator.choice(self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        # By number, because Optuna knows no mappings and takes 1 and true for the same.
        return self.values[trial.suggest_categorical(name, list(range(len(self.values))))]

    def clip(self, value: Any) -> Any:
        numbers = [each for each in self.values if isinstance(each, int | float)]
        return value if value in self.values else min(numbers, key=lambda each: abs(each - value))


@dataclass(frozen=True)
class Integers:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int

    @property
    def size(self) -> float:
        return self.high - self.low + 1

    def points(self, count: int) -> list[Any]:
        span, gaps = self.high - self.low, min(count, self.high - self.low + 1) - 1
        if gaps == 0:
            return [self.low + span // 2]
        # In whole numbers, so that steps of one or more never round to the same number.
        return [self.low + (2 * index * span + gaps) // (2 * gaps) for index in range(gaps + 1)]

    def draw(self, generator: Random) -> Any:
        return generator.randint(self.low, self.high)

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_int(name, self.low, self.high)

    def clip(self, value: Any) -> Any:
        return min(max(round(value), self.low), self.high)


@dataclass(frozen=True)
class Floats:
    """A number from `low` to `high`, both included; each, or where `logarithmic` each order of magnitude, as likely."""

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

    def draw(self, generator: Random) -> Any:
        return self._at(generator.random())

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_float(name, self.low, self.high, log=self.logarithmic)

    def clip(self, value: Any) -> Any:
        return min(max(float(value), self.low), self.high)

    def _at(self, share: float) -> float:
        """The number at a share (0 to 1) of the way from low to high."""
        if share in (0.0, 1.0):
            return self.high if share else self.low
        if self.logarithmic:
            value = math.exp(math.log(self.low) * (1 - share) + math.log(self.high) * share)
            step = value * (math.log(self.high) - math.log(self.low)) / DIGITS
        else:
            value = self.low * (1 - share) + self.high * share
            step = (self.high - self.low) / DIGITS
        if 0 < step < 1:
            value = round(value, -math.floor(math.log10(step)))
        return float(self.clip(value))
