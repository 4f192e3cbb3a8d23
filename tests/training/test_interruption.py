"""Ctrl-C and SIGTERM: the last step is saved, run.json says so, and the same command goes on with the same losses."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import load_recipe, train
from orchestrator.cli.main import main
from orchestrator.launch import stop_request
from orchestrator.launch import train as run
from orchestrator.launch.cluster import find_placement_groups
from orchestrator.launch.stop_request import StopRequestReceiver, StopRequestSender
from orchestrator.runs.directory import RunDirectory
from orchestrator.training import worker
from orchestrator.training.hooks import Recorder, TrainingState
from orchestrator.training.interruption import InterruptHandler
from orchestrator.training.loop import Step

WriteRecipe = Callable[..., Path]
STEPS = ["train.steps=12", "train.log_every=1", "train.save_every=100", "train.evaluate_every=100"]


def losses(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in RunDirectory(directory).read_metrics() if row["split"] == "train"}


def steps_saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def status_of(directory: Path) -> str:
    found: str = json.loads((directory / "run.json").read_text())["status"]
    return found


@pytest.fixture
def send_at(monkeypatch: pytest.MonkeyPatch, takes_signals: None) -> Callable[..., None]:
    """Send this process signals in the middle of a step, once."""

    def send_at(step: int, *numbers: int) -> None:
        real, sent = Recorder.after_step, []

        def after_step(self: Recorder, done: Step, state: TrainingState) -> None:
            if done.number == step and not sent:
                sent.append(step)
                for number in numbers:
                    os.kill(os.getpid(), number)
            real(self, done, state)

        monkeypatch.setattr(Recorder, "after_step", after_step)

    return send_at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_step_is_saved_and_the_same_command_goes_on_with_the_same_losses(
    number: int,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    send_at: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, directory = str(write_recipe()), tmp_path / "run"
    whole = train(load_recipe(recipe, STEPS), tmp_path / "whole").directory
    send_at(5, number)
    assert main(["train", recipe, *STEPS, "--output", str(directory)]) == 130
    told = capsys.readouterr().err
    assert "press Ctrl-C again to end at once" in told
    assert "error: interrupted\n    -> the same command resumes" in told
    assert (status_of(directory), steps_saved(directory)) == ("interrupted", ["step-00000005"])
    assert main(["train", recipe, *STEPS, "--output", str(directory)]) == 0
    assert losses(directory) == losses(whole)
    assert (status_of(directory), RunDirectory(directory).read_record()["attempt"]) == ("finished", 2)


def test_a_second_signal_ends_at_once(write_recipe: WriteRecipe, tmp_path: Path, send_at: Callable[..., None]) -> None:
    send_at(5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(write_recipe(), STEPS), tmp_path / "run")
    assert (status_of(tmp_path / "run"), steps_saved(tmp_path / "run")) == ("interrupted", [])


@pytest.mark.parametrize("module, name", [(worker, "finish"), (run, "start_record")])
def test_where_no_step_is_taken_the_first_signal_ends_at_once(
    module: Any,
    name: str,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    takes_signals: None,
) -> None:
    real = getattr(module, name)

    def interrupted(*arguments: Any) -> Any:
        found = real(*arguments) if name == "start_record" else None
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    recipe = load_recipe(write_recipe(), STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    assert status_of(tmp_path / "run") == "interrupted"
    assert not (tmp_path / "run" / "result.json").exists()
    assert train(recipe, tmp_path / "run").result["steps"] == 12


def test_signals_that_a_process_ignores_stay_ignored(takes_signals: None) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # As a shell starts what is to run in the background.
    try:
        handler = InterruptHandler()
        with handler.installed():
            os.kill(os.getpid(), signal.SIGINT)
            assert not handler.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_training_in_another_thread_leaves_signals_alone(takes_signals: None) -> None:
    seen: list[Any] = []

    def listen() -> None:
        with InterruptHandler().installed():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """In place of Ray's key-value store."""
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(stop_request, "read", kept.get)
    monkeypatch.setattr(stop_request, "write", kept.__setitem__)
    monkeypatch.setattr(stop_request, "SECONDS_BETWEEN_CHECKS", 0.01)
    return kept


def test_workers_that_take_steps_are_waited_for(store: dict[str, bytes], takes_signals: None) -> None:
    handler, sender = InterruptHandler(), StopRequestSender()
    receiver, other = StopRequestReceiver(sender.key, listens=True), StopRequestReceiver(sender.key, listens=False)
    with handler.installed(), sender.waiting(), handler.forwarding_to(sender.send), receiver.during_steps():
        os.kill(os.getpid(), signal.SIGINT)
        assert receiver._is_set.wait(10)
        for thread in threading.enumerate():
            if thread.name == "interruption":
                thread.join(10)
    assert store == {sender.key: stop_request.SAVING}
    assert not other.is_set()


@pytest.mark.parametrize("listens", [True, False], ids=["they say that they cannot", "they say nothing"])
def test_workers_that_have_nothing_to_save_are_not(
    listens: bool, store: dict[str, bytes], takes_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_request, "SECONDS_FOR_REPLY", 60.0 if listens else 0.01)
    handler, sender = InterruptHandler(), StopRequestSender()
    StopRequestReceiver(sender.key, listens)
    waiting = sender.waiting(), handler.forwarding_to(sender.send)
    with handler.installed(), pytest.raises(KeyboardInterrupt), waiting[0], waiting[1]:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)


def interrupt_at(directory: Path, step: int, number: int) -> threading.Thread:
    def watch() -> None:
        while max(losses(directory), default=0) < step:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_several_workers_save_their_step_and_give_back_what_they_held(
    write_recipe: WriteRecipe, tmp_path: Path, ray_cluster: None, takes_signals: None
) -> None:
    # So many that they are not done before they hear of it.
    recipe = load_recipe(write_recipe(), [*STEPS, "train.steps=20000", "scale.workers=2"])
    interrupt_at(tmp_path / "run", 20, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    assert status_of(tmp_path / "run") == "interrupted"
    (saved,) = steps_saved(tmp_path / "run")
    assert int(saved[5:]) == max(losses(tmp_path / "run")) >= 20
    assert not [group for group, is_orphan in find_placement_groups() if not is_orphan]
