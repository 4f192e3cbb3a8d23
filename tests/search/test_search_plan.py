"""What is settled before a trial starts: the metric, the trials, the boundaries whose features they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import load_recipe
from orchestrator.errors import ModelError, RecipeError
from orchestrator.search.plan import SearchPlan, plan_search
from orchestrator.tasks.base import MainMetric
from orchestrator.training.prepare import Prepared

FREEZE, RATE = "transfer.freeze", "train.learning_rate"
MakePlan = Callable[..., SearchPlan]


@pytest.fixture
def plan_of(prepared_toy: Prepared, write_recipe: Callable[..., Path]) -> MakePlan:
    """Return a plan of the toy recipe with these sections; its model has 2 layers."""

    def make(search: dict[str, Any] | None = None, *overrides: str, **sections: Any) -> SearchPlan:
        both = sections if search is None else {"search": {"trials": 100, **search}, **sections}
        recipe = load_recipe(write_recipe(**both), list(overrides))
        return plan_search(replace(prepared_toy, recipe=recipe))

    return make


def test_the_metric_is_the_searchs_or_what_picks_the_best_checkpoint(plan_of: MakePlan) -> None:
    by_f1 = {"early_stopping": {"metric": "f1_macro"}}
    cases: list[tuple[dict[str, Any], dict[str, Any], MainMetric]] = [
        ({}, {}, MainMetric("accuracy", True)),
        ({"metric": "loss"}, {}, MainMetric("loss", False)),
        ({"metric": "f1_macro", "mode": "max"}, {}, MainMetric("f1_macro", True)),
        # The metric that picks the best checkpoint picks the best trial, unless the search has its own.
        ({}, by_f1, MainMetric("f1_macro", True)),
        ({"metric": "loss"}, by_f1, MainMetric("loss", False)),
    ]
    space = {FREEZE: {"choice": [0]}}
    found = [(search, train, plan_of({"space": space, **search}, train=train).metric) for search, train, _ in cases]
    assert found == cases


def test_a_metric_that_does_not_exist_is_refused_in_its_line(plan_of: MakePlan) -> None:
    cases = [
        ({"metric": "acuracy"}, "the task has no metric 'acuracy'", "did you mean accuracy?"),
        ({"metric": "bleu"}, "the task has no metric 'bleu'", "use one of: accuracy, "),
        ({"metric": "loss", "mode": "max"}, "the best loss is the minimum", "set search.mode to min, or remove it"),
    ]
    for search, what, remedy in cases:
        with pytest.raises(RecipeError) as refused:
            plan_of({"space": {FREEZE: {"choice": [0]}}, **search})
        (problem,) = refused.value.problems
        assert what in problem.what
        assert remedy in (problem.remedy or "")
        assert "recipe.yaml:" in (problem.where or "")


def test_a_depth_that_the_model_does_not_have_is_refused_before_anything_starts(plan_of: MakePlan) -> None:
    with pytest.raises(RecipeError, match="freeze depth is 3, but the model has 2 layers"):
        plan_of({"space": {FREEZE: {"choice": [0, 3]}}})
    with pytest.raises(ModelError, match="freeze depth is 3, but the model has 2 layers"):
        plan_of({"space": {RATE: {"choice": [1e-3]}}}, transfer={"freeze": 3})


def test_what_tasks_and_methods_refuse_in_any_trial_is_refused_before_the_first_one(plan_of: MakePlan) -> None:
    space = {
        "transfer.methods.0.weight": {"choice": [0.1, -1]},
        "transfer.adapter": {"choice": [None, {"type": "lora"}]},
        "target.options.max_length": {"choice": [32, -3]},
        RATE: {"choice": [1.0e-3, 2.0e-3]},
    }
    with pytest.raises(RecipeError) as caught:
        plan_of({"space": space}, transfer={"methods": [{"name": "l2-sp"}]})
    said = str(caught.value)
    assert "is -1, must be a number at least 0" in said
    assert "is -3, must be" in said
    assert "`l2-sp` holds weights near the source's, but `transfer.adapter`" in said
    assert len(caught.value.problems) == 3


def test_a_grid_and_random_draws_are_known_beforehand_and_suggestions_are_not(plan_of: MakePlan) -> None:
    space = {FREEZE: {"choice": "every"}, RATE: {"loguniform": [1.0e-4, 1.0e-2]}}
    grid = plan_of({"space": space, "trials": 15})
    assert grid.num_trials == 15
    assert grid.known is not None
    assert [point[FREEZE] for point in grid.known[::3]] == [0, "stem", 1, 2, "all"]
    drawn = plan_of({"space": space, "trials": 7, "algorithm": "random", "seed": 3})
    assert drawn.known is not None
    assert len(drawn.known) == drawn.num_trials == 7
    suggested = plan_of({"space": space, "trials": 7, "algorithm": "tpe"})
    assert (suggested.known, suggested.num_trials) == (None, 7)


def test_a_recipe_without_a_search_gets_its_defaults_for_its_model(plan_of: MakePlan) -> None:
    plan = plan_of(None)
    assert plan.num_layers == 2
    assert plan.num_parameters > 10_000
    assert plan.known is not None
    assert 2 <= plan.num_trials <= 16
    assert {point[FREEZE] for point in plan.known} >= {0, "all"}
    probe = [point[RATE] for point in plan.known if point[FREEZE] == "all"]
    full = [point[RATE] for point in plan.known if point[FREEZE] != "all"]
    assert min(probe) > max(full)


def test_boundaries_are_those_of_all_trials(plan_of: MakePlan) -> None:
    on_schedule = {"when": {"train.schedule": "linear"}, "choice": ["all"]}
    cases: list[tuple[dict[str, Any], int, list[int]]] = [
        ({FREEZE: {"choice": "every"}}, 0, [0, 1, 2, 3]),
        ({FREEZE: {"choice": [0, "50%", "all"]}}, 0, [1, 3]),
        ({FREEZE: {"choice": [0, "stem"]}}, 2, [0]),
        ({FREEZE: {"integers": [0, 2]}}, 0, [1, 2]),
        ({RATE: {"choice": [1e-3]}}, 1, [1]),
        ({RATE: {"choice": [1e-3]}}, 0, []),
        # Where no case applies, the recipe's own depth stays.
        ({"train.schedule": {"choice": ["linear", "cosine"]}, FREEZE: on_schedule}, 1, [1, 3]),
    ]
    found = [
        (space, freeze, plan_of({"space": space}, transfer={"freeze": freeze}).boundaries) for space, freeze, _ in cases
    ]
    assert found == cases


def test_only_population_based_training_changes_values_during_a_trial(plan_of: MakePlan) -> None:
    space = {RATE: {"loguniform": [1.0e-4, 1.0e-2]}}
    assert plan_of({"space": space, "trials": 4}).mutations == {}
    mutations = plan_of({"space": space, "trials": 4, "scheduler": "pbt", "algorithm": "random"}).mutations
    assert list(mutations) == [RATE]
    assert mutations[RATE].clip(1.0) == 1.0e-2
