"""Rules for the section `search` about combinations of values, which trials consist of."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from orchestrator.recipe.conditions import (
    Cases,
    Combinations,
    Parameters,
    boundaries,
    place_of,
    put_all,
    write_boundaries,
)
from orchestrator.recipe.finding import Finding
from orchestrator.recipe.mistakes import value_at
from orchestrator.recipe.origin import is_within
from orchestrator.recipe.rules import find_broken_rules, overlap
from orchestrator.recipe.schema import Case, Recipe, Search, Train
from orchestrator.recipe.wording import write_value

MAX_CHECKED = 1000
"""Combinations that are checked; of more, a random sample of this size."""
MAX_COUNTED = 100_000
_LENGTH = ("train.epochs", "train.steps", "train.evaluate_every")


def find_in_combinations(recipe: Recipe, search: Search, space: Cases, complete: bool) -> Iterator[Finding]:
    """Yield what is wrong with combinations of valid values.

    Args:
        space: the paths of `search.space` with valid values.
        complete: whether these are all paths of the space.
    """
    combinations = Combinations(recipe, write_boundaries(space, _stand_ins(recipe, space)))
    chosen = list(islice(combinations.walk_choices(), MAX_CHECKED + 1))
    if len(chosen) <= MAX_CHECKED:
        yield from _find_unused_cases(recipe, combinations, chosen)
    else:
        chosen = _draw(combinations)
    trials = _Trials(recipe, search)
    for parameters in _vary_ranges(chosen):
        yield from trials.find(parameters)
    if search.algorithm == "grid" and complete and not _has_every(space):
        yield from find_in_grid(combinations, search.trials)


def find_in_grid(combinations: Combinations, trials: int) -> Iterator[Finding]:
    """Yield a finding if the choices alone have more combinations than there may be trials."""
    points = list(islice(combinations.walk_choices(), MAX_COUNTED + 1))
    if len(points) <= trials:
        return
    many = f"{len(points):,}" if len(points) <= MAX_COUNTED else f"more than {MAX_COUNTED:,}"
    ranges = any(isinstance(value, Case) for point in points for value in point.values())
    yield Finding(
        ("search.trials", "search.space", "search.algorithm"),
        f"the grid has {many} points{' with a single value of each range' if ranges else ''}, "
        f"but `search.trials` is {trials}",
        f"set `search.trials` to {len(points)} or more, or `search.algorithm` to random (or tpe), or list fewer values"
        if len(points) <= MAX_COUNTED
        else "set `search.algorithm` to random or tpe, or list fewer values",
    )


def _has_every(space: Cases) -> bool:
    return any(case.choice == "every" for cases in space.values() for case in cases)


def _stand_ins(recipe: Recipe, space: Cases) -> list[int | str]:
    """Return freeze depths for `every` while the model is unknown: one of each kind, and those in conditions."""
    asked = [
        depth
        for cases in space.values()
        for case in cases
        for condition, wanted in (case.when or {}).items()
        if condition == "transfer.freeze"
        for depth in (wanted if isinstance(wanted, list) else [wanted])
        if isinstance(depth, int)
    ]
    return list(dict.fromkeys([*boundaries(recipe, 2), *asked]))


def _draw(combinations: Combinations) -> list[Parameters]:
    generator = random.Random(0)

    def values_of(_path: str, _number: int, case: Case) -> list[Any]:
        return [case] if case.choice is None else [generator.choice(case.choice)]

    return [next(combinations.walk(values_of)) for _ in range(MAX_CHECKED)]


def _find_unused_cases(recipe: Recipe, combinations: Combinations, chosen: Sequence[Parameters]) -> Iterator[Finding]:
    """Yield cases that never apply, although their conditions are about paths of the file's space only.

    Cases whose paths are narrowed on the command line may stay unused.
    """
    space, used = combinations.space, set()
    given = recipe.origin.overrides
    whole = [path for path in space if not any(is_within(key, f"search.space.{path}") for key in given)]

    def values_of(path: str, number: int, case: Case) -> list[Any]:
        used.add((path, number))
        return [case] if case.choice is None else list(case.choice)

    assert len(list(combinations.walk(values_of))) == len(chosen)
    for path, cases in space.items():
        for number, case in enumerate(cases):
            searched = [any(overlap(condition, other) for other in whole) for condition in case.when or {}]
            if case.when and (path, number) not in used and all(searched):
                what = f"this case of `{path}` never applies: no trial has {_say(case.when)} when it is reached"
                remedy = "ask for values that the space has, put the case first, or remove it"
                yield Finding((f"{place_of(recipe.search, path, number)}.when",), what, remedy)


def _vary_ranges(chosen: Sequence[Parameters]) -> Iterator[Parameters]:
    """Yield each combination with the lowest value of each range; then, once for each range, with all its values."""
    varied: set[int] = set()
    for parameters in chosen:
        ranges = {path: case for path, case in parameters.items() if isinstance(case, Case)}
        lowest = {**parameters, **{path: _values_in(case)[0] for path, case in ranges.items()}}
        yield lowest
        for path, case in ranges.items():
            if id(case) not in varied:
                varied.add(id(case))
                yield from ({**lowest, path: value} for value in _values_in(case)[1:])


def _values_in(case: Case) -> list[Any]:
    if case.integers is not None:
        low, high = case.integers
        return [*range(low, high)[:MAX_CHECKED], high]
    return list(case.uniform or case.loguniform or ())


class _Trials:
    """Checks trials one after another; a mistake of many trials is reported once."""

    def __init__(self, recipe: Recipe, search: Search) -> None:
        self.recipe = recipe
        self.search = search
        self._data = recipe.model_dump(exclude={"search"})
        self._reported = {finding.paths for finding in find_broken_rules(recipe)}

    def find(self, parameters: Parameters) -> Iterator[Finding]:
        lost = list(self._find_lost(parameters))
        for finding in lost or self._find_in_trial(parameters):
            if finding.paths not in self._reported:
                self._reported.add(finding.paths)
                yield finding

    def _find_lost(self, parameters: Parameters) -> Iterator[Finding]:
        """Yield values without a section, or that the value of their section sets already."""
        for path in parameters:
            parent, _, key = path.rpartition(".")
            around = {other: item for other, item in parameters.items() if other != path and is_within(path, other)}
            section = value_at(put_all(self._data, around), tuple(parent.split(".")))
            place = f"search.space.{path}"
            if not isinstance(section, dict):
                yield Finding((place,), *_explain_no_section(path, parent, section, around, self.search))
            elif around and key in section:
                what = f"`{parent}` sets `{key}` to {write_value(section[key])}, and `{path}` is searched too"
                yield Finding((place,), what, f"take `{key}` out of the values of `{parent}`")

    def _find_in_trial(self, parameters: Parameters) -> Iterator[Finding]:
        try:
            trial = Recipe.model_validate(put_all(self._data, parameters))
        except ValidationError:
            return  # Reported with the value.
        trial._origin = self.recipe.origin
        for finding in find_broken_rules(trial):
            if finding.paths not in self._reported:
                self._reported.add(finding.paths)
                yield _blame(finding, parameters)
        yield from self._find_too_few_evaluations(trial.train)

    def _find_too_few_evaluations(self, train: Train) -> Iterator[Finding]:
        scheduler, number = self.search.scheduler, count_evaluations(train)
        if scheduler == "none" or number is None or number > self.search.grace:
            return
        does = "stop any" if scheduler == "asha" else "exchange anything"
        often = "once" if number == 1 else f"{number} times"
        yield Finding(
            ("search.scheduler", "search.grace", *_LENGTH),
            f"a trial is evaluated {often}, and the scheduler `{scheduler}` looks "
            f"after {self.search.grace} (`search.grace`) for the first time, too late to {does}",
            "lower `train.evaluate_every` to a number of steps, train longer, or set `search.scheduler` to none",
        )


def count_evaluations(train: Train) -> int | None:
    """Return how often *select* is evaluated, including the end of training; None if that depends on the data."""
    if train.evaluate_every == "epoch":
        return math.ceil(train.epochs) if train.steps is None and train.epochs is not None else None
    return None if train.steps is None else math.ceil(train.steps / train.evaluate_every)


def _explain_no_section(path: str, parent: str, section: Any, around: Parameters, search: Search) -> tuple[str, str]:
    if not around:
        what = f"`{path}` is searched, but `{parent}` is {write_value(section)} in this recipe"
        return what, f"give `{parent}` a value, or search it too"
    entry = (search.space or {})[parent]
    values = [value for case in (entry if isinstance(entry, list) else [entry]) for value in case.choice or ()]
    mapping = next((value for value in values if isinstance(value, dict) and value), {})
    sample = next((f"`when: {{{parent}.{key}: {write_value(value)}}}`" for key, value in mapping.items()), "a `when`")
    what = f"`{path}` is searched, but `{parent}` may be {write_value(section)}"
    return what, f"give `{path}` {sample}, or take {write_value(section)} out of the values of `{parent}`"


def _blame(finding: Finding, parameters: Parameters) -> Finding:
    """Return a trial's violated rule as one of the space: values that must not be combined."""
    guilty = {
        path: value for path, value in parameters.items() if any(overlap(path, other) for other in finding.paths)
    } or parameters
    places = tuple(f"search.space.{path}" for path in guilty)
    what = f"trials with {_say(guilty)} cannot run: {finding.what}"
    if len(guilty) == 1:
        return Finding(
            (*places, *finding.paths), what, f"leave that value out (`choice` lists single ones), or {finding.remedy}"
        )
    (first, value), (second, _), *_ = guilty.items()
    remedy = (
        f"take one of the values out, or write cases so that they do not meet: "
        f"`{second}: [{{when: {{{first}: {write_value(value)}}}, choice: [...]}}, {{choice: [...]}}]`"
    )
    return Finding((*places, *finding.paths), what, remedy)


def _say(values: Parameters) -> str:
    return " and ".join(f"`{path}: {write_value(value)}`" for path, value in values.items())
