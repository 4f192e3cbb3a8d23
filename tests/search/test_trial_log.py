"""The trial log: one line for each trial that ended, in whatever way; and the table on the screen."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.json_lines import read_json_lines
from orchestrator.search import trial_log as trial_logs
from orchestrator.search.changes import Changes
from orchestrator.search.outcome import Outcome, read_outcome, write_outcome
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial_log import TrialLog
from orchestrator.tasks.base import MainMetric

ACCURACY = MainMetric("accuracy", higher_is_better=True)
PARAMETERS = {"train.learning_rate": 1.0e-3, "transfer.freeze": "all"}
FIELDS = {
    "id",
    "parameters",
    "metrics",
    "best_step",
    "seconds",
    "core_seconds",
    "epochs",
    "evaluations",
    "status",
    "reason",
    "history",
}


@pytest.fixture
def directory(tmp_path: Path) -> SearchDirectory:
    found = SearchDirectory(tmp_path / "search")
    found.create()
    return found


@pytest.fixture
def log(directory: SearchDirectory) -> TrialLog:
    return TrialLog(directory, ACCURACY, 4, None)


def evaluation(step: int, accuracy: float | None, loss: float | None = 0.5) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    place = {"step": step, "epoch": step / 8, "phase": "tune", "split": "select"}
    return {**place, "loss": loss, "accuracy": accuracy, "f1_macro": accuracy, "seconds": step / 10}


def write_history(directory: SearchDirectory, id: str, *rows: dict[str, Any], **outcome: Any) -> None:
    """Write the files of a trial that ended."""
    run = directory.trial(id)
    run.create()
    for row in rows:
        run.append_metrics(row)
    write_outcome(run, Outcome(**outcome))


def test_a_trial_that_ended_is_a_line_with_everything_about_it(directory: SearchDirectory, log: TrialLog) -> None:
    assert log.add("0000", PARAMETERS) == {"id": "0000", "parameters": PARAMETERS}
    log.on_trial_start("0000")
    rows = [evaluation(8, 0.5), evaluation(16, 0.9), evaluation(24, 0.7)]
    for row in rows:
        log.on_trial_result("0000", row)
    assert read_json_lines(directory.rows) == []
    write_history(directory, "0000", *rows, best_step=16, seconds=3.0, core_seconds=5.0)
    log.on_trial_complete("0000", True, None)
    (row,) = read_json_lines(directory.rows)
    assert row.keys() == FIELDS
    assert row == {
        "id": "0000",
        "parameters": PARAMETERS,
        "metrics": {"loss": 0.5, "accuracy": 0.9, "f1_macro": 0.9},
        "best_step": 16,
        "seconds": 3.0,
        "core_seconds": 5.0,
        "epochs": 3.0,
        "evaluations": 3,
        "status": "finished",
        "reason": None,
        "history": [
            {"step": each["step"], "epoch": each["epoch"], "loss": 0.5, "accuracy": each["accuracy"]}
            | {"f1_macro": each["accuracy"], "seconds": each["seconds"]}
            for each in rows
        ],
    }


def test_of_equal_evaluations_the_one_with_the_lower_loss_is_the_best(
    directory: SearchDirectory, log: TrialLog
) -> None:
    log.add("0000", {})
    for row in (evaluation(8, 0.9, 0.5), evaluation(16, 0.9, 0.4), evaluation(24, 0.9, 0.4), evaluation(32, 0.8, 0.1)):
        log.on_trial_result("0000", row)
    log.on_trial_complete("0000", True, None)
    assert read_json_lines(directory.rows)[0]["best_step"] == 16


def test_where_low_is_good_the_lowest_is_the_best(directory: SearchDirectory) -> None:
    log = TrialLog(directory, MainMetric("loss", higher_is_better=False), 1, None)
    log.add("0000", {})
    for row in (evaluation(8, 0.9, 0.5), evaluation(16, 0.9, 0.4), evaluation(24, 0.9, 0.6)):
        log.on_trial_result("0000", row)
    log.on_trial_complete("0000", True, None)
    assert read_json_lines(directory.rows)[0]["best_step"] == 16


def test_a_trial_that_was_stopped_is_recorded_as_stopped_and_stays_so(
    directory: SearchDirectory, log: TrialLog
) -> None:
    log.add("0000", PARAMETERS)
    log.on_trial_result("0000", evaluation(8, 0.5))
    log.on_trial_complete("0000", False, None)
    (row,) = read_json_lines(directory.rows)
    assert (row["status"], row["reason"]) == ("stopped", "behind the other trials, or out of time")
    assert (row["metrics"]["accuracy"], row["seconds"], row["evaluations"]) == (0.5, 0.8, 1)
    outcome = read_outcome(directory.trial("0000"))
    assert outcome is not None
    assert outcome.status == "stopped"


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_trial_that_failed_is_recorded_with_its_reason(
    evaluated: bool, directory: SearchDirectory, log: TrialLog
) -> None:
    log.add("0000", PARAMETERS)
    if evaluated:
        log.on_trial_result("0000", evaluation(8, 0.5))
    log.on_trial_complete("0000", True, "its process died")
    (row,) = read_json_lines(directory.rows)
    assert (row["status"], row["reason"]) == ("failed", "its process died")
    assert bool(row["metrics"]) == evaluated
    outcome = read_outcome(directory.trial("0000"))
    assert outcome is not None
    assert (outcome.status, outcome.reason) == ("failed", "its process died")


def test_what_the_trial_itself_wrote_down_counts(directory: SearchDirectory, log: TrialLog) -> None:
    log.add("0000", {})
    write_history(directory, "0000", status="failed", reason="the loss is nan at step 3")
    log.on_trial_complete("0000", True, "something that Ray says")
    assert read_json_lines(directory.rows)[0]["reason"] == "the loss is nan at step 3"


def test_no_line_is_written_twice(directory: SearchDirectory, log: TrialLog) -> None:
    rows = [evaluation(8, 0.5), evaluation(16, 0.9)]
    write_history(directory, "0000", *rows, best_step=16, seconds=3.0)
    for attempt in range(2):
        each = TrialLog(directory, ACCURACY, 4, None) if attempt else log
        each.add("0000", PARAMETERS)
        for row in rows:
            each.on_trial_result("0000", row)
        each.on_trial_complete("0000", True, None)
    assert len(read_json_lines(directory.rows)) == 1


def test_a_trial_that_ended_before_the_search_was_killed_gets_its_line_later(directory: SearchDirectory) -> None:
    rows = [evaluation(8, 0.5), evaluation(16, 0.9)]
    write_history(directory, "0000", *rows, best_step=16, seconds=3.0, core_seconds=2.0)
    log = TrialLog(directory, ACCURACY, 4, None)
    log.add("0000", PARAMETERS)
    log.on_trial_complete("0000", True, None)
    (row,) = read_json_lines(directory.rows)
    assert (row["metrics"]["accuracy"], row["evaluations"], row["seconds"]) == (0.9, 2, 3.0)


def test_evaluations_that_a_restarted_trial_reports_again_count_once(directory: SearchDirectory, log: TrialLog) -> None:
    log.add("0000", {})
    for step in (8, 16, 24, 8, 16, 24, 32):
        log.on_trial_result("0000", evaluation(step, 0.5))
    log.on_trial_complete("0000", True, None)
    (row,) = read_json_lines(directory.rows)
    assert [each["step"] for each in row["history"]] == [8, 16, 24, 32]


def test_each_batched_trial_has_its_line(directory: SearchDirectory, log: TrialLog) -> None:
    parameters_of = {"0001": {"train.learning_rate": 1.0}, "0002": {"train.learning_rate": 2.0}}
    spec = log.add_batch("batch-0", parameters_of)
    assert (spec["id"], spec["batched"]) == ("batch-0", parameters_of)
    log.on_trial_start("batch-0")
    write_history(directory, "0001", evaluation(8, 0.5), best_step=8, seconds=1.0)
    write_history(directory, "0002", evaluation(8, 0.7), best_step=8, status="failed", reason="the loss is inf")
    log.on_trial_complete("batch-0", True, None)
    rows = read_json_lines(directory.rows)
    assert [(row["id"], row["status"], row["parameters"]) for row in rows] == [
        ("0001", "finished", parameters_of["0001"]),
        ("0002", "failed", parameters_of["0002"]),
    ]
    assert log.running == {}


def test_a_batch_whose_process_died_fails_its_trials_that_had_not_ended(
    directory: SearchDirectory, log: TrialLog
) -> None:
    log.add_batch("batch-0", {"0001": {}, "0002": {}})
    write_history(directory, "0001", evaluation(8, 0.5), best_step=8)
    log.on_trial_complete("batch-0", True, "its process died")
    assert [(row["id"], row["status"]) for row in read_json_lines(directory.rows)] == [
        ("0001", "finished"),
        ("0002", "failed"),
    ]


def test_when_time_is_up_those_that_were_running_are_stopped_and_those_that_had_not_begun_wait(
    directory: SearchDirectory, log: TrialLog
) -> None:
    for id in ("0000", "0001", "0002"):
        log.add(id, {})
    log.add_batch("batch-0", {"0003": {}, "0004": {}})
    for id in ("0000", "0001", "batch-0"):
        log.on_trial_start(id)
    log.on_trial_result("0000", evaluation(8, 0.5))
    log.stop_running()
    (row,) = read_json_lines(directory.rows)
    assert (row["id"], row["status"], row["metrics"]["accuracy"]) == ("0000", "stopped", 0.5)
    assert read_outcome(directory.trial("0000")) is not None
    assert read_outcome(directory.trial("0001")) is None
    assert read_outcome(directory.trial("0003")) is None


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_evaluations_that_are_no_numbers_are_no_best_ones(
    unknown: float | None, directory: SearchDirectory, log: TrialLog
) -> None:
    log.add("0000", {})
    for row in (
        evaluation(8, unknown),
        evaluation(16, 0.5, unknown),
        evaluation(24, 0.5, 2.0),
        evaluation(32, 0.5, unknown),
    ):
        log.on_trial_result("0000", row)
    log.on_trial_complete("0000", True, None)
    log.add("0001", {})
    log.on_trial_result("0001", evaluation(8, unknown))
    log.on_trial_complete("0001", True, None)
    first, second = read_json_lines(directory.rows)
    assert first["best_step"] == 24
    assert first["history"][0]["accuracy"] is None
    assert (second["best_step"], second["metrics"]) == (None, {})


# ---- what a person sees


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_some(log: TrialLog, directory: SearchDirectory) -> None:
    for number, accuracy in enumerate((0.5, 0.9, 0.7)):
        id = f"000{number}"
        log.add(id, {"train.learning_rate": 10.0**-number})
        log.on_trial_start(id)
        log.on_trial_result(id, evaluation(8, accuracy))
        log.on_trial_complete(id, True, "too high" if number == 0 else None)
    log.add("0003", {})
    log.on_trial_start("0003")
    log.on_trial_result("0003", evaluation(8, 0.3))


def test_the_table_is_written_over_best_first_with_the_time_left(
    directory: SearchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_logs, "TABLE_INTERVAL_S", 0.0)
    screen = Terminal()
    run_some(TrialLog(directory, ACCURACY, 4, screen), directory)
    last = screen.getvalue().rpartition("\033[4A")[2]
    lines = [line.replace("\033[K", "") for line in last.splitlines()]
    assert lines[0].startswith("3/4 trials ended, 1 running, ")
    assert lines[1].split() == ["0001", "accuracy", "0.9000", "1", "evaluations", "finished", "learning_rate=0.1"]
    assert lines[2].split()[0] == "0002"
    assert lines[3] == "  1 failed; the reasons are in trials.jsonl"


@pytest.mark.parametrize("order", [1, -1])
def test_the_table_shows_the_best_whenever_they_ended_also_in_an_earlier_attempt(
    order: int, directory: SearchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_logs, "NUM_TRIALS_SHOWN", 3)
    ids = [f"{number:04d}" for number in range(8)][::order]
    for attempt in (ids[:4], ids[4:]):
        log = TrialLog(directory, ACCURACY, 8, None)
        for id in attempt:
            log.add(id, {})
            log.on_trial_result(id, evaluation(8, int(id) / 10))
            log.on_trial_complete(id, True, "too late" if id == "0006" else None)
    head, *shown, failed = log._lines()
    assert head.startswith("8/8 trials ended")
    assert [line.split()[0] for line in shown] == ["0007", "0005", "0004"]
    assert failed == "  1 failed; the reasons are in trials.jsonl"


def test_without_a_terminal_a_line_is_written_now_and_then(
    directory: SearchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    run_some(TrialLog(directory, ACCURACY, 4, screen), directory)
    assert len(screen.getvalue().splitlines()) <= 1
    assert "\033" not in screen.getvalue()
    monkeypatch.setattr(trial_logs, "TABLE_INTERVAL_S", 0.0)
    screen = io.StringIO()
    log = TrialLog(directory, ACCURACY, 4, screen)
    log.add("0003", {})
    log.on_trial_result("0003", evaluation(8, 0.3))
    log.on_trial_result("0003", evaluation(16, 0.4))
    (line,) = screen.getvalue().splitlines()
    assert "3/4 trials ended" in line
    assert "accuracy 0.9000" in line


def test_where_trials_end_together_the_time_left_is_not_estimated(directory: SearchDirectory) -> None:
    for end_together in (False, True):
        log = TrialLog(directory, ACCURACY, 9, None, end_together)
        log.add(f"000{end_together:d}", {})
        log.on_trial_result(f"000{end_together:d}", evaluation(8, 0.5))
        log.on_trial_complete(f"000{end_together:d}", True, None)
        assert (" left" in log._lines()[0]) is not end_together


def test_parameters_that_changed_during_a_trial_are_those_of_the_best_evaluation(
    log: TrialLog, directory: SearchDirectory
) -> None:
    log.add("0000", PARAMETERS)
    for step, accuracy, rate in ((8, 0.5, 1.0e-3), (16, 0.8, 2.0e-3), (24, 0.7, 3.0e-3)):
        log.on_trial_result("0000", {**evaluation(step, accuracy), "parameters": {"train.learning_rate": rate}})
    log.on_trial_complete("0000", True, None)
    (row,) = read_json_lines(directory.rows)
    assert row["parameters"] == {"train.learning_rate": 2.0e-3, "transfer.freeze": "all"}
    assert [each["parameters"]["train.learning_rate"] for each in row["history"]] == [1.0e-3, 2.0e-3, 3.0e-3]
    assert "parameters" not in row["metrics"]


def test_changed_parameters_are_recorded_also_where_only_the_directory_has_the_evaluations(
    directory: SearchDirectory, log: TrialLog
) -> None:
    run = directory.trial("0000")
    write_history(directory, "0000", evaluation(8, 0.5), evaluation(16, 0.8), best_step=16)
    Changes(run, PARAMETERS).record(8, {**PARAMETERS, "train.learning_rate": 2.0e-3})
    log.add("0000", PARAMETERS)
    log.on_trial_complete("0000", True, None)
    (row,) = read_json_lines(directory.rows)
    assert row["parameters"] == {"train.learning_rate": 2.0e-3, "transfer.freeze": "all"}
    assert [each["parameters"]["train.learning_rate"] for each in row["history"]] == [1.0e-3, 2.0e-3]


def test_the_lines_are_plain_json(directory: SearchDirectory) -> None:
    run_some(TrialLog(directory, ACCURACY, 4, None), directory)
    for line in directory.rows.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
