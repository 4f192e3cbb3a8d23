"""Checkpoints in an object store. There is no renaming there, so COMMITTED, which is written last, decides alone.

Workers write into a hidden folder on their node, and each hashes what it wrote. One worker of each node sends what is
in it; worker 0 makes MANIFEST.json of all sizes and hashes, and writes COMMITTED. On the way back each node brings the
whole checkpoint, and it is hashed as any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.distributed import Exchange
from orchestrator.errors import RunFailed
from orchestrator.runs.checkpoint import (
    COMMITTED,
    MANIFEST,
    CheckpointStore,
    Files,
    Superseded,
    describe_files,
    find_damage,
    hash_file,
)
from orchestrator.runs.directory import RunDirectory, write_atomically
from orchestrator.runs.remote import RemoteRunDirectory
from orchestrator.storage import join

DAMAGED = "DAMAGED"
"""What COMMITTED is called once the files are found to be other than they were."""


def open_store(
    directory: RunDirectory,
    exchange: Exchange,
    may_commit: Callable[[], bool],
) -> CheckpointStore:
    """The checkpoints of a run, wherever they lie."""
    if isinstance(directory, RemoteRunDirectory):
        return RemoteCheckpointStore(directory, exchange, may_commit)
    return CheckpointStore(directory.checkpoints, exchange, may_commit)


class RemoteCheckpointStore(CheckpointStore):
    """As its base; `folder` holds this node's copies."""

    def __init__(
        self,
        directory: RemoteRunDirectory,
        exchange: Exchange,
        may_commit: Callable[[], bool],
    ) -> None:
        super().__init__(directory.checkpoints, exchange, may_commit)
        self.directory = directory
        self.remote = directory.remote
        self.leads = directory.leads_node
        self.place = join(self.remote.url, "checkpoints")
        self._whole: int | None = None
        """The step whose copy here was hashed last, and found whole."""

    def save(self, step: int, state: dict[str, Any], write_files: Callable[[Path], None]) -> None:
        partial, there = self.folder / f".step-{step:08d}.partial", _there(step)

        def start() -> None:
            if self.leads:
                self._start(partial)
            if self.rank == 0:
                self._refuse_superseded()
                self.remote.delete(there, first=[COMMITTED])

        def upload() -> None:
            if self.rank == 0:
                self._write_state(partial, state)
            if self.leads:
                self.remote.upload(partial, there)

        self._together(partial, start)
        files = self._write(partial, write_files)
        self._together(partial, upload)
        self._together(partial, lambda: self._commit(partial, step, files), only_first=True)
        if self.leads and self.rank != 0:
            shutil.rmtree(partial)  # A part of a checkpoint is of no use on the way back.

    def _commit(self, partial: Path, step: int, files: Files) -> None:
        there = _there(step)
        files = describe_files(partial, known=files)
        write_atomically(partial / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        mark = hash_file(partial / MANIFEST) + "\n"
        self.remote.upload(partial / MANIFEST, f"{there}/{MANIFEST}")
        self._refuse_superseded()
        self.directory.upload()
        self.remote.write(f"{there}/{COMMITTED}", mark.encode())
        final = self.at(step).folder
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_atomically(final / COMMITTED, mark)

    def _refuse_superseded(self) -> None:
        if not self.may_commit():
            raise Superseded("another attempt has taken over this run")

    def committed_steps(self) -> list[int]:
        names = self.remote.names("checkpoints")
        return sorted(int(name[5:13]) for name in names if name.startswith("step-") and name.endswith(f"/{COMMITTED}"))

    def newest_valid(self) -> tuple[Any, list[str]]:
        notes: list[str] = []
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)
        for step in reversed(self.committed_steps()):
            damage = self._bring(step)
            if damage is None:
                return self.at(step), notes
            there = _there(step)
            self.remote.write(f"{there}/{DAMAGED}", self.remote.read(f"{there}/{COMMITTED}") or b"")
            self.remote.delete(f"{there}/{COMMITTED}")
            notes.append(f"checkpoint step-{step:08d} is damaged ({damage}); its COMMITTED is called {DAMAGED} now")
        return None, notes

    def download(self, step: int) -> None:
        """Have a checkpoint on every node that lacks it; all workers call this.

        Raises:
            RunFailed: on every worker, when any node cannot reach the store. What is damaged is left to the caller.
        """
        trouble = None
        if self.leads and step != self._whole:
            try:
                self._bring(step)
            except OSError as error:
                trouble = f"cannot read step {step} in {self.place}: {error}"
        trouble = self.exchange.agree(trouble)
        if trouble is not None:
            raise RunFailed(trouble)

    def _bring(self, step: int) -> str | None:
        """Have a checkpoint here as it is there; what is wrong with it, or None."""
        folder, there = self.at(step).folder, _there(step)
        mark = self.remote.read(f"{there}/{COMMITTED}")
        here = folder / COMMITTED
        damage: str | None = "it is not here"
        if here.exists() and here.read_bytes() == mark:
            damage = find_damage(folder)
        if damage is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self.remote.download(there, folder)
            damage = find_damage(folder)
        self._whole = step if damage is None else None
        return damage

    def prune(self, keep: int, best_step: int | None) -> None:
        for step in self.committed_steps()[:-keep]:
            if step != best_step:
                self.remote.delete(_there(step), first=[COMMITTED])
                shutil.rmtree(self.at(step).folder, ignore_errors=True)


def _there(step: int) -> str:
    return f"checkpoints/step-{step:08d}"
