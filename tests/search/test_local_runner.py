"""Searches whose trials train only their heads: in the process of the command, without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import orchestrator
from orchestrator.errors import InputError, RunFailed
from orchestrator.json_lines import read_json_lines
from orchestrator.search import local_runner, run
from orchestrator.search.ray import runner as ray_runner
from orchestrator.search.run import SearchRun, freezes_all

FREEZE, RATE = "transfer.freeze", "train.learning_rate"
WriteToy = Callable[..., Path]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process without a cluster, which the tests' process may have."""
    monkeypatch.setattr(local_runner, "has_cluster", lambda: False)


@pytest.fixture
def no_ray(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ray_cluster", lambda *_: None)  # Entering it would be an error.


@pytest.fixture
def write(tmp_path: Path, write_toy: WriteToy, tiny_bert: Path, small_data: Path) -> Callable[..., Path]:
    def write(**search: Any) -> Path:
        return write_toy(tmp_path / "recipe.yaml", tiny_bert, small_data, **sections_of(**search))

    return write


def sections_of(**search: Any) -> dict[str, Any]:
    """Return the sections of a search with two trials that train only the head."""
    space = {RATE: {"choice": [1.0e-3, 3.0e-2]}}
    return {"transfer": {"freeze": "all"}, "search": {"space": space, "trials": 6, **search}}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_toy: WriteToy, tiny_bert: Path, small_data: Path
) -> SearchRun:
    """A search of heads that has finished; tests that change it copy its directory."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_toy(folder / "recipe.yaml", tiny_bert, small_data, **sections_of())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_runner, "has_cluster", lambda: False)
        patch.setattr(run, "ray_cluster", lambda *_: None)
        return search(recipe, folder / "search")


def search(recipe: Path, output: Path, *overrides: str) -> SearchRun:
    return orchestrator.search(orchestrator.load_recipe(recipe, list(overrides)), output=output)


def test_heads_are_searched_without_ray_to_the_scores_of_their_recipes(finished: SearchRun, tmp_path: Path) -> None:
    found = finished
    assert found.counts == {"finished": 2}
    assert (found.record["status"], found.record["concurrent"]) == ("finished", 1)
    again = orchestrator.train(orchestrator.load_recipe(str(found.directory / "best.yaml")), tmp_path / "run")
    for split in ("select", "test"):
        assert found.result["metrics"][split] == pytest.approx(again.result["metrics"][split], rel=1e-5, abs=1e-5)


def test_the_best_are_trained_with_other_seeds_without_ray(
    write: Callable[..., Path], tmp_path: Path, no_ray: None
) -> None:
    found = search(write(reseed_top=1, reseeds=2), tmp_path / "search")
    winner = found.record["winner"]["id"]
    assert [row["id"] for row in found.rows] == ["0000", "0001", f"{winner}-seed-1", f"{winner}-seed-2"]
    assert [seed["seed"] for seed in found.record["winner"]["seeds"]] == [0, 1, 2]


def test_an_interrupted_search_of_heads_resumes(
    write: Callable[..., Path], tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(reseed_top=1, reseeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(local_runner.LocalRunner, "_run", interrupt_at("-seed-1", local_runner.LocalRunner._run))
        with pytest.raises(KeyboardInterrupt):
            search(recipe, tmp_path / "search")
    assert json.loads((tmp_path / "search" / "search.json").read_text())["status"] == "interrupted"
    before = read_json_lines(tmp_path / "search" / "trials.jsonl")
    found = search(recipe, tmp_path / "search")
    assert [row["id"] for row in before] == ["0000", "0001"]
    assert found.rows[:2] == before
    assert (found.record["status"], found.record["attempts"], len(found.rows)) == ("finished", 2, 3)


def test_a_search_that_is_terminated_says_that_it_was_interrupted(
    write: Callable[..., Path], tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_runner.LocalRunner, "_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        search(write(), tmp_path / "search")
    assert json.loads((tmp_path / "search" / "search.json").read_text())["status"] == "interrupted"


def interrupt_at(id: str, run: Callable[..., None]) -> Callable[..., None]:
    def interrupted(self: local_runner.LocalRunner, log: Any, spec: dict[str, Any], deadline: float) -> None:
        if spec["id"].endswith(id):
            raise KeyboardInterrupt
        run(self, log, spec, deadline)

    return interrupted


def test_time_that_is_up_ends_a_search_of_heads(
    write: Callable[..., Path], tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, *[1e9] * 1000])
    monkeypatch.setattr(local_runner, "time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    with pytest.raises(RunFailed, match="the time limit was reached before the first evaluation"):
        search(write(seconds=100), tmp_path / "search")


class FakeRayRunner:
    """Stands in for the runner on Ray; keeps the ids of the trials that it is given."""

    max_batches = 2
    ids: ClassVar[list[str]] = []

    def __init__(self, *_: Any) -> None: ...

    def run(self, log: Any, specs: Any, *_: Any) -> None:
        self.ids.extend(spec["id"] for spec in specs)


def test_heads_that_have_no_features_are_trained_with_ray(
    write: Callable[..., Path], tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their trials computes the frozen blocks again, so that more processes are worth their start."""
    monkeypatch.setattr(run, "ray_cluster", lambda *_: contextlib.nullcontext(lambda: None))
    monkeypatch.setattr(ray_runner, "RayRunner", FakeRayRunner)
    with pytest.raises(RunFailed):  # The fake runner trains nothing.
        search(write(), tmp_path / "search", "train.epochs=1")  # In one epoch each output is used once.
    assert FakeRayRunner.ids == ["batch-0"]


def test_where_every_trial_fails_the_search_fails_with_their_reasons(
    write: Callable[..., Path], tmp_path: Path, no_ray: None
) -> None:
    recipe = write(space={RATE: {"choice": [1.0e30, 1.0e31]}})
    with pytest.raises(RunFailed, match=r"no trial has a score: [\s\S]*at step \d+") as failed:
        search(recipe, tmp_path / "s", "train.max_grad_norm=null")
    assert "train.learning_rate" in str(failed.value)
    assert [row["status"] for row in read_json_lines(tmp_path / "s" / "trials.jsonl")] == ["failed", "failed"]
    assert json.loads((tmp_path / "s" / "search.json").read_text())["status"] == "failed"
    assert (tmp_path / "s" / "report.html").exists()


def test_ray_starts_at_once_unless_all_trials_freeze_the_body(write_recipe: Callable[..., Path]) -> None:
    rates = {RATE: {"choice": [1e-3]}}
    cases: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
        ({"freeze": "all"}, {"space": rates}, True),
        ({"freeze": 1}, {"space": rates}, False),
        ({"freeze": 1}, {"space": {FREEZE: {"choice": ["all"]}}}, True),
        ({"freeze": "all"}, {"space": {FREEZE: {"choice": [1, "all"]}}}, False),
        ({"freeze": "all"}, {}, False),  # The default space searches depths.
    ]
    for transfer, settings, expected in cases:
        recipe = orchestrator.load_recipe(write_recipe(transfer=transfer, search=settings))
        assert freezes_all(recipe) is expected, (transfer, settings)


def test_a_cluster_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.launch.cluster import has_cluster

    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    assert has_cluster()


def test_the_best_recipe_has_a_run_of_its_own(
    write: Callable[..., Path], write_toy: WriteToy, tmp_path: Path, no_ray: None
) -> None:
    recipe = orchestrator.load_recipe(write(), ["name=toy-search"])
    found = orchestrator.search(recipe)
    assert found.directory == tmp_path / "runs" / "toy-search"
    result = (found.directory / "result.json").read_bytes()
    best = orchestrator.load_recipe(found.directory / "best.yaml", ["train.epochs=1"])
    again = orchestrator.train(best)
    assert again.directory == tmp_path / "runs" / "toy-best"
    assert again.result["steps"] == found.result["steps"] // 2
    assert (found.directory / "result.json").read_bytes() == result
    trial = orchestrator.load_recipe(found.directory / "trials" / "0001" / "recipe.yaml")
    assert trial.name == "toy-0001"


@pytest.fixture
def again(finished: SearchRun, tmp_path: Path, no_ray: None) -> Callable[..., SearchRun]:
    """Run the finished search again, in the copy of its directory at `tmp_path / "search"`."""
    shutil.copytree(finished.directory, tmp_path / "search")

    def run_again(*overrides: str) -> SearchRun:
        return search(finished.directory.parent / "recipe.yaml", tmp_path / "search", *overrides)

    return run_again


@pytest.mark.parametrize("how", ["torn", "missing"])
@pytest.mark.parametrize("names", [["search.json"], ["search.json", "recipe.yaml"]], ids=len)
def test_without_its_record_a_search_is_resumed_with_the_same_recipe_alone(
    names: list[str], how: str, finished: SearchRun, again: Callable[..., SearchRun], tmp_path: Path
) -> None:
    for name in names:
        damage(tmp_path / "search" / name, how)
    with pytest.raises(InputError, match=r"has train.epochs: 2.0, now it is 1.0"):
        again("train.epochs=1")
    (tmp_path / "less").mkdir()
    source = orchestrator.load_recipe(finished.directory.parent / "recipe.yaml").target.data
    for path in Path(str(source)).iterdir():
        (tmp_path / "less" / path.name).write_text(path.read_text().partition("\n")[2])
    with pytest.raises(InputError, match=r"train data changed since the search"):
        again(f"target.data={tmp_path / 'less'}")
    found = again()
    assert found.rows == finished.rows
    assert found.record["winner"]["id"] == finished.record["winner"]["id"]
    assert any(note.startswith("search.json was damaged or missing") for note in found.record["notes"])


def test_torn_lines_of_trials_are_noted_and_their_trials_read_again(
    finished: SearchRun, again: Callable[..., SearchRun], tmp_path: Path
) -> None:
    (tmp_path / "search" / "result.json").unlink()
    rows = tmp_path / "search" / "trials.jsonl"
    one, other = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(one[:30] + b"\xff\xfe\n" + other)
    found = again()
    assert {row["id"]: row["metrics"] for row in found.rows} == {row["id"]: row["metrics"] for row in finished.rows}
    assert found.record["notes"] == [
        "1 line of trials.jsonl could not be read; the results of those trials are read from their directories"
    ]
    assert again().record["notes"] == found.record["notes"]


def test_a_trial_whose_scores_are_lost_is_run_again(
    finished: SearchRun, again: Callable[..., SearchRun], tmp_path: Path
) -> None:
    (tmp_path / "search" / "result.json").unlink()
    for name in ("trials.jsonl", "trials/0001/metrics.jsonl"):
        (tmp_path / "search" / name).unlink()
    found = again()
    assert found.counts == finished.counts
    metrics, expected = ({row["id"]: row["metrics"] for row in each.rows} for each in (found, finished))
    assert metrics["0001"] == pytest.approx(expected["0001"], rel=1e-5)


def test_a_search_whose_winners_weights_were_lost_trains_it_again(
    finished: SearchRun, again: Callable[..., SearchRun], tmp_path: Path
) -> None:
    copy = tmp_path / "search"
    for path in (copy / "result.json", *copy.glob("trials/*/best.safetensors")):
        path.unlink()
    shutil.rmtree(copy / "model")
    found = again()
    assert found.rows == finished.rows
    assert found.result["best_step"] == finished.result["best_step"]
    for split in ("select", "test"):
        assert found.result["metrics"][split] == pytest.approx(finished.result["metrics"][split], rel=1e-5, abs=1e-5)


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
