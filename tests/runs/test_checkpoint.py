"""A checkpoint is whole or not there: wherever a save stops, the old or the new one is found, and nothing between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.distributed import Exchange
from orchestrator.errors import RunFailed
from orchestrator.runs import checkpoint
from orchestrator.runs.checkpoint import COMMITTED, STATE, CheckpointStore, find_damage
from orchestrator.runs.identity import MANIFEST

CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """The process ends here: nothing that follows changes a file, not even a handler of errors."""


class FileEvents:
    """Counts the calls that change files, and stops before one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.stop_at: int | None = None
        self.stop: BaseException = Killed()

    def arm(self, stop_at: int | None, stop: BaseException) -> None:
        self.count, self.stop_at, self.stop = 0, stop_at, stop

    def disarm(self) -> None:
        self.stop_at = None

    def happen(self) -> None:
        event, self.count = self.count, self.count + 1
        if self.stop_at is not None and (
            event == self.stop_at or (event > self.stop_at and isinstance(self.stop, Killed))
        ):
            raise self.stop


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> FileEvents:
    """The counter stands before every call that creates, flushes, renames or removes a file or a folder."""
    counter = FileEvents()

    def count_before(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            counter.happen()
            return call(*arguments, **options)

        return counted

    def open_counted(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not mode.startswith("r"):
            counter.happen()
        return plain_open(path, mode, *arguments, **options)

    plain_open = Path.open
    for name in CALLS:
        monkeypatch.setattr(os, name, count_before(getattr(os, name)))
    monkeypatch.setattr(Path, "open", open_counted)
    return counter


class Other(Exchange):
    """A worker of this rank, which hears of no other, or of a trouble that one of them has."""

    def __init__(self, rank: int, trouble: str | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.trouble = trouble

    def agree(self, trouble: str | None) -> str | None:
        return trouble or self.trouble


def save(store: CheckpointStore, step: int, **state: Any) -> None:
    """Save a checkpoint of two files that hold the step's number, one of them in a folder."""

    def write(folder: Path) -> None:
        with (folder / "model.bin").open("w") as file:
            file.write(str(step) * 100)
        (folder / "optimizer").mkdir()
        with (folder / "optimizer" / "rank-0.bin").open("w") as file:
            file.write(str(step) * 50)

    store.save(step, {"step": step, **state}, write)


def find_whole(folder: Path) -> int | None:
    """The step of the newest valid checkpoint, every file of which is looked at."""
    found, _ = CheckpointStore(folder).newest_valid()
    if found is None:
        return None
    assert (found.folder / "model.bin").read_text() == str(found.step) * 100
    assert (found.folder / "optimizer" / "rank-0.bin").read_text() == str(found.step) * 50
    assert found.state["step"] == found.step
    return found.step


def stop_everywhere(
    folder: Path,
    events: FileEvents,
    before: tuple[int, ...],
    action: Callable[[CheckpointStore], None],
    stop: BaseException,
) -> list[Path]:
    """Do `action` on checkpoints of these steps, stopped at its first file event, its second, ...; all folders left."""
    left: list[Path] = []
    while True:
        store = CheckpointStore(folder / f"stopped-{len(left)}")
        events.disarm()
        for step in before:
            save(store, step)
        events.arm(len(left), stop)
        try:
            action(store)
        except (Killed, RunFailed):
            left.append(store.folder)
        else:
            events.disarm()
            return left


def test_a_saved_checkpoint_comes_back_with_its_state(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 10, best_score=0.5)
    found, notes = CheckpointStore(tmp_path).newest_valid()
    assert found is not None
    assert (found.step, found.state, notes) == (10, {"step": 10, "best_score": 0.5}, [])
    assert find_whole(tmp_path) == 10
    manifest = json.loads((found.folder / MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"model.bin", "optimizer/rank-0.bin", STATE}


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").newest_valid() == (None, [])


def test_wherever_a_save_is_killed_the_old_or_the_new_checkpoint_is_whole(tmp_path: Path, events: FileEvents) -> None:
    left = stop_everywhere(tmp_path, events, (10,), lambda store: save(store, 20), Killed())
    found = [find_whole(folder) for folder in left]
    assert len(found) > 15
    assert found == sorted(step for step in found if step is not None)
    assert set(found) == {10, 20}


def test_after_a_kill_the_same_step_can_be_saved_again(tmp_path: Path, events: FileEvents) -> None:
    for folder in stop_everywhere(tmp_path, events, (10,), lambda store: save(store, 20), Killed()):
        CheckpointStore(folder).newest_valid()
        save(CheckpointStore(folder), 20)
        assert find_whole(folder) == 20
        assert not list(folder.glob(".*"))


def test_wherever_the_disk_is_full_the_old_checkpoint_is_whole_and_the_reason_is_told(
    tmp_path: Path, events: FileEvents
) -> None:
    left = stop_everywhere(tmp_path, events, (10,), lambda store: save(store, 20), FULL)
    assert len(left) > 15
    for folder in left:
        assert not list(folder.glob(".*.partial"))
        assert find_whole(folder) in {10, 20}
    events.arm(0, FULL)
    with pytest.raises(RunFailed, match="No space left on device; earlier checkpoints are intact"):
        save(CheckpointStore(left[0]), 30)


def test_wherever_pruning_is_killed_the_newest_checkpoint_is_whole(tmp_path: Path, events: FileEvents) -> None:
    left = stop_everywhere(tmp_path, events, (10, 20, 30), lambda store: store.prune(1, best_step=None), Killed())
    assert len(left) > 5
    assert {find_whole(folder) for folder in left} == {30}


def test_keeping_one_there_is_a_valid_checkpoint_at_every_instant(tmp_path: Path, events: FileEvents) -> None:
    def save_and_prune(store: CheckpointStore) -> None:
        save(store, 20)
        store.prune(1, best_step=None)

    left = stop_everywhere(tmp_path, events, (10,), save_and_prune, Killed())
    found = [find_whole(folder) for folder in left]
    assert found == sorted(step for step in found if step is not None)
    assert set(found) == {10, 20}


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30, 40):
        save(store, step)
    store.prune(2, best_step=10)
    assert store.committed_steps() == [10, 30, 40]
    store.prune(1, best_step=None)
    assert store.committed_steps() == [40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000040"]


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [tear, flip, Path.unlink], ids=["torn", "flipped", "removed"])
@pytest.mark.parametrize("name", ["model.bin", "optimizer/rank-0.bin", STATE, MANIFEST, COMMITTED])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    save(store, 20)
    damage(store.at(20).folder / name)
    assert find_damage(store.at(20).folder) is not None
    found, notes = store.newest_valid()
    assert found is not None
    assert found.step == 10
    (note,) = notes
    assert "step-00000020 is damaged" in note
    assert "damaged-1-step-00000020" in note
    assert (tmp_path / "damaged-1-step-00000020").is_dir()
    assert store.newest_valid() == (found, [])


def test_a_second_damaged_checkpoint_of_a_step_takes_another_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for _ in range(2):
        save(store, 10)
        flip(store.at(10).folder / "model.bin")
        assert store.newest_valid()[0] is None
    assert {path.name for path in tmp_path.iterdir()} == {"damaged-1-step-00000010", "damaged-2-step-00000010"}


def test_an_older_checkpoint_that_is_gone_keeps_nobody_from_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    save(store, 20)
    shutil.rmtree(store.at(10).folder)
    assert find_whole(tmp_path) == 20


def test_an_attempt_that_was_taken_over_cannot_commit(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 10)
    with pytest.raises(RunFailed, match="another attempt has taken over"):
        save(CheckpointStore(tmp_path, may_commit=lambda: False), 20)
    assert find_whole(tmp_path) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010"]


def test_trouble_of_another_worker_keeps_all_from_committing(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 10)
    with pytest.raises(RunFailed, match="worker 1 has no space"):
        save(CheckpointStore(tmp_path, Other(0, trouble="worker 1 has no space")), 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010"]


def test_other_workers_write_their_files_and_nothing_else(tmp_path: Path) -> None:
    partial = tmp_path / ".step-00000020.partial"
    partial.mkdir()
    save(CheckpointStore(tmp_path, Other(1)), 20)
    assert {path.name for path in partial.iterdir()} == {"model.bin", "optimizer"}
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]


def test_each_worker_hashes_the_files_that_it_wrote_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    hash_file = checkpoint.hash_file

    def note(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    def write(rank: int) -> Callable[[Path], None]:
        return lambda folder: (folder / f"{rank}.bin").write_text(str(rank)) and None

    class First(Other):
        """Worker 0, beside which worker 1 writes."""

        def gather(self, value: Any) -> list[Any]:
            hashed.clear()
            CheckpointStore(tmp_path, second).save(10, {}, write(1))
            assert hashed == ["1.bin"]
            hashed.clear()
            return [value, second.gathered]

    class Second(Other):
        def gather(self, value: Any) -> list[Any]:
            self.gathered = value
            return []

    second = Second(1)
    monkeypatch.setattr(checkpoint, "hash_file", note)
    CheckpointStore(tmp_path, First(0)).save(10, {}, write(0))
    assert hashed == [STATE, MANIFEST]
    assert find_damage(CheckpointStore(tmp_path).at(10).folder) is None
    assert set(second.gathered) == {"1.bin"}
