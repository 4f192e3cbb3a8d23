"""A whole search on the toy problem: its records, its winner, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.cli import main
from orchestrator.errors import InputError
from orchestrator.search.records import read_rows
from orchestrator.search.run import SearchRun

SPACE = {
    "transfer.freeze": {"choice": [1, "all"]},
    "train.learning_rate": {"choice": [1.0e-3, 1.0e-2]},
}

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run_search(recipe: Path, output: Path, *overrides: str) -> SearchRun:
    return orchestrator.search(orchestrator.load_recipe(str(recipe), list(overrides)), output=output)


def scores(rows: list[dict[str, Any]]) -> dict[str, tuple[str, dict[str, float]]]:
    return {row["id"]: (row["status"], row["metrics"]) for row in rows}


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory, write_toy: Callable[..., Path], tiny_bert: Path, small_data: Path
) -> Path:
    folder = tmp_path_factory.mktemp("search")
    options = {"space": SPACE, "trials": 4, "concurrent": 1}
    return write_toy(folder / "recipe.yaml", tiny_bert, small_data, search=options)


@pytest.fixture(scope="module")
def finished(recipe: Path, ray_cluster: None) -> SearchRun:
    return run_search(recipe, recipe.parent / "finished")


def test_every_trial_has_one_line_with_what_it_did(finished: SearchRun) -> None:
    rows = read_rows(finished.directory / "trials.jsonl")
    assert sorted(row["id"] for row in rows) == ["0000", "0001", "0002", "0003"]
    for row in rows:
        assert row["status"] == "finished"
        assert set(row["parameters"]) == set(SPACE)
        assert {"accuracy", "loss", "f1_macro"} <= row["metrics"].keys()
        assert row["evaluations"] == len(row["history"]) == 2
        assert row["seconds"] > 0
        assert (finished.directory / "trials" / row["id"] / "recipe.yaml").exists()


def test_the_winner_is_the_best_on_select_and_is_scored_on_test(finished: SearchRun) -> None:
    winner = finished.record["winner"]
    best = max(row["metrics"]["accuracy"] for row in finished.rows)
    assert finished.result["metrics"]["select"]["accuracy"] == pytest.approx(best)
    assert winner["metrics"]["test"] == finished.result["metrics"]["test"]
    assert all("test" not in row["metrics"] for row in finished.rows)


def test_the_best_recipe_trains_to_the_same_scores(finished: SearchRun, tmp_path: Path) -> None:
    best = orchestrator.load_recipe(str(finished.directory / "best.yaml"))
    again = orchestrator.train(best, output=tmp_path / "run")
    assert again.result["metrics"]["select"]["loss"] == pytest.approx(
        finished.result["metrics"]["select"]["loss"], rel=1e-4
    )
    assert again.result["metrics"]["test"]["accuracy"] == finished.result["metrics"]["test"]["accuracy"]


def test_the_winners_model_loads_with_plain_transformers(finished: SearchRun) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(finished.directory / "model")
    assert set(model.config.label2id) == {"animal", "fruit", "vehicle"}


def test_its_page_is_there(finished: SearchRun) -> None:
    assert "accuracy" in (finished.directory / "report.html").read_text(encoding="utf-8")


def test_the_same_command_again_changes_nothing(finished: SearchRun, recipe: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*") if path.is_file()}
    again = run_search(recipe, finished.directory)
    assert again.record["winner"] == finished.record["winner"]
    after = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} <= {".lock"}


def test_an_interrupted_search_goes_on_and_trains_no_trial_twice(
    finished: SearchRun, recipe: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(finished.directory, half)
    for name in ("result.json", "best.yaml", "report.html", "predictions.parquet"):
        (half / name).unlink()
    shutil.rmtree(half / "model")
    kept = [row for row in finished.rows if row["id"] in ("0000", "0002")]
    (half / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    for lost in ("0001", "0003"):
        shutil.rmtree(half / "trials" / lost)
    record = json.loads((half / "search.json").read_text())
    (half / "search.json").write_text(json.dumps({**record, "status": "running", "winner": None}))
    trained = {row["id"]: (half / "trials" / row["id"] / "metrics.jsonl").stat().st_mtime_ns for row in kept}

    again = run_search(recipe, half)
    assert again.record["winner"]["id"] == finished.record["winner"]["id"]
    assert scores(again.rows).keys() == scores(finished.rows).keys()
    for id, (status, metrics) in scores(finished.rows).items():
        assert scores(again.rows)[id][0] == status
        assert scores(again.rows)[id][1] == pytest.approx(metrics, abs=1e-3)
    assert trained == {id: (half / "trials" / id / "metrics.jsonl").stat().st_mtime_ns for id in trained}


def test_another_recipe_in_the_same_directory_is_refused(finished: SearchRun, recipe: Path) -> None:
    with pytest.raises(InputError, match=r"train\.epochs"):
        run_search(recipe, finished.directory, "train.epochs=1")


def test_a_trial_that_fails_is_told_with_its_reason_and_ends_nothing(recipe: Path, tmp_path: Path) -> None:
    found = run_search(
        recipe,
        tmp_path / "s",
        "search.space={transfer.freeze: {choice: [0]}, train.learning_rate: {choice: [1.0e+30, 1.0e-3]}}",
    )
    by_id = {row["id"]: row for row in found.rows}
    assert by_id["0000"]["status"] == "failed"
    assert "at step" in by_id["0000"]["reason"]
    assert by_id["0001"]["status"] == "finished"
    assert found.record["winner"]["id"] == "0001"


@pytest.mark.slow
def test_halving_stops_trials_and_keeps_the_best(recipe: Path, tmp_path: Path) -> None:
    found = run_search(
        recipe,
        tmp_path / "s",
        "search.space={train.learning_rate: {choice: [1.0e-3, 3.0e-4, 1.0e-6, 2.0e-6, 3.0e-6, 4.0e-6]}}",
        "search.trials=6",
        "search.scheduler=asha",
        "search.metric=loss",
        "train.epochs=4",
    )
    assert found.counts["stopped"] >= 1
    assert all(row["evaluations"] < 4 for row in found.rows if row["status"] == "stopped")
    best = min(found.rows, key=lambda row: row["metrics"]["loss"])
    assert found.record["winner"]["id"] == best["id"]
    assert best["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_other_algorithms_draw_as_many_trials_as_asked_for(recipe: Path, tmp_path: Path, algorithm: str) -> None:
    space = "search.space={transfer.freeze: {choice: [1, all]}, train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}"
    found = run_search(
        recipe, tmp_path / "s", space, f"search.algorithm={algorithm}", "search.trials=5", "train.epochs=1"
    )
    assert len(found.rows) == 5
    assert len({row["parameters"]["train.learning_rate"] for row in found.rows}) == 5


@pytest.mark.slow
def test_the_best_are_repeated_with_other_seeds_and_the_better_mean_wins(recipe: Path, tmp_path: Path) -> None:
    found = run_search(recipe, tmp_path / "s", "search.reseed_top=2", "search.reseeds=1", "train.epochs=1")
    repeated = [row for row in found.rows if "train.seed" in row["parameters"]]
    assert len(repeated) == 2
    assert [seed["seed"] for seed in found.record["winner"]["seeds"]] == [0, 1]
    means = {}
    for row in repeated:
        first = next(other for other in found.rows if row["id"].startswith(f"{other['id']}-seed"))
        means[first["id"]] = (row["metrics"]["accuracy"] + first["metrics"]["accuracy"]) / 2
    assert means[found.record["winner"]["id"]] == max(means.values())


def test_the_estimate_starts_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(recipe), "--estimate", "--output", str(recipe.parent / "never")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("trials")
    assert "on this machine" in out
    assert not (recipe.parent / "never").exists()
