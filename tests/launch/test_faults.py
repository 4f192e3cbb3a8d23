"""Runs that are killed and go on: the same losses, the same weights, as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from orchestrator import load_recipe, train
from orchestrator.inference.merge import export
from orchestrator.inference.predict import evaluate
from orchestrator.launch.cluster import find_placement_groups

pytestmark = pytest.mark.xdist_group("ray")
# Dropout and shuffling are on (the model's and the recipe's defaults); 60 steps, a checkpoint every 10.
SIXTY_STEPS = [
    "train.steps=60",
    "train.log_every=1",
    "train.save_every=10",
    "train.evaluate_every=20",
    "train.early_stopping=null",
]


def losses(directory: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def last_step(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def wait_for_step(directory: Path, step: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while last_step(directory) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached within {seconds} s"
        time.sleep(0.01)


def find_worker(directory: Path, rank: int) -> psutil.Process:
    """The process of a worker: the one whose output goes to that worker's log."""
    log = directory / "logs" / f"worker-{rank}.log"
    for process in psutil.process_iter():
        try:
            if any(Path(f"/proc/{process.pid}/fd/{number}").readlink() == log for number in (1, 2)):
                return process
        except (OSError, psutil.Error):
            continue
    raise AssertionError(f"no process writes to {log}")


def processes_of(actor: str) -> list[psutil.Process]:
    """Those that Ray has given an actor's name."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if (process.info["cmdline"] or [""])[0].startswith(actor)]


def notes_of(directory: Path) -> list[str]:
    notes: list[str] = json.loads((directory / "run.json").read_text())["notes"]
    return notes


def assert_same_run(one: Path, other: Path) -> None:
    expected, found = losses(one), losses(other)
    assert list(found) == list(expected) == list(range(1, 61))
    assert found == pytest.approx(expected, rel=1e-6)
    (name,) = (path.name for path in (one / "model").glob("*.safetensors"))
    weights, same = load_file(one / "model" / name), load_file(other / "model" / name)
    for name, value in weights.items():
        assert same[name] == pytest.approx(value, rel=1e-6, abs=1e-8), name


def kill_at(directory: Path, step: int, rank: int) -> threading.Thread:
    def watch() -> None:
        wait_for_step(directory, step)
        find_worker(directory, rank).send_signal(signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Callable[..., Path]:
    """Runs on two workers that were not interrupted, one for each set of overrides."""
    done: dict[tuple[str, ...], Path] = {}

    def run(recipe: Path, *overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = tmp_path_factory.mktemp("two-workers") / "run"
            train(load_recipe(recipe, [*SIXTY_STEPS, "scale.workers=2", *overrides]), done[overrides])
        return done[overrides]

    return run


def check_killed_worker(recipe: Path, two_workers: Callable[..., Path], tmp_path: Path, *overrides: str) -> None:
    expected = two_workers(recipe, *overrides)
    directory = tmp_path / "killed"
    killer = kill_at(directory, step=25, rank=1)
    train(load_recipe(recipe, [*SIXTY_STEPS, "scale.workers=2", *overrides]), directory)
    killer.join(timeout=0)
    assert not killer.is_alive(), "the run ended before the worker was killed"
    assert any(note.startswith("worker") and "died (" in note for note in notes_of(directory))
    assert_same_run(expected, directory)


def test_killed_worker_resumes_with_the_same_losses(
    write_recipe: Callable[..., Path], two_workers: Callable[..., Path], tmp_path: Path
) -> None:
    check_killed_worker(write_recipe(), two_workers, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_deepspeed_worker_resumes_with_the_same_losses(
    write_recipe: Callable[..., Path], two_workers: Callable[..., Path], tmp_path: Path, stage: int
) -> None:
    check_killed_worker(write_recipe(), two_workers, tmp_path, f"scale.zero_stage={stage}")


@pytest.mark.slow
def test_killed_zero_3_run_with_an_adapter_exports_what_it_trained(
    write_recipe: Callable[..., Path], two_workers: Callable[..., Path], tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(transfer={"freeze": "stem", "adapter": {"type": "lora", "r": 4}})
    check_killed_worker(recipe, two_workers, tmp_path, "scale.zero_stage=3", "train.learning_rate=0.002")
    directory = tmp_path / "killed"
    result = json.loads((directory / "result.json").read_text())
    assert evaluate(directory, None, "test")["metrics"]["loss"] == pytest.approx(
        result["metrics"]["test"]["loss"], rel=1e-5
    )
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    loaded = PeftModel.from_pretrained(base, directory / "model").eval()
    export(directory, tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[2, 9, 30, 41, 3]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_killed_controller_of_the_workers_is_replaced_with_the_same_losses(
    write_recipe: Callable[..., Path], two_workers: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe()
    expected = two_workers(recipe)
    directory = tmp_path / "killed"

    def kill() -> None:
        wait_for_step(directory, 25)
        for process in processes_of("ray::TrainController"):
            process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train(load_recipe(recipe, [*SIXTY_STEPS, "scale.workers=2"]), directory)
    assert_same_run(expected, directory)
    assert json.loads((directory / "run.json").read_text())["attempt"] == 2
    assert any("controller died" in note for note in notes_of(directory))
    # What it had reserved is free again, and nobody stays behind to look after it.
    assert not find_placement_groups()
    assert not processes_of("ray::PlacementGroupCleaner")


def start_command(recipe: Path, directory: Path, *overrides: str, stderr: Any = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(recipe), *SIXTY_STEPS, *overrides]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [*command, "--output", str(directory)], start_new_session=True, env=environment, stderr=stderr
    )


def kill_everything(command: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the command and for all that it started, at once."""
    family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    for process in family:
        if process.is_running():
            process.kill()
    command.wait()


def check_killed_command(recipe: Path, tmp_path: Path, *overrides: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_command(recipe, whole, *overrides).wait() == 0
    command = start_command(recipe, killed, *overrides)
    wait_for_step(killed, 25)
    kill_everything(command)
    assert not (killed / "result.json").exists()
    assert start_command(recipe, killed, *overrides).wait() == 0
    assert_same_run(whole, killed)
    record: dict[str, Any] = json.loads((killed / "run.json").read_text())
    assert (record["status"], record["attempt"]) == ("finished", 2)


def check_interrupted_command(recipe: Path, tmp_path: Path, number: int, *overrides: str) -> None:
    # So many steps that the command has not ended before its workers hear of the signal.
    many = ["train.steps=800", "train.save_every=400", "train.evaluate_every=400", *overrides]
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    assert start_command(recipe, whole, *many).wait() == 0
    with (tmp_path / "told").open("wb") as out:
        command = start_command(recipe, interrupted, *many, stderr=out)
        wait_for_step(interrupted, 100)
        family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
        if number == signal.SIGINT:
            os.killpg(command.pid, number)  # As a terminal does.
        else:
            os.kill(command.pid, number)
        assert command.wait(60) == 130
    assert "error: interrupted\n    -> the same command resumes" in (tmp_path / "told").read_text()
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert json.loads((interrupted / "run.json").read_text())["status"] == "interrupted"
    (saved,) = (int(path.name[5:]) for path in (interrupted / "checkpoints").glob("step-*"))
    assert saved == max(losses(interrupted))
    assert start_command(recipe, interrupted, *many).wait() == 0
    assert losses(interrupted) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers, number", [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)], ids=["one", "two", "terminated"]
)
def test_interrupted_command_saves_its_step_leaves_no_process_and_goes_on(
    write_recipe: Callable[..., Path], tmp_path: Path, takes_signals: None, workers: int, number: int
) -> None:
    check_interrupted_command(write_recipe(), tmp_path, number, f"scale.workers={workers}")


def test_killed_command_goes_on_when_it_is_run_again(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    check_killed_command(write_recipe(), tmp_path)


@pytest.mark.slow
def test_killed_command_and_its_workers_go_on_when_it_is_run_again(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    check_killed_command(write_recipe(), tmp_path, "scale.workers=2")
