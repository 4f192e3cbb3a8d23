"""How a search names its winner, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import RunFailed
from orchestrator.json_lines import append_json_line
from orchestrator.search import run_trials
from orchestrator.search.plan import SearchPlan, plan_search
from orchestrator.search.records import SearchDirectory
from orchestrator.search.run import default_output
from orchestrator.search.run_trials import choose_winner
from orchestrator.training.prepare import prepare

RATE = "train.learning_rate"


@pytest.fixture
def plan_of(write_recipe: Callable[..., Path]) -> Callable[..., SearchPlan]:
    def make(**search: Any) -> SearchPlan:
        path = write_recipe(search={"space": {RATE: {"choice": [1.0e-3]}}, **search})
        return plan_search(prepare(orchestrator.load_recipe(path)))

    return make


@pytest.fixture
def directory(tmp_path: Path) -> SearchDirectory:
    found = SearchDirectory(tmp_path / "search")
    found.create()
    return found


def write_row(
    directory: SearchDirectory, id: str, accuracy: float | None, loss: float = 0.5, status: str = "finished"
) -> None:
    seed = id.partition("-seed-")[2]
    parameters = {RATE: 1.0e-3, **({"train.seed": int(seed)} if seed else {})}
    metrics = {} if accuracy is None else {"accuracy": accuracy, "loss": loss}
    reason = "the loss is nan" if status == "failed" else None
    append_json_line(
        directory.rows, {"id": id, "parameters": parameters, "metrics": metrics, "status": status, "reason": reason}
    )


def test_the_winner_is_the_best_on_select(plan_of: Callable[..., SearchPlan], directory: SearchDirectory) -> None:
    write_row(directory, "0000", 0.7)
    write_row(directory, "0001", 0.9, status="stopped")
    write_row(directory, "0002", 1.0, status="failed")
    write_row(directory, "0003", 0.9, loss=0.4)
    winner = choose_winner(plan_of(), directory)
    assert winner["id"] == "0003"
    assert winner["seeds"] == [{"seed": 0, "score": 0.9}]


def test_of_repeated_trials_the_one_with_the_best_mean_wins(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory
) -> None:
    for id, score in {"0000": 0.80, "0001": 0.95, "0002": 0.90}.items():
        write_row(directory, id, score)
    for id, score in {"0001-seed-1": 0.70, "0001-seed-2": 0.75, "0002-seed-1": 0.85, "0002-seed-2": 0.95}.items():
        write_row(directory, id, score)
    winner = choose_winner(plan_of(reseed_top=2), directory)
    assert winner["id"] == "0002"
    assert winner["seeds"] == [
        {"seed": 0, "score": 0.90},
        {"seed": 1, "score": 0.85},
        {"seed": 2, "score": 0.95},
    ]
    assert "train.seed" not in winner["parameters"]


def test_a_mean_is_low_where_low_is_good(plan_of: Callable[..., SearchPlan], directory: SearchDirectory) -> None:
    for id, loss in {"0000": 0.30, "0001": 0.20, "0000-seed-1": 0.30, "0001-seed-1": 0.60}.items():
        write_row(directory, id, 0.5, loss)
    assert choose_winner(plan_of(metric="loss", reseed_top=2), directory)["id"] == "0000"


def test_a_trial_that_was_not_repeated_does_not_win_over_those_that_were(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory
) -> None:
    for id, score in {"0000": 0.90, "0001": 0.85, "0000-seed-1": 0.60, "0000-seed-2": 0.60}.items():
        write_row(directory, id, score)
    # What is known of 0001 is one score, which may be luck as 0000's was.
    assert choose_winner(plan_of(reseed_top=1), directory)["id"] == "0000"


class Counted(dict[str, Any]):
    """A line of trials.jsonl that counts how often it is asked for its trial."""

    asked = 0

    def __getitem__(self, key: str) -> Any:
        Counted.asked += key == "id"
        return super().__getitem__(key)


def test_a_line_is_asked_for_its_trial_as_often_however_many_there_are(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else four times as many trials would cost sixteen times as much."""
    plan, asked = plan_of(), []
    for count in (25, 100):
        rows = [
            Counted(id=f"{number:04d}", status="finished", parameters={}, metrics={"accuracy": number / count})
            for number in range(count)
        ]
        monkeypatch.setattr(run_trials, "read_json_lines", lambda _, rows=rows: rows)
        Counted.asked = 0
        assert choose_winner(plan, directory)["id"] == f"{count - 1:04d}"
        asked.append(Counted.asked / count)
    assert 0 < asked[1] <= 1.1 * asked[0]


class Listing:
    """A place that runs nothing, and keeps what it was told to run."""

    max_batches = 0

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def run(self, log: Any, specs: Any, search: Any, seconds: float | None = None) -> None:
        self.specs = list(specs)


def test_a_search_killed_while_it_repeats_trials_goes_on_with_the_same_seeds(
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


@pytest.mark.parametrize("algorithm", ["random", "grid"])
def test_a_killed_search_that_knows_its_trials_beforehand_has_the_same_under_the_same_numbers(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory, algorithm: str
) -> None:
    space = {RATE: {"loguniform": [1.0e-5, 1.0e-2]}}
    listed = []
    for _ in range(2):
        plan = plan_of(algorithm=algorithm, trials=6, space=space)
        runner = Listing()
        run_trials.run_trials_of_space(plan, directory, None, runner, None)
        listed.append(runner.specs)
        write_row(directory, "0000", 0.7)
        write_row(directory, "0003", 0.9)
    assert listed[0] == listed[1]
    assert len({spec["parameters"][RATE] for spec in listed[0]}) == 6


def test_without_a_score_there_is_no_winner_but_reasons(
    plan_of: Callable[..., SearchPlan], directory: SearchDirectory
) -> None:
    plan = plan_of()
    with pytest.raises(RunFailed, match="the time limit was reached before the first evaluation"):
        choose_winner(plan, directory)
    write_row(directory, "0000", None, status="failed")
    write_row(directory, "0001", None, status="failed")
    with pytest.raises(RunFailed, match=r"^no trial has a score: the loss is nan$"):
        choose_winner(plan, directory)


def test_a_search_has_a_directory_of_its_own_beside_the_run(write_recipe: Callable[..., Path]) -> None:
    recipe = orchestrator.load_recipe(write_recipe(scale={"storage": "here"}))
    assert default_output(recipe) == Path("here/toy-search")
    named = orchestrator.load_recipe(write_recipe(name="toy-search", scale={"storage": "here"}))
    assert default_output(named) == Path("here/toy-search")
