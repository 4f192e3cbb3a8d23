"""The commands `search` and `report` as a person or a script meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator.search.run
from orchestrator import load_recipe
from orchestrator.cli.main import main, parse
from orchestrator.errors import ClusterError, InputError, RunFailed
from orchestrator.search.changes import CHANGES

pytestmark = pytest.mark.xdist_group("ray")
Capture = pytest.CaptureFixture[str]
SEARCH = {
    "space": {"transfer.freeze": {"choice": [1]}, "train.learning_rate": {"choice": [1.0e-3, 1.0e-2]}},
    "trials": 2,
    "concurrent": 1,
}


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_recipe(search=SEARCH, train={"epochs": 1}))


def run_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """Run a command with `--json`; its output must be one object and nothing else."""
    assert main([*arguments, "--json"]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 1
    found: dict[str, Any] = json.loads(output)
    return found


def test_a_search_tells_its_winner_and_where_everything_is(recipe: str, capsys: Capture, ray_cluster: None) -> None:
    found = run_json(capsys, "search", recipe)
    assert found["directory"] == str(Path.cwd() / "runs" / "toy-search")
    assert found["trials"] == {"finished": 2}
    assert (found["status"], found["metric"], found["mode"]) == ("finished", "accuracy", "max")
    assert set(found["winner"]["metrics"]) == {"select", "test"}
    # The same command again shows the same, as a person sees it.
    assert main(["search", recipe]) == 0
    output = capsys.readouterr().out
    winner = found["winner"]
    for told in (
        "trials  2 finished",
        f"winner  trial {winner['id']}: transfer.freeze = 1, train.learning_rate = ",
        f"accuracy {winner['metrics']['test']['accuracy']:.4f}",
        "runs/toy-search/model",
        "runs/toy-search/best.yaml",
        "runs/toy-search/report.html",
    ):
        assert told in output.replace("   ", "  ").replace("   ", "  "), told
    assert main(["search", recipe, "train.epochs=2"]) == 2
    assert "has train.epochs: 1.0, now it is 2.0" in capsys.readouterr().err
    page = Path("runs/toy-search/report.html")
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert run_json(capsys, "report", "runs/toy-search") == {
        "status": "written",
        "report": "runs/toy-search/report.html",
    }
    assert page.read_text(encoding="utf-8") == before


def test_an_estimate_tells_trials_time_and_disk_and_starts_nothing(
    recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setattr(orchestrator.search.run, "search", lambda *_: pytest.fail("the search was started"))
    assert main(["search", recipe, "--estimate", "--output", "never"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["trials", "time", "disk", "free"]
    assert lines["trials"] == "2, 1 at a time"
    assert lines["time"].startswith("about ")
    assert "for features" in lines["disk"]
    found = run_json(capsys, "search", recipe, "--estimate", "search.trials=9", "search.reseed_top=1")
    assert found["trials"] == 4
    assert found.keys() == {
        "trials",
        "concurrent",
        "seconds",
        "cache_bytes",
        "disk_bytes",
        "free_bytes",
        "notes",
    }
    assert not Path("never").exists()
    assert not Path("runs").exists()


def test_a_wrong_space_is_refused_before_anything_starts(recipe: str, capsys: Capture) -> None:
    for extra in ([], ["--estimate"]):
        assert main(["search", recipe, "search.space={transfer.freze: {choice: [1]}}", *extra]) == 2
        told = capsys.readouterr().err
        assert "transfer.freeze" in told
        assert "Traceback" not in told
    assert main(["search", recipe, "search.metric=acuracy"]) == 2
    assert "did you mean accuracy?" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "error, code, status",
    [
        (RunFailed("no trial has a score: the loss is nan"), 1, "error"),
        (InputError("no such thing"), 2, "error"),
        (ClusterError("too few GPUs"), 3, "error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["failed", "wrong", "cluster", "interrupted"],
)
def test_exit_codes_tell_how_a_search_ended(
    error: BaseException, code: int, status: str, recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(orchestrator.search.run, "search", fail)
    assert main(["search", recipe]) == code
    output = capsys.readouterr()
    assert (output.out, "Traceback" in output.err) == ("", False)
    if code == 130:
        assert "the same command resumes from there" in output.err
    assert main(["search", recipe, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == status


def test_options_and_overrides_of_a_search_may_be_mixed() -> None:
    options = parse(["search", "r.yaml", "a.b=1", "--estimate", "c.d=2", "--output", "out", "--fresh", "e.f=3"])
    assert options.overrides == ["a.b=1", "c.d=2", "e.f=3"]
    assert (options.estimate, options.fresh, options.output) == (True, True, Path("out"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "nowhere"], "there is no such directory"),
        (["report", "."], "there is neither a search nor a run in it"),
        (["report"], "required: directory"),
        (["search"], "required: recipe"),
        (["search", "x.yaml", "--estimat"], "search does not know --estimat"),
    ],
)
def test_what_is_no_search_is_refused(
    arguments: list[str], told: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_the_page_of_a_run_is_written_again(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(write_recipe(train={"epochs": 1})), "--output", "run"]) == 0
    Path("run/report.html").unlink()
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "the report is run/report.html\n"
    assert "<html" in Path("run/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_search_that_was_ended_goes_on_with_the_same_command(end: signal.Signals, recipe: str) -> None:
    overrides = ["train.epochs=30", "search.trials=3", "search.space.train.learning_rate={choice: [1e-3, 2e-3, 3e-3]}"]
    command = [sys.executable, "-m", "orchestrator.cli", "search", recipe, "--output", "out", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = Path("out/trials.jsonl")
    until = time.monotonic() + 300
    while not rows.exists() or not rows.read_text():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    first = rows.read_text().splitlines()
    assert 1 <= len(first) < 3
    if end == signal.SIGINT:
        assert "the same command resumes from there" in errors
        assert json.loads(Path("out/search.json").read_text())["status"] == "interrupted"
        assert "Traceback" not in errors
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["trials"] == {"finished": 3}
    assert rows.read_text().splitlines()[: len(first)] == first


@pytest.mark.slow
def test_a_killed_population_goes_on_with_the_rates_that_its_trials_had_and_tells_those(recipe: str) -> None:
    overrides = [
        "train.epochs=8",
        "train.schedule=constant",
        "train.log_every=1",
        "search.space={train.learning_rate: {loguniform: [1.0e-6, 1.0e-2]}}",
        "search.algorithm=random",
        "search.scheduler=pbt",
        "search.trials=4",
        "search.concurrent=2",
    ]
    command = [sys.executable, "-m", "orchestrator.cli", "search", recipe, "--output", "out", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not any((path.parent / "checkpoints").glob("step-*/COMMITTED") for path in Path("out").rglob(CHANGES)):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["trials"] == {"finished": 4}
    rows = [json.loads(line) for line in Path("out/trials.jsonl").read_text().splitlines()]
    for row in rows:
        lines = Path("out/trials", row["id"], "metrics.jsonl").read_text().splitlines()
        trained = [each for each in map(json.loads, lines) if each["split"] == "train"]
        rates = {each["step"]: each["learning_rate"] for each in trained}
        for each in row["history"]:
            assert each["parameters"]["train.learning_rate"] == pytest.approx(rates[each["step"]])
        assert row["parameters"]["train.learning_rate"] == pytest.approx(rates[row["best_step"]])
    best = load_recipe("out/best.yaml").train.learning_rate
    (winner,) = [row for row in rows if row["id"] == json.loads(done.stdout)["winner"]["id"]]
    assert best == winner["parameters"]["train.learning_rate"]
