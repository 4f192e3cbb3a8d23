"""A checkpoint is whole or not there: wherever a save stops, the old one or the new one is found, and nothing between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RunFailed
from orchestrator.training.checkpoint import COMMITTED, MANIFEST, STATE, CheckpointStore, find_damage


class Killed(BaseException):
    """The process ends here: nothing that follows runs, not even handlers of errors."""


class FileEvents:
    """Counts what changes files, and stops before the n-th of them."""

    def __init__(self, stop_at: int | None, stop: BaseException) -> None:
        self.stop_at = stop_at
        self.stop = stop
        self.seen: list[str] = []
        self.is_dead = False

    def happen(self, name: str) -> None:
        if self.is_dead or len(self.seen) == self.stop_at:
            self.is_dead = isinstance(self.stop, Killed)
            self.stop_at = len(self.seen)
            self.seen.append(name)
            raise self.stop
        self.seen.append(name)


@pytest.fixture
def watch_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None, BaseException], FileEvents]]:
    """Put the counter before every call that creates, flushes, renames or removes a file or folder."""

    def start(stop_at: int | None, stop: BaseException) -> FileEvents:
        events = FileEvents(stop_at, stop)

        def before(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                events.happen(name)
                return call(*arguments, **options)

            return wrapped

        def before_writing(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode != "r" and mode != "rb":
                events.happen(f"open {path.name}")
            return opened(path, mode, *arguments, **options)

        opened = Path.open
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, before(getattr(os, name), name))
        monkeypatch.setattr(Path, "open", before_writing)
        return events

    yield start
    monkeypatch.undo()


def files_of(content: bytes) -> Callable[[Path], None]:
    """Two files of one checkpoint, one of them in a folder."""

    def write(folder: Path) -> None:
        with (folder / "model.bin").open("wb") as file:
            file.write(content * 100)
        (folder / "optimizer").mkdir()
        with (folder / "optimizer" / "rank-0.bin").open("wb") as file:
            file.write(content * 50)

    return write


def save(store: CheckpointStore, step: int, **state: Any) -> None:
    store.save(step, {"step": step, **state}, files_of(str(step).encode()))


def check_whole(folder: Path, step: int) -> None:
    content = str(step).encode()
    assert (folder / "model.bin").read_bytes() == content * 100
    assert (folder / "optimizer" / "rank-0.bin").read_bytes() == content * 50
    assert json.loads((folder / STATE).read_text(encoding="utf-8"))["step"] == step


def count_events(watch_files: Any, action: Callable[[], None]) -> int:
    events = watch_files(None, Killed())
    action()
    return len(events.seen)


def test_a_saved_checkpoint_comes_back_with_its_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10, best_score=0.5)
    found, notes = store.newest_valid()
    assert found is not None
    assert (found.step, found.state, notes) == (10, {"step": 10, "best_score": 0.5}, [])
    check_whole(found.folder, 10)
    manifest = json.loads((found.folder / MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"model.bin", "optimizer/rank-0.bin", STATE}


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").newest_valid() == (None, [])


def test_wherever_a_save_is_killed_the_old_or_the_new_checkpoint_is_whole(tmp_path: Path, watch_files: Any) -> None:
    def prepare(name: str) -> CheckpointStore:
        store = CheckpointStore(tmp_path / name)
        save(store, 10)
        return store

    counted = prepare("counted")
    num_events = count_events(watch_files, lambda: save(counted, 20))
    assert num_events > 12
    found_steps = []
    for event in range(num_events):
        store = prepare(f"killed-{event}")
        with pytest.MonkeyPatch.context() as patch:
            events = watch_files.__wrapped__(patch) if hasattr(watch_files, "__wrapped__") else None
            assert events is None
        watched = watch_files(event, Killed())
        with pytest.raises(Killed):
            save(store, 20)
        watched.stop_at, watched.is_dead = None, False
        found, _ = CheckpointStore(tmp_path / f"killed-{event}").newest_valid()
        assert found is not None
        check_whole(found.folder, found.step)
        found_steps.append(found.step)
    assert found_steps == sorted(found_steps)
    assert set(found_steps) == {10, 20}
