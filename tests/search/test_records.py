"""The records of a search: lines that survive being torn, and an order of trials that has one first."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.json_lines import JsonLinesFollower, append_json_line, read_json_lines
from orchestrator.search.records import SearchDirectory, best_first, score_of
from orchestrator.search.trial_context import TrialContext
from orchestrator.tasks.base import MainMetric

ACCURACY, LOSS = MainMetric("accuracy", higher_is_better=True), MainMetric("loss", higher_is_better=False)


def row(id: str, status: str = "finished", **metrics: float | None) -> dict[str, Any]:
    return {"id": id, "status": status, "metrics": metrics}


def test_a_directory_is_closed_to_others_and_has_a_run_for_each_trial(tmp_path: Path) -> None:
    directory = SearchDirectory(tmp_path / "search")
    directory.create()
    directory.create()
    assert directory.root.stat().st_mode & 0o077 == 0
    assert directory.trial("0007").root == tmp_path / "search" / "trials" / "0007"
    assert {path.name for path in directory.root.iterdir()} == {"trials", "logs"}


def test_rows_come_back_in_their_order_and_no_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    assert read_json_lines(path) == []
    rows = [{"id": str(number), "text": "größer\n日本語"} for number in range(3)]
    for each in rows:
        append_json_line(path, each)
    assert read_json_lines(path) == rows
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    append_json_line(tmp_path / "x", {"id": "0", "metrics": {"loss": math.inf, "accuracy": math.nan}})
    assert json.loads((tmp_path / "x").read_text(), parse_constant=pytest.fail) == {
        "id": "0",
        "metrics": {"loss": None, "accuracy": None},
    }


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_passed_over_and_harms_no_later_one(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    for number in range(2):
        append_json_line(path, {"id": f"000{number}", "parameters": {"a": 1}})
    path.write_bytes(path.read_bytes()[:-cut])
    kept = ["0000", "0001"] if cut == 1 else ["0000"]  # Only the end of the line is missing.
    assert [each["id"] for each in read_json_lines(path)] == kept
    append_json_line(path, {"id": "0002"})
    assert [each["id"] for each in read_json_lines(path)] == [*kept, "0002"]


def test_each_line_that_others_add_is_read_once_and_not_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    follower = JsonLinesFollower(path)
    assert follower.read_new() == []
    for id in ("größer", "0001"):
        append_json_line(path, {"id": id})
    assert [each["id"] for each in follower.read_new()] == ["größer", "0001"]
    assert follower.read_new() == []
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "00')
    assert follower.read_new() == []
    with path.open("a", encoding="utf-8") as file:
        file.write('02"}\n')
    assert [each["id"] for each in follower.read_new()] == ["0002"]


@given(st.lists(st.sampled_from([None, 0.1, 0.3, 0.5, 0.7, 0.9, math.nan]), max_size=12), st.integers(1, 4))
def test_a_score_may_win_while_fewer_than_are_kept_are_better(scores: list[float | None], keep: int) -> None:
    unused: Any = None
    for metric in (ACCURACY, LOSS):
        with tempfile.TemporaryDirectory() as folder:
            path, known = Path(folder) / "trials.jsonl", list[float | None]()
            context = TrialContext(unused, [], path, metric, keep)
            for number, score in enumerate(scores):
                for asked in (0.0, 0.3, 0.6, 1.0):
                    better = [each for each in known if each is not None and metric.improves(each, asked)]
                    assert context.may_win(asked) == (len(better) < keep)
                append_json_line(path, {"id": str(number), "metrics": {metric.name: score}})
                known.append(score)


def test_a_score_that_is_not_a_number_is_none() -> None:
    assert score_of(row("0", accuracy=0.5), "accuracy") == 0.5
    for metrics in ({"accuracy": None}, {"accuracy": math.nan}, {}):
        assert score_of({"metrics": metrics}, "accuracy") is None
    assert score_of({"id": "0"}, "accuracy") is None


def test_of_equal_scores_the_lower_loss_is_better_and_then_the_earlier_trial() -> None:
    rows = [
        row("3", accuracy=0.8, loss=0.5),
        row("2", accuracy=0.9, loss=0.4),
        row("5", accuracy=0.9, loss=0.3),
        row("4", accuracy=0.9, loss=0.3),
        row("1", accuracy=0.9, loss=None),
    ]
    assert [each["id"] for each in best_first(rows, ACCURACY)] == ["4", "5", "2", "1", "3"]
    assert [each["id"] for each in best_first(rows, LOSS)] == ["4", "5", "2", "3"]


def test_failed_trials_and_those_without_a_score_win_nothing_but_stopped_ones_may() -> None:
    rows = [
        row("0", "failed", accuracy=1.0, loss=0.0),
        row("1", "stopped", accuracy=0.9, loss=0.1),
        row("2", accuracy=0.5, loss=0.5),
        row("3"),
        row("4", accuracy=math.nan, loss=0.1),
    ]
    assert [each["id"] for each in best_first(rows, ACCURACY)] == ["1", "2"]


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9, math.nan]), st.floats(0, 2)), max_size=8), st.randoms())
def test_the_order_does_not_depend_on_which_trial_ended_first(scores: list[tuple[float, float]], order: Any) -> None:
    rows = [row(f"{number}", accuracy=score, loss=loss) for number, (score, loss) in enumerate(scores)]
    expected = best_first(rows, ACCURACY)
    order.shuffle(rows)
    assert best_first(rows, ACCURACY) == expected
    assert len(expected) == sum(not math.isnan(score) for score, _ in scores)
