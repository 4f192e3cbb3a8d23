"""Which trials a search runs, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.json_lines import append_json_line
from orchestrator.search import run_trials
from orchestrator.search.plan import SearchPlan, plan_search
from orchestrator.search.records import SearchDirectory
from orchestrator.search.run import default_output
from orchestrator.training.prepare import Prepared

RATE = "train.learning_rate"


@pytest.fixture
def plan_of(prepared_toy: Prepared, write_recipe: Callable[..., Path]) -> Callable[..., SearchPlan]:
    def make(**search: Any) -> SearchPlan:
        path = write_recipe(search={"space": {RATE: {"choice": [1.0e-3]}}, **search})
        return plan_search(replace(prepared_toy, recipe=orchestrator.load_recipe(path)))

    return make


@pytest.fixture
def directory(tmp_path: Path) -> SearchDirectory:
    found = SearchDirectory(tmp_path / "search")
    found.create()
    return found


def write_row(directory: SearchDirectory, id: str, accuracy: float) -> None:
    seed = id.partition("-seed-")[2]
    parameters = {RATE: 1.0e-3, **({"train.seed": int(seed)} if seed else {})}
    metrics = {"accuracy": accuracy, "loss": 0.5}
    row = {"id": id, "parameters": parameters, "metrics": metrics, "status": "finished", "reason": None}
    append_json_line(directory.rows, row)


class Listing:
    """A runner that runs nothing and keeps the trials that it is given."""

    max_batches = 0

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def run(self, log: Any, specs: Any, search: Any, seconds: float | None = None) -> None:
        self.specs = list(specs)


def test_a_search_killed_while_it_repeats_trials_continues_with_the_same_seeds(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory
) -> None:
    plan = plan_of(reseed_top=2, reseeds=2)
    for number, accuracy in enumerate((0.7, 0.9, 0.8)):
        write_row(directory, f"000{number}", accuracy)
    first, again = Listing(), Listing()
    run_trials.repeat_best(plan, directory, None, first)
    assert [spec["id"] for spec in first.specs] == ["0001-seed-1", "0001-seed-2", "0002-seed-1", "0002-seed-2"]
    write_row(directory, "0001-seed-1", 0.95)
    write_row(directory, "0001-seed-2", 0.1)
    run_trials.repeat_best(plan, directory, None, again)
    assert again.specs == first.specs


def test_a_killed_search_that_knows_its_trials_beforehand_has_the_same_under_the_same_numbers(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory
) -> None:
    space = {RATE: {"loguniform": [1.0e-5, 1.0e-2]}}
    for algorithm in ("random", "grid"):
        listed = []
        for _ in range(2):
            plan = plan_of(algorithm=algorithm, trials=6, space=space)
            runner = Listing()
            run_trials.run_trials_of_space(plan, directory, None, runner, None)
            listed.append(runner.specs)
            write_row(directory, "0000", 0.7)
            write_row(directory, "0003", 0.9)
        assert listed[0] == listed[1], algorithm
        assert len({spec["parameters"][RATE] for spec in listed[0]}) == 6, algorithm


def test_a_search_has_a_directory_of_its_own_beside_the_run(write_recipe: Callable[..., Path]) -> None:
    recipe = orchestrator.load_recipe(write_recipe(scale={"storage": "here"}))
    assert default_output(recipe) == Path("here/toy-search")
    named = orchestrator.load_recipe(write_recipe(name="toy-search", scale={"storage": "here"}))
    assert default_output(named) == Path("here/toy-search")
