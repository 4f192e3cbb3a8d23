"""Checkpoints in an object store. Files cannot be renamed there, so a checkpoint is valid once COMMITTED exists.

Workers write into a hidden folder on their node, and each hashes its own files. One worker of each node uploads the
folder; worker 0 writes MANIFEST.json with all sizes and hashes, then COMMITTED. To resume, each node downloads the
whole checkpoint, and it is hashed like any other.
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
    CheckpointStore,
    Files,
    Superseded,
    describe_files,
    find_damage,
    hash_file,
)
from orchestrator.runs.directory import RunDirectory, write_atomically
from orchestrator.runs.identity import MANIFEST
from orchestrator.runs.remote import RemoteRunDirectory
from orchestrator.storage import join

DAMAGED = "DAMAGED"
"""The name that COMMITTED gets once files turn out to be damaged."""


def open_store(
    directory: RunDirectory,
    exchange: Exchange,
    may_commit: Callable[[], bool],
) -> CheckpointStore:
    """Open the checkpoints of a run, on a disk or in an object store."""
    if isinstance(directory, RemoteRunDirectory):
        return RemoteCheckpointStore(directory, exchange, may_commit)
    return CheckpointStore(directory.checkpoints, exchange, may_commit)


class RemoteCheckpointStore(CheckpointStore):
    """A checkpoint store whose `folder` holds this node's copies."""

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
        """The step of the local copy that was hashed last and is undamaged."""

    def save(self, step: int, state: dict[str, Any], write_files: Callable[[Path], None]) -> None:
        partial, stored = self.folder / f".step-{step:08d}.partial", _stored_name(step)

        def start() -> None:
            if self.leads:
                self._start(partial)
            if self.rank == 0:
                self._refuse_superseded()
                self.remote.delete(stored, first=[COMMITTED])

        def upload() -> None:
            if self.rank == 0:
                self._write_state(partial, state)
            if self.leads:
                self.remote.upload(partial, stored)

        self._together(partial, start)
        files = self._write(partial, write_files)
        self._together(partial, upload)
        self._together(partial, lambda: self._commit(partial, step, files), only_first=True)
        if self.leads and self.rank != 0:
            shutil.rmtree(partial)  # It holds a part of the checkpoint only.

    def _commit(self, partial: Path, step: int, files: Files) -> None:
        stored = _stored_name(step)
        files = describe_files(partial, known=files)
        write_atomically(partial / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        mark = hash_file(partial / MANIFEST) + "\n"
        self.remote.upload(partial / MANIFEST, f"{stored}/{MANIFEST}")
        self._refuse_superseded()
        self.directory.upload()
        self.remote.write(f"{stored}/{COMMITTED}", mark.encode())
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
            damage = self._download(step)
            if damage is None:
                return self.at(step), notes
            stored = _stored_name(step)
            self.remote.write(f"{stored}/{DAMAGED}", self.remote.read(f"{stored}/{COMMITTED}") or b"")
            self.remote.delete(f"{stored}/{COMMITTED}")
            notes.append(f"checkpoint step-{step:08d} is damaged ({damage}); its COMMITTED is now called {DAMAGED}")
        return None, notes

    def download(self, step: int) -> None:
        """Download a checkpoint to every node that lacks it; all workers call this.

        Raises:
            RunFailed: on every worker, if any node cannot reach the store. Damaged files raise nothing.
        """
        trouble = None
        if self.leads and step != self._whole:
            try:
                self._download(step)
            except OSError as error:
                trouble = f"cannot read step {step} in {self.place}: {error}"
        trouble = self.exchange.agree(trouble)
        if trouble is not None:
            raise RunFailed(trouble)

    def _download(self, step: int) -> str | None:
        """Download a checkpoint unless there is an intact copy; return its damage, or None."""
        folder, stored = self.at(step).folder, _stored_name(step)
        mark = self.remote.read(f"{stored}/{COMMITTED}")
        local = folder / COMMITTED
        damage: str | None = "it is not on this machine"
        if local.exists() and local.read_bytes() == mark:
            damage = find_damage(folder)
        if damage is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self.remote.download(stored, folder)
            damage = find_damage(folder)
        self._whole = step if damage is None else None
        return damage

    def prune(self, keep: int, best_step: int | None) -> None:
        for step in self.committed_steps()[:-keep]:
            if step != best_step:
                self.remote.delete(_stored_name(step), first=[COMMITTED])
                shutil.rmtree(self.at(step).folder, ignore_errors=True)


def _stored_name(step: int) -> str:
    return f"checkpoints/step-{step:08d}"
