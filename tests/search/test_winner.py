"""Which trial is the winner, from the rows of trials.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import RunFailed
from orchestrator.json_lines import append_json_line
from orchestrator.search import run_trials
from orchestrator.search.records import SearchDirectory
from orchestrator.search.run_trials import choose_winner
from orchestrator.tasks.base import MainMetric


@pytest.fixture
def directory(tmp_path: Path) -> SearchDirectory:
    found = SearchDirectory(tmp_path)
    found.create()
    return found


def plan(higher_is_better: bool = True) -> Any:
    """Return the part of a plan that the choice depends on."""
    recipe = SimpleNamespace(train=SimpleNamespace(seed=7))
    return SimpleNamespace(metric=MainMetric("score", higher_is_better), prepared=SimpleNamespace(recipe=recipe))


def put(directory: SearchDirectory, **scores: float | None) -> None:
    """Write rows of trials; `a_seed_8` is the trial `a` again with seed 8."""
    for name, score in scores.items():
        seed = name.partition("_seed_")[2]
        parameters = {"train.seed": int(seed)} if seed else {}
        row = {"id": name.replace("_", "-"), "parameters": parameters, "metrics": {"score": score}}
        status = "finished" if score is not None else "failed"
        append_json_line(directory.rows, {**row, "status": status, "reason": "the loss is nan"})


def test_without_repetitions_the_best_score_wins(directory: SearchDirectory) -> None:
    put(directory, a=0.5, b=0.7, c=None)
    winner = choose_winner(plan(), directory)
    assert (winner["id"], winner["seeds"]) == ("b", [{"seed": 7, "score": 0.7}])
    assert choose_winner(plan(higher_is_better=False), directory)["id"] == "a"


def test_of_equal_scores_the_lower_loss_wins_and_failed_trials_never_do(directory: SearchDirectory) -> None:
    for id, status, score, loss in (("a", "finished", 0.9, 0.5), ("b", "stopped", 0.9, 0.4), ("c", "failed", 1.0, 0.0)):
        row = {"id": id, "parameters": {}, "metrics": {"score": score, "loss": loss}, "status": status}
        append_json_line(directory.rows, row)
    assert choose_winner(plan(), directory)["id"] == "b"


def test_among_those_that_were_repeated_the_best_mean_wins_and_no_other(directory: SearchDirectory) -> None:
    put(directory, a=0.9, b=0.8, c=0.79, b_seed_8=0.3, c_seed_8=0.75, b_seed_9=None, c_seed_9=0.77)
    winner = choose_winner(plan(), directory)
    assert winner["id"] == "c"
    assert winner["seeds"] == [{"seed": 7, "score": 0.79}, {"seed": 8, "score": 0.75}, {"seed": 9, "score": 0.77}]
    assert "train.seed" not in winner["parameters"]


def test_where_lower_is_better_the_lowest_mean_wins(directory: SearchDirectory) -> None:
    put(directory, a=0.3, b=0.2, a_seed_8=0.3, b_seed_8=0.6)
    assert choose_winner(plan(higher_is_better=False), directory)["id"] == "a"


def test_a_repetition_itself_never_wins(directory: SearchDirectory) -> None:
    put(directory, a=0.5, a_seed_8=0.9)
    assert choose_winner(plan(), directory)["id"] == "a"


def test_where_none_has_a_score_the_reasons_are_given(directory: SearchDirectory) -> None:
    with pytest.raises(RunFailed, match="the time limit was reached before the first evaluation"):
        choose_winner(plan(), directory)
    put(directory, a=None, b=None)
    with pytest.raises(RunFailed, match=r"^no trial has a score: the loss is nan$"):
        choose_winner(plan(), directory)


class Counted(dict[str, Any]):
    """A row of trials.jsonl that counts how often its id is read."""

    num_reads = 0

    def __getitem__(self, key: str) -> Any:
        Counted.num_reads += key == "id"
        return super().__getitem__(key)


def test_each_row_is_read_as_often_however_many_there_are(
    directory: SearchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise four times as many trials would cost sixteen times as much."""
    reads = []
    for count in (25, 100):
        rows = [
            Counted(id=f"{number:04d}", status="finished", parameters={}, metrics={"score": number / count})
            for number in range(count)
        ]
        monkeypatch.setattr(run_trials, "read_json_lines", lambda _, rows=rows: rows)
        Counted.num_reads = 0
        assert choose_winner(plan(), directory)["id"] == f"{count - 1:04d}"
        reads.append(Counted.num_reads / count)
    assert 0 < reads[1] <= 1.1 * reads[0]
