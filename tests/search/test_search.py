"""A whole search on the toy problem: its records, its winner, how it resumes after a kill, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import InputError
from orchestrator.json_lines import read_json_lines
from orchestrator.search import run_trials
from orchestrator.search.run import SearchRun

FREEZE, RATE = "transfer.freeze", "train.learning_rate"
SPACE = {
    FREEZE: {"choice": [0, "stem", "all"]},
    RATE: [{"when": {FREEZE: "stem"}, "choice": [1.0e-3, 1.0e30]}, {"choice": [1.0e-3, 1.0e-2]}],
}
FAILS = "0003"
WriteToy = Callable[..., Path]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_toy: WriteToy, tiny_bert: Path, small_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("search")
    search = {"space": SPACE, "trials": 6, "concurrent": 1}
    return write_toy(folder / "recipe.yaml", tiny_bert, small_data, search=search)


def run_search(recipe: Path, output: Path, *overrides: str) -> SearchRun:
    return orchestrator.search(orchestrator.load_recipe(recipe, list(overrides)), output=output)


@pytest.fixture(scope="module")
def finished(recipe: Path, ray_cluster: None) -> SearchRun:
    return run_search(recipe, recipe.parent / "finished")


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def unfinish(directory: Path) -> None:
    """Take away what a search leaves at its end."""
    for name in ("result.json", "best.yaml", "report.html", "predictions.parquet"):
        (directory / name).unlink()
    shutil.rmtree(directory / "model")
    record = json.loads((directory / "search.json").read_text())
    record = {key: value for key, value in record.items() if key not in ("winner", "ended")}
    (directory / "search.json").write_text(json.dumps({**record, "status": "running"}))


def keep_rows(directory: Path, *ids: str) -> None:
    """Keep only these trials in trials.jsonl."""
    rows = [row for row in read_json_lines(directory / "trials.jsonl") if row["id"] in ids]
    (directory / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_every_trial_is_the_training_of_its_recipe_also_those_trained_as_one(
    finished: SearchRun, tmp_path: Path
) -> None:
    rows = {row["id"]: row for row in finished.rows}
    assert sorted(rows) == [f"000{number}" for number in range(6)]
    assert len(finished.rows) == 6
    for id in sorted(rows.keys() - {FAILS}):
        row = rows[id]
        assert row["status"] == "finished"
        assert {"accuracy", "loss", "f1_macro"} <= row["metrics"].keys()
        assert row["evaluations"] == len(row["history"]) == 2
        assert row["seconds"] > 0
    assert [rows[id]["parameters"][FREEZE] for id in sorted(rows)] == [0, 0, "stem", "stem", "all", "all"]
    # They were one problem, so that they took the same time.
    assert rows["0004"]["seconds"] == rows["0005"]["seconds"]
    for id in ("0002", "0005"):
        again = orchestrator.train(
            orchestrator.load_recipe(finished.directory / "trials" / id / "recipe.yaml"), tmp_path / id
        )
        found = again.result["metrics"]["select"]
        assert rows[id]["metrics"] == pytest.approx(found, rel=1e-5, abs=1e-5)
        assert again.result["best_step"] == rows[id]["best_step"]


def test_a_trial_that_fails_is_reported_with_its_reason_and_ends_nothing(finished: SearchRun) -> None:
    assert finished.counts == {"finished": 5, "failed": 1}
    (row,) = [row for row in finished.rows if row["id"] == FAILS]
    assert row["status"] == "failed"
    assert "at step" in row["reason"]


def test_the_winner_is_the_best_on_select_and_is_scored_on_test(finished: SearchRun) -> None:
    winner = finished.record["winner"]
    best = max(row["metrics"].get("accuracy", 0.0) for row in finished.rows)
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


def test_the_rates_of_trials_on_one_boundary_share_its_features(finished: SearchRun) -> None:
    """Weights, too, are kept of the best alone."""
    kept = [path.parent.name for path in (finished.directory / "trials").glob("*/best.safetensors")]
    assert finished.record["winner"]["id"] in kept
    notes = [json.loads((path).read_text()).get("notes") for path in finished.directory.glob("trials/*/run.json")]
    assert not any(notes)


def test_a_finished_search_is_reported_again_without_a_trial(
    finished: SearchRun, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_trials, "choose_runner", lambda *_: pytest.fail("trials were run"))
    monkeypatch.setattr(run_trials, "keep_winner", lambda *_: pytest.fail("the winner was scored again"))
    before = times_of(finished.directory)
    again = run_search(recipe, finished.directory, "search.concurrent=2")
    assert (again.record, again.rows, again.result) == (finished.record, finished.rows, finished.result)
    after = times_of(finished.directory)
    assert {path.name for path in after if before.get(path) != after[path]} <= {".lock"}


def test_a_killed_search_does_again_only_what_was_lost(finished: SearchRun, recipe: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(finished.directory, half)
    unfinish(half)
    keep_rows(half, "0000", "0004")
    # 0000 and 0004 had ended; 0001's line was not written yet; 0002 was in the middle, without a checkpoint; 0003 and
    # 0005 had not begun.
    (half / "trials" / "0002" / "outcome.json").unlink()
    metrics = half / "trials" / "0002" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    for lost in ("0003", "0005"):
        shutil.rmtree(half / "trials" / lost)
    whole = {id: times_of(half / "trials" / id) for id in ("0000", "0001", "0004")}

    again = run_search(recipe, half)
    assert again.record["winner"]["id"] == finished.record["winner"]["id"]
    assert again.record["attempts"] == 2
    assert len(again.rows) == 6
    expected = {row["id"]: row for row in finished.rows}
    for row in again.rows:
        assert row["status"] == expected[row["id"]]["status"]
        assert row["metrics"] == pytest.approx(expected[row["id"]]["metrics"], rel=1e-5, abs=1e-5)
        assert [each["step"] for each in row["history"]] == [each["step"] for each in expected[row["id"]]["history"]]
    assert {id: times_of(half / "trials" / id) for id in whole} == whole
    for split in ("select", "test"):
        assert again.result["metrics"][split] == pytest.approx(finished.result["metrics"][split], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_more_seeds_can_be_asked_of_a_finished_search(finished: SearchRun, recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.directory, tmp_path / "s")
    metrics = {row["id"]: tmp_path / "s" / "trials" / row["id"] / "metrics.jsonl" for row in finished.rows}
    before = {id: path.stat().st_mtime_ns for id, path in metrics.items()}
    again = run_search(recipe, tmp_path / "s", "search.reseed_top=2", "search.reseeds=1")
    assert len(again.rows) == len(finished.rows) + 2
    assert len(again.record["winner"]["seeds"]) == 2
    assert {id: path.stat().st_mtime_ns for id, path in metrics.items()} == before


def test_another_search_in_the_same_directory_is_refused(finished: SearchRun, recipe: Path) -> None:
    before = times_of(finished.directory)
    for override in (
        "search.space={transfer.freeze: {choice: [0, all]}, train.learning_rate: {choice: [1.0e-3]}}",
        "search.algorithm=random",
        "search.metric=loss",
        "train.seed=1",
    ):
        with pytest.raises(InputError) as refused:
            run_search(recipe, finished.directory, override)
        assert override.partition("=")[0] in str(refused.value)
        assert "--fresh" in str(refused.value)
    after = times_of(finished.directory)
    assert {path.name for path in after if before.get(path) != after[path]} <= {".lock"}


@pytest.mark.slow
def test_asha_stops_trials_and_keeps_the_best(recipe: Path, tmp_path: Path, ray_cluster: None) -> None:
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
def test_other_algorithms_draw_as_many_trials_as_asked_for(
    recipe: Path, tmp_path: Path, algorithm: str, ray_cluster: None
) -> None:
    space = "search.space={transfer.freeze: {choice: [1, all]}, train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}"
    found = run_search(
        recipe, tmp_path / "s", space, f"search.algorithm={algorithm}", "search.trials=5", "train.epochs=1"
    )
    assert len(found.rows) == 5
    assert len({row["parameters"]["train.learning_rate"] for row in found.rows}) == 5


@pytest.mark.slow
def test_the_best_are_repeated_with_other_seeds_and_the_better_mean_wins(
    recipe: Path, tmp_path: Path, ray_cluster: None
) -> None:
    found = run_search(recipe, tmp_path / "s", "search.reseed_top=2", "search.reseeds=1", "train.epochs=1")
    repeated = [row for row in found.rows if "train.seed" in row["parameters"]]
    assert len(repeated) == 2
    assert [seed["seed"] for seed in found.record["winner"]["seeds"]] == [0, 1]
    means = {}
    for row in repeated:
        first = next(other for other in found.rows if row["id"].startswith(f"{other['id']}-seed"))
        means[first["id"]] = (row["metrics"]["accuracy"] + first["metrics"]["accuracy"]) / 2
    assert means[found.record["winner"]["id"]] == max(means.values())


@pytest.mark.slow
def test_population_based_training_continues_from_good_trials_with_other_rates(
    recipe: Path, tmp_path: Path, ray_cluster: None
) -> None:
    found = run_search(
        recipe,
        tmp_path / "s",
        "search.space={train.learning_rate: {loguniform: [1.0e-6, 1.0e-2]}}",
        "search.algorithm=random",
        "search.scheduler=pbt",
        "search.trials=4",
        "search.concurrent=2",
        "train.epochs=6",
    )
    assert found.counts == {"finished": 4}
    for row in found.rows:
        steps = [each["step"] for each in row["history"]]
        assert steps == sorted(set(steps))
        (best,) = [each for each in row["history"] if each["step"] == row["best_step"]]
        assert row["parameters"] == best["parameters"]
        rates = [
            line.split()[-1]
            for line in (found.directory / "trials" / row["id"] / "recipe.yaml").read_text().splitlines()
            if "learning_rate:" in line
        ]
        assert 1.0e-6 <= float(rates[0]) <= 1.0e-2
    winner = found.record["winner"]
    assert found.result["metrics"]["select"]["accuracy"] == pytest.approx(
        max(row["metrics"]["accuracy"] for row in found.rows)
    )
    assert winner["metrics"]["select"]["loss"] == pytest.approx(found.result["metrics"]["select"]["loss"])


@pytest.mark.slow
def test_a_killed_tpe_search_makes_the_suggestions_that_it_would_have_made(
    recipe: Path, tmp_path: Path, ray_cluster: None
) -> None:
    space = "search.space={transfer.freeze: {choice: [1, all]}, train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}"
    options = [space, "search.algorithm=tpe", "search.trials=4", "train.epochs=1"]
    first = run_search(recipe, tmp_path / "s", *options)
    parameters = {row["id"]: row["parameters"] for row in first.rows}
    unfinish(tmp_path / "s")
    keep_rows(tmp_path / "s", "0000", "0001")
    for lost in ("0002", "0003"):
        shutil.rmtree(tmp_path / "s" / "trials" / lost)
    suggested = tmp_path / "s" / "suggested.jsonl"
    suggested.write_text("".join(suggested.read_text().splitlines(keepends=True)[:2]))
    before = {id: times_of(tmp_path / "s" / "trials" / id) for id in ("0000", "0001")}
    again = run_search(recipe, tmp_path / "s", *options)
    assert len({json.dumps(each) for each in parameters.values()}) == 4
    assert {row["id"]: row["parameters"] for row in again.rows} == parameters
    assert {id: times_of(tmp_path / "s" / "trials" / id) for id in before} == before
    assert again.record["winner"]["id"] == first.record["winner"]["id"]


@pytest.mark.slow
def test_when_time_is_up_the_best_so_far_wins(recipe: Path, tmp_path: Path, ray_cluster: None) -> None:
    space = "search.space={train.learning_rate: {choice: [1.0e-3, 2.0e-3, 3.0e-3]}}"
    options = [space, "search.seconds=60", "train.epochs=100000", "search.concurrent=1"]
    found = run_search(recipe, tmp_path / "s", *options)
    (row,) = found.rows
    assert (row["status"], row["reason"]) == ("stopped", "behind the other trials, or out of time")
    assert found.record["winner"]["id"] == row["id"]
    assert found.result["metrics"]["select"]["accuracy"] == pytest.approx(row["metrics"]["accuracy"])
