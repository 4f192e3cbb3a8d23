"""Machines that will be taken away: a checkpoint before that, at the step of the notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator import load_recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.training import preemption
from orchestrator.training.prepare import prepare
from orchestrator.training.worker import run_worker


class MachineGone(Exception):
    """In place of the end of this process."""


class FakeNotice:
    """Given from a look on; the machine goes or stays."""

    def __init__(self, given_at: int, goes: bool) -> None:
        self.given_at = given_at
        self.goes = goes
        self.looks = 0
        self.waits = 0

    def is_given(self) -> bool:
        self.looks += 1
        return self.looks >= self.given_at and not self.waits

    def wait(self) -> None:
        self.waits += 1
        if self.goes:
            raise MachineGone


@pytest.fixture
def look_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "SECONDS_BETWEEN_CHECKS", 0.0)


def run(recipe: Path, folder: Path, notice: FakeNotice | None) -> RunDirectory:
    directory = RunDirectory(folder)
    directory.create()
    prepared = prepare(load_recipe(recipe, ["train.steps=12", "train.save_every=6", "train.log_every=1"]))
    run_worker(prepared, directory, 1, torch.device("cpu"), is_first=True, notice=notice)
    return directory


def losses(directory: RunDirectory) -> list[float]:
    return [row["loss"] for row in directory.read_metrics() if row["split"] == "train"]


def steps(directory: RunDirectory) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.checkpoints.glob("step-*"))


def test_the_step_of_the_notice_is_saved_and_none_after_it_is_lost(
    write_recipe: Callable[..., Path], tmp_path: Path, look_at_each_step: None
) -> None:
    expected = losses(run(write_recipe(), tmp_path / "undisturbed", None))
    notice = FakeNotice(given_at=4, goes=True)
    with pytest.raises(MachineGone):
        run(write_recipe(), tmp_path / "run", notice)
    directory = RunDirectory(tmp_path / "run")
    assert steps(directory) == [4]
    assert losses(directory) == expected[:4]
    assert "step 4 is saved" in (directory.root / ".progress.json").read_text(encoding="utf-8")
    run(write_recipe(), tmp_path / "run", None)
    assert losses(directory) == expected


def test_a_machine_that_stays_after_all_trains_on(
    write_recipe: Callable[..., Path], tmp_path: Path, look_at_each_step: None
) -> None:
    notice = FakeNotice(given_at=6, goes=False)
    directory = run(write_recipe(), tmp_path / "run", notice)
    assert notice.waits == 1
    assert len(losses(directory)) == 12
    assert notice.looks == 12


def test_one_looks_every_few_seconds_not_at_each_step(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    notice = FakeNotice(given_at=100, goes=False)
    run(write_recipe(), tmp_path / "run", notice)
    assert 1 <= notice.looks < 6
