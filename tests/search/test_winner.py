"""Which trial is named the winner, from the lines of trials.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import RunFailed
from orchestrator.json_lines import append_json_line
from orchestrator.search.records import SearchDirectory
from orchestrator.search.run_trials import choose_winner
from orchestrator.tasks.base import MainMetric


@pytest.fixture
def directory(tmp_path: Path) -> SearchDirectory:
    found = SearchDirectory(tmp_path)
    found.create()
    return found


def plan(higher_is_better: bool = True) -> Any:
    """What the choice asks of a plan."""
    recipe = SimpleNamespace(train=SimpleNamespace(seed=7))
    return SimpleNamespace(metric=MainMetric("score", higher_is_better), prepared=SimpleNamespace(recipe=recipe))


def put(directory: SearchDirectory, **scores: float | None) -> None:
    """Lines of trials; `a_seed_8` is the trial `a` again with seed 8."""
    for name, score in scores.items():
        seed = name.partition("_seed_")[2]
        parameters = {"train.seed": int(seed)} if seed else {}
        row = {"id": name.replace("_", "-"), "parameters": parameters, "metrics": {"score": score}}
        append_json_line(
            directory.rows, {**row, "status": "finished" if score is not None else "failed", "reason": "odd"}
        )


def test_without_repetitions_the_best_score_wins(directory: SearchDirectory) -> None:
    put(directory, a=0.5, b=0.7, c=None)
    winner = choose_winner(plan(), directory)
    assert (winner["id"], winner["seeds"]) == ("b", [{"seed": 7, "score": 0.7}])
    assert choose_winner(plan(higher_is_better=False), directory)["id"] == "a"


def test_among_those_that_were_repeated_the_best_mean_wins_and_no_other(directory: SearchDirectory) -> None:
    put(directory, a=0.9, b=0.8, c=0.79, b_seed_8=0.3, c_seed_8=0.75, b_seed_9=None, c_seed_9=0.77)
    winner = choose_winner(plan(), directory)
    assert winner["id"] == "c"
    assert winner["seeds"] == [{"seed": 7, "score": 0.79}, {"seed": 8, "score": 0.75}, {"seed": 9, "score": 0.77}]


def test_a_repetition_itself_never_wins(directory: SearchDirectory) -> None:
    put(directory, a=0.5, a_seed_8=0.9)
    assert choose_winner(plan(), directory)["id"] == "a"


def test_where_none_has_a_score_the_reasons_are_told(directory: SearchDirectory) -> None:
    put(directory, a=None)
    with pytest.raises(RunFailed, match="no trial has a score: odd"):
        choose_winner(plan(), directory)
