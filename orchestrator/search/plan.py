"""Plans a search: its metric and its trials, settled and checked before a trial starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import models
from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.recipe.conditions import Parameters
from orchestrator.recipe.schema import Search
from orchestrator.search.distributions import Distribution
from orchestrator.search.records import BUDGET
from orchestrator.search.space import FREEZE, Space, trial_recipe
from orchestrator.tasks import read_options
from orchestrator.tasks.base import MainMetric
from orchestrator.training.assembling import assemble, check_structure
from orchestrator.training.prepare import Prepared
from orchestrator.training.session import choose_metric
from orchestrator.transfer import read_methods

CHECKED = ("target.options", "transfer")
"""Sections whose values tasks and methods check themselves."""


@dataclass(frozen=True)
class SearchPlan:
    """A search that may start."""

    prepared: Prepared
    search: Search
    space: Space
    metric: MainMetric
    """Metric on *select* that trials are compared by."""
    num_layers: int
    num_parameters: int
    """Parameters of the source model."""
    known: list[dict[str, Any]] | None
    """Parameters of every trial; None where they depend on earlier scores."""

    @property
    def num_trials(self) -> int:
        return self.search.trials if self.known is None else len(self.known)

    @property
    def budget(self) -> dict[str, Any]:
        return {name: getattr(self.search, name) for name in BUDGET}

    @property
    def weights_kept(self) -> int:
        """Number of the best trials whose weights are kept."""
        return max(1, self.search.reseed_top)

    @property
    def boundaries(self) -> list[int]:
        """Freeze boundaries of the trials, as numbers of frozen layers."""
        depths: set[int | str] = set()
        cases = self.space.cases.get(FREEZE, ())
        for case in cases:
            if case.integers is not None:
                depths.update(range(case.integers[0], case.integers[1] + 1))
            elif isinstance(case.choice, list):
                depths.update(case.choice)
        if not cases or all(case.when is not None for case in cases):
            depths.add(self.prepared.recipe.transfer.freeze)
        phases = self.prepared.recipe.transfer.phases or []
        depths.update(phase.freeze for phase in phases if phase.freeze is not None)
        found = [models.resolve_depth(depth, self.num_layers) for depth in depths]
        return sorted({depth.num_layers + depth.tail for depth in found if depth.stem})

    @property
    def mutations(self) -> dict[str, Distribution]:
        """Distributions of the parameters that population-based training changes; empty for other schedulers."""
        return self.space.mutations() if self.search.scheduler == "pbt" else {}


def plan_search(prepared: Prepared) -> SearchPlan:
    """Return the plan of a search; raise InputError with all problems that can be found before a trial starts."""
    recipe = prepared.recipe
    options = recipe.search or Search()
    metric = choose_search_metric(prepared, options)
    parts = check_structure(prepared) or assemble(prepared)
    num_layers, num_parameters = len(parts.blocks.layers), parts.count_parameters()["total"]
    space = Space.of(recipe, num_layers, num_parameters)
    known = None
    if options.algorithm == "grid":
        known = space.grid(options.trials)
    elif options.algorithm == "random":
        known = space.random(options.trials, options.seed)
    check_trials(recipe, known or [])
    return SearchPlan(prepared, options, space, metric, num_layers, num_parameters, known)


def check_trials(recipe: Recipe, known: Sequence[Parameters]) -> None:
    """Check what tasks and methods say of the trials' options, once for trials that differ elsewhere alone.

    Raises:
        RecipeError: with all problems of all trials.
    """
    different = {
        json.dumps(some, sort_keys=True): some
        for each in known
        if (some := {path: value for path, value in each.items() if path.startswith(CHECKED)})
    }
    problems: dict[Problem, None] = {}
    for parameters in different.values():
        trial = trial_recipe(recipe, parameters)
        for check in (read_options, read_methods):
            try:
                check(trial)
            except RecipeError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise RecipeError(problems)


def choose_search_metric(prepared: Prepared, options: Search) -> MainMetric:
    """Return the search's metric, by default the one that picks the best checkpoint.

    Raises:
        RecipeError: the task has no such metric, or its best value is not the recipe's `search.mode`.
    """
    if options.metric is None:
        metric = choose_metric(prepared)
    else:
        known = prepared.task.metric_directions()
        if options.metric not in known:
            close = nearest(options.metric, known)
            where = prepared.recipe.origin.where("search.metric")
            remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(sorted(known))}"
            raise RecipeError(Problem(f"the task has no metric '{options.metric}'", where, remedy))
        metric = MainMetric(options.metric, known[options.metric])
    better = "max" if metric.higher_is_better else "min"
    if options.mode not in (None, better):
        what = f"search.mode is {options.mode}, but the best {metric.name} is the {better}imum"
        where = prepared.recipe.origin.where("search.mode")
        raise RecipeError(Problem(what, where, f"set search.mode to {better}, or remove it"))
    return metric
