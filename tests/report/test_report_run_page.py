"""The page of a run: its scores, its curves, its classes; also while it runs and after it failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_examples import make_metrics, make_result, write_run
from report_reading import Page

from orchestrator.report import write_report
from orchestrator.report.charts.confusion import Confusion
from orchestrator.report.charts.training import averaged, points

LABELS = ["refund", "card lost", "delivery"]
HOSTILE = "<script>alert(1)</script>\"'&"


def read(directory: Path) -> Page:
    return Page.read(write_report(directory))


def test_the_result_is_told_in_one_sentence(tmp_path: Path) -> None:
    scores = make_result(LABELS)["metrics"]
    page = read(write_run(tmp_path, LABELS))
    test, select = scores["test"]["accuracy"], scores["select"]["accuracy"]
    assert f"The run reaches accuracy {test:.4f} on test and {select:.4f} on select" in page.shown
    assert "with the weights of step 250 of 300." in page.shown
    assert "10.6 M 46.9% of 22.7 M" in page.shown


def test_the_curves_and_the_best_step_are_drawn(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, LABELS))
    assert [title.split(". ")[1] for title in page.titles()] == [
        "Loss",
        "Score",
        "Learning rate",
        "Gradient norm",
        "Confusion matrix",
    ]
    assert "the ring is the best, step 250, whose weights were kept" in page.shown
    assert len(page.classes("winner-frame")) == 2, "wide and narrow"


def test_classes_have_their_scores_and_what_they_are_taken_for(tmp_path: Path) -> None:
    result = make_result(LABELS)
    page = read(write_run(tmp_path, LABELS))
    refund = result["details"]["test"]["per_class"]["refund"]
    assert f"refund {refund['precision']:.4f} {refund['recall']:.4f} {refund['f1-score']:.4f} 40" in page.shown
    counts = result["details"]["test"]["confusion_matrix"]
    assert f"{counts[0][1]} " in page.shown


def test_scores_before_the_first_step_stand_beside_those_after(tmp_path: Path) -> None:
    before = {"select": {"accuracy": 0.3111, "loss": 1.5}, "test": {"accuracy": 0.3222, "loss": 1.6}}
    shown = read(write_run(tmp_path, LABELS, before=before)).shown
    assert "select select before test test before" in shown
    assert "0.3111" in shown and "0.3222" in shown


def test_a_task_without_classes_has_no_such_section(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, LABELS, details={"test": {}}))
    assert "Classes on" not in page.shown and len(page.titles()) == 4


def test_a_run_that_goes_on_shows_what_there_is(tmp_path: Path) -> None:
    directory = write_run(tmp_path, LABELS, make_metrics()[:12])
    (directory / "result.json").unlink()
    page = read(directory)
    assert "There are no scores yet." in page.shown and "not finished" in page.shown
    assert len(page.titles()) == 4


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    directory = write_run(tmp_path, LABELS, [])
    (directory / "result.json").unlink()
    record = {"status": "failed", "reason": "the loss is nan at step 3\n    -> lower train.learning_rate"}
    (directory / "run.json").write_text(json.dumps(record), encoding="utf-8")
    page = read(directory)
    assert "The run failed: the loss is nan at step 3 -> lower train.learning_rate" in page.shown
    assert page.titles() == []


def test_no_label_becomes_markup(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, ["a", HOSTILE, "b"]))
    assert len(page.tags("script")) == 1, "the page's own"
    assert page.shown.count("<script>alert(1)</script>") >= 3, "in matrix, pairs and classes"


@pytest.mark.parametrize("num_labels", [2, 14, 15, 24, 30, 46, 77, 200])
def test_any_number_of_classes_has_a_page(tmp_path: Path, num_labels: int) -> None:
    page = read(write_run(tmp_path, [f"a rather long label {index}" for index in range(num_labels)]))
    assert len(page.tags("svg")) > 8
    assert page.shown.count("a rather long label 1 ") >= 1
    assert len(page.text) < 2_000_000


@pytest.mark.parametrize(
    "odd", [None, float("nan"), -1, True, "text", [], {}, [None], [[1]], 10**400], ids=lambda odd: repr(odd)[:12]
)
def test_any_value_may_be_missing_or_odd(tmp_path: Path, odd: Any) -> None:
    for name in make_result(LABELS):
        read(write_run(tmp_path / name, LABELS, **{name: odd}))
    good = make_result(LABELS)["details"]["test"]
    for name in good:
        read(write_run(tmp_path / f"details-{name}", LABELS, details={"test": {**good, name: odd}}))
    rows = [{**row, **dict.fromkeys(list(row)[index % 5 :], odd)} for index, row in enumerate(make_metrics())]
    directory = write_run(tmp_path / "rows", LABELS, rows)
    read(directory)
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    for name in record:
        (directory / "run.json").write_text(json.dumps({**record, name: odd}), encoding="utf-8")
        read(directory)


def test_a_long_training_is_averaged_and_stays_small(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, LABELS, make_metrics(30_000, 2)))
    assert "Neighbouring records are averaged." in page.shown
    assert len(page.text) < 300_000


def test_averages_are_those_of_neighbours() -> None:
    found = averaged([(float(step), 2.0 * step) for step in range(2000)])
    assert len(found) == 500 and found[0] == (1.5, 3.0)
    assert averaged([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_rows_without_a_value_are_left_out_of_a_curve() -> None:
    rows = [{"step": 2, "loss": 0.5}, {"step": 1, "loss": None}, {"loss": 3.0}, {"step": 0, "loss": 0.9}]
    assert points(rows, "loss") == [(0.0, 0.9), (2.0, 0.5)]


def test_confused_pairs_are_the_errors_most_frequent_first() -> None:
    found = Confusion.of({"labels": ["a", "b", "c"], "confusion_matrix": [[9, 1, 0], [3, 6, 2], [0, 0, 0]]})
    assert found is not None
    assert found.confused_pairs() == [(1, 0), (1, 2), (0, 1)]
    assert found.share(0, 1) == 0.1 and found.share(2, 0) == 0.0


def test_a_matrix_of_another_shape_than_the_labels_is_not_drawn() -> None:
    assert Confusion.of({"labels": ["a", "b"], "confusion_matrix": [[1, 2]]}) is None
    assert Confusion.of({"labels": ["a"], "confusion_matrix": [[1, 2]]}) is None
    assert Confusion.of({}) is None


def test_a_cut_spike_is_told(tmp_path: Path) -> None:
    rows = make_metrics()
    rows[20]["gradient_norm"] = 5000.0
    assert "1 record above" in read(write_run(tmp_path, LABELS, rows)).shown
