"""The space of a search: the points of a grid, random points, suggestions of TPE, and the recipe of each point.

It knows recipes only; what runs the trials is elsewhere.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe import FreezeDepth, Recipe
from orchestrator.recipe.combination_rules import find_in_grid
from orchestrator.recipe.conditions import (
    Cases,
    Combinations,
    Parameters,
    boundaries,
    cases_of,
    place_of,
    put_all,
    write_boundaries,
)
from orchestrator.recipe.load import build_recipe
from orchestrator.recipe.origin import Origin, is_within
from orchestrator.recipe.rules import as_problems
from orchestrator.recipe.schema import Case
from orchestrator.recipe.wording import write_value
from orchestrator.search.defaults import default_space
from orchestrator.search.distributions import Distribution, distribution_of

FREEZE = "transfer.freeze"
MAX_REPEATS = 1000
"""Random points in a row that are not new, after which a space counts as exhausted."""


@dataclass(frozen=True)
class Space:
    """Parameters of a recipe and the values that trials give them; freeze depths are written out."""

    recipe: Recipe
    cases: Cases

    @classmethod
    def of(cls, recipe: Recipe, num_layers: int | None = None, num_parameters: int | None = None) -> Space:
        """Return the space that a recipe describes, or the default one.

        Args:
            num_layers: of the source model. `every` becomes its boundaries, and of depths that freeze the same blocks
                the first stays; None where models of several sizes are searched.
            num_parameters: of the source model, for the default learning rates.

        Raises:
            RecipeError: a depth that the model does not have; `every` without `num_layers`.
        """
        written = recipe.search.space if recipe.search is not None else None
        cases: Cases = (
            default_space(recipe, num_parameters)
            if written is None
            else {path: cases_of(entry) for path, entry in written.items()}
        )
        if num_layers is not None:
            cases = _fit_to_model(recipe, cases, num_layers)
        elif FREEZE in cases and any(case.choice == "every" for case in cases[FREEZE]):
            what = "`every` is every freeze boundary of the source model, whose layers are not known"
            where = recipe.origin.where(f"search.space.{FREEZE}")
            raise RecipeError(Problem(what, where, "list depths: `[0, 25%, 50%, 75%, all]`"))
        return cls(recipe, cases)

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted paths of the parameters, in written order."""
        return tuple(self.cases)

    def written(self) -> dict[str, Any]:
        """Return the space as plain data for a recipe, with defaults and boundaries written out."""
        plain = {path: [case.model_dump() for case in cases] for path, cases in self.cases.items()}
        return {path: cases[0] if len(cases) == 1 else cases for path, cases in plain.items()}

    def grid(self, trials: int) -> list[Parameters]:
        """Return the product of all choices and evenly spaced points of the ranges, at most `trials` points.

        Each range in turn, in written order, gets one more point as long as that fits.

        Raises:
            RecipeError: the choices alone make more points.
        """
        combinations = Combinations(self.recipe, self.cases)
        if problems := as_problems(self.recipe, find_in_grid(combinations, trials)):
            raise RecipeError(problems)
        counts = self._count_points(combinations, trials)

        def values_of(path: str, _: int, case: Case) -> list[Any]:
            return distribution_of(case).points(counts.get(path, 1))

        return list(_without_repeats(combinations.walk(values_of)))

    def _count_points(self, combinations: Combinations, trials: int) -> dict[str, int]:
        """Return the number of points of each range."""
        # How often the same ranges take part; no condition asks for a value of a range, so that is all that counts.
        groups = Counter(
            tuple((path, distribution_of(value).size) for path, value in chosen.items() if isinstance(value, Case))
            for chosen in combinations.walk_choices()
        )
        counts = {path: 1 for path in self.cases if any(path == other for group in groups for other, _ in group)}

        def total() -> float:
            return sum(
                times * math.prod(min(counts[path], size) for path, size in group) for group, times in groups.items()
            )

        growing = list(counts)
        while growing:
            for path in tuple(growing):
                before = total()
                counts[path] += 1
                if not before < total() <= trials:
                    counts[path] -= 1
                    growing.remove(path)
        return counts

    def random(self, trials: int, seed: int) -> list[Parameters]:
        """Return `trials` different random points of the space, or fewer where there are no more.

        Each has a random stream of its own, so the first ten are the same for any number of trials.
        """
        found: dict[str, Parameters] = {}
        index = repeats = 0
        combinations = Combinations(self.recipe, self.cases)
        while len(found) < trials and repeats < MAX_REPEATS:
            parameters = self._draw(combinations, f"{seed}/{index}")
            key = key_of(parameters)
            repeats = repeats + 1 if key in found else 0
            found.setdefault(key, parameters)
            index += 1
        return list(found.values())

    def _draw(self, combinations: Combinations, stream: str) -> Parameters:
        def values_of(path: str, _: int, case: Case) -> list[Any]:
            return [distribution_of(case).sample(Random(f"{stream}/{path}"))]

        return next(combinations.walk(values_of))

    def optuna_define(self, trial: Any) -> dict[str, Any]:
        """Let an `optuna.Trial` suggest a point; return its parameters by their paths."""

        def values_of(path: str, number: int, case: Case) -> list[Any]:
            # Optuna wants the same values under the same name, so that each case has one of its own.
            return [distribution_of(case).suggest(trial, f"{path}#{number}")]

        return next(Combinations(self.recipe, self.cases).walk(values_of))

    def mutations(self) -> dict[str, Distribution]:
        """Return the distributions of the parameters that population-based training changes during a trial.

        The recipe's rules see to it that these are numbers of `train`, and depend on nothing else that is searched.
        """
        return next(Combinations(self.recipe, self.cases).walk(lambda _path, _number, case: [distribution_of(case)]))


def trial_recipe(recipe: Recipe, parameters: Parameters) -> Recipe:
    """Return the recipe of one trial, as `train` runs it: with its parameters and without `search`.

    Messages about a parameter name the line of the space that it came from.

    Raises:
        RecipeError: the parameters do not go together.
    """
    data = put_all(recipe.model_dump(exclude={"search"}), parameters)
    return build_recipe(data, _move_origin(recipe.origin, parameters))


def describe(parameters: Mapping[str, Any]) -> str:
    """Return parameters as a short text for a table: `freeze=3 learning_rate=5e-05`."""
    return " ".join(f"{name}={write_value(value)}" for name, value in short_names(parameters).items())


def short_names(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by the last part of each path, or by as many parts as distinguish it from the others."""
    names = {}
    for path, value in parameters.items():
        parts = path.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other for other in parameters if other != path]
        names[next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))] = value
    return names


def _fit_to_model(recipe: Recipe, cases: Cases, num_layers: int) -> dict[str, tuple[Case, ...]]:
    """Return the space with the model's boundaries for `every`, and each depth once."""
    fitted = write_boundaries(cases, boundaries(recipe, num_layers))
    if problems := list(_find_too_deep(recipe, fitted, num_layers)):
        raise RecipeError(problems)
    if FREEZE not in fitted:
        return fitted

    def keep_different(case: Case) -> Case:
        if not isinstance(case.choice, list):
            return case
        different = {FreezeDepth.parse(depth).resolve(num_layers): depth for depth in reversed(case.choice)}
        return case.model_copy(update={"choice": list(reversed(different.values()))})

    return {**fitted, FREEZE: tuple(map(keep_different, fitted[FREEZE]))}


def _find_too_deep(recipe: Recipe, cases: Cases, num_layers: int) -> Iterator[Problem]:
    for path, of_path in cases.items():
        for number, case in enumerate(of_path):
            place = place_of(recipe.search, path, number)
            asked = (case.when or {}).get(FREEZE, [])
            named = {f"{place}.when.{FREEZE}": asked if isinstance(asked, list) else [asked]}
            if path == FREEZE:
                ends = case.integers or []
                named |= {f"{place}.choice.{i}": [value] for i, value in enumerate(case.choice or [])}
                named |= {f"{place}.integers": ends[1:]}
            for where, depths in named.items():
                for depth in depths:
                    if isinstance(depth, int) and depth > num_layers:
                        what = f"freeze depth is {depth}, but the model has {num_layers} layers"
                        yield Problem(what, recipe.origin.where(where), f"use {num_layers} or less, or all")


def _move_origin(origin: Origin, parameters: Parameters) -> Origin:
    """Return the origin of a trial's values: lines of the space for its parameters, of the recipe for all others."""

    def move(places: Mapping[str, Any]) -> dict[str, Any]:
        kept = {path: place for path, place in places.items() if not any(is_within(path, each) for each in parameters)}
        for path in parameters:
            within = [place for other, place in places.items() if is_within(other, f"search.space.{path}")]
            kept.update({path: within[0]} if within else {})
        return kept

    return Origin(origin.file, move(origin.lines), move(origin.overrides))


def key_of(parameters: Parameters) -> str:
    """Return a text that is equal for equal parameters."""
    return json.dumps(parameters, sort_keys=True)


def _without_repeats(points: Iterator[Parameters]) -> Iterator[Parameters]:
    seen: set[str] = set()
    for point in points:
        if key_of(point) not in seen:
            seen.add(key_of(point))
            yield point
