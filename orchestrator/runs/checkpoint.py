"""Checkpoints that are whole or not there.

All workers write into a hidden folder, and each hashes the files that it wrote; worker 0 puts the hashes into
MANIFEST.json, renames the folder to its final name, and writes COMMITTED last, each step made durable before the next.
Whatever is interrupted leaves either a folder that nobody reads or a whole checkpoint. On the way back every file is
hashed again; a damaged checkpoint is set aside under another name, and the newest whole one is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.distributed import Exchange
from orchestrator.errors import RunFailed
from orchestrator.json_lines import parse_object
from orchestrator.runs.directory import write_atomically

MANIFEST = "MANIFEST.json"
COMMITTED = "COMMITTED"
HASHED_AT_ONCE = 8
STATE = "state.json"
IDENTITY = "identity.json"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"\.step-\d{8}\.partial")
Files = dict[str, dict[str, Any]]
"""Size and hash of files, by their paths in a checkpoint."""


class Superseded(Exception):
    """Another attempt has taken over this run; this one must not write any more."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """What the loop knew at that step: counters, best score, running sums."""
        state: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return state


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    Args:
        folder: where checkpoints are kept; every worker sees it.
        exchange: of all workers, of which worker 0 commits and deletes; None where this process is the only one.
        may_commit: asked by worker 0 just before the commit; False when another attempt has taken over the run.
    """

    def __init__(
        self,
        folder: Path,
        exchange: Exchange | None = None,
        may_commit: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self.exchange = exchange or Exchange()
        self.rank = self.exchange.rank
        self.may_commit = may_commit
        self.place = str(folder)
        self.identity: dict[str, Any] | None = None
        """What the run was begun with, which stands with every checkpoint."""

    def save(self, step: int, state: dict[str, Any], write_files: Callable[[Path], None]) -> None:
        """Save one checkpoint; every worker calls this, and `write_files` puts its files into the folder it is given.

        Raises:
            RunFailed: on every worker, when any of them could not write (a full disk), or when another attempt has
                taken over the run. The checkpoints before it are as they were.
        """
        partial = self.folder / f".step-{step:08d}.partial"
        self._together(partial, lambda: self._start(partial), only_first=True)
        files = self._write(partial, write_files)

        def commit() -> None:
            self._write_state(partial, state)
            self._commit(partial, step, files)

        self._together(partial, commit, only_first=True)

    def _together(self, partial: Path, action: Callable[[], None], only_first: bool = False) -> None:
        """Do one part of saving; if it fails on any worker, clean up and fail on all (none is left waiting)."""
        trouble = None
        if self.rank == 0 or not only_first:
            try:
                action()
            except OSError as error:
                trouble = f"could not save a checkpoint to {self.place}: {error.strerror or error}"
            except Superseded as error:
                trouble = str(error)
        trouble = self.exchange.agree(trouble)
        if trouble is not None:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise RunFailed(f"{trouble}; the checkpoints before it are whole")

    def _start(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _write_state(self, partial: Path, state: dict[str, Any]) -> None:
        write_atomically(partial / STATE, json.dumps(state))
        if self.identity is not None:
            write_atomically(partial / IDENTITY, json.dumps(self.identity, ensure_ascii=False))

    def _write(self, partial: Path, write_files: Callable[[Path], None]) -> Files:
        """Have all workers write; returns the files of all on worker 0.

        Each worker writes into a folder of its own first, so that it knows which files are its own.
        """
        files: Files = {}
        own = partial / f"worker-{self.rank}"

        def write() -> None:
            own.mkdir()
            write_files(own)
            files.update(describe_files(own))
            for name in files:
                path = partial / name
                if not path.parent.is_dir():
                    path.parent.mkdir(parents=True, exist_ok=True)
                (own / name).rename(path)
            shutil.rmtree(own)

        self._together(partial, write)
        return {name: file for part in self.exchange.gather(files) for name, file in part.items()}

    def _commit(self, partial: Path, step: int, files: Files) -> None:
        final = self.folder / f"step-{step:08d}"
        files = describe_files(partial, known=files)
        write_atomically(partial / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        flush_to_disk(partial)
        if not self.may_commit():
            raise Superseded("another attempt has taken over this run")
        if final.exists():  # The same step of an earlier attempt: not committed, or judged damaged.
            shutil.rmtree(final)
        partial.rename(final)
        flush_to_disk(self.folder)
        write_atomically(final / COMMITTED, hash_file(final / MANIFEST) + "\n")
        flush_to_disk(final)

    def committed_steps(self) -> list[int]:
        """Steps with a COMMITTED mark, oldest first; their files are not looked at."""
        found = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(int(path.name[5:]) for path in found if (path / COMMITTED).exists())

    def download(self, step: int) -> None:
        """Have a checkpoint where this worker reads it; all workers call this. Here it always is."""

    def at(self, step: int) -> Checkpoint:
        return Checkpoint(self.folder / f"step-{step:08d}", step)

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose every file is as it was written, and notes about damaged ones set aside.

        Only worker 0 (or the command, before there are workers) calls this: it renames and removes.
        """
        notes: list[str] = []
        for leftover in self.folder.glob(".step-*"):
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover)
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            if not _NAME.fullmatch(path.name):
                continue
            damage = find_damage(path)
            if damage is None:
                return self.at(int(path.name[5:])), notes
            notes.append(f"checkpoint {path.name} is damaged ({damage}); set aside as {set_aside(path).name}")
        return None, notes

    def prune(self, keep: int, best_step: int | None) -> None:
        """Delete all but the newest `keep` committed checkpoints and the best one. Worker 0 only.

        COMMITTED goes first, so that an interrupted deletion leaves nothing that looks whole.
        """
        for step in self.committed_steps()[:-keep]:
            if step != best_step:
                folder = self.at(step).folder
                (folder / COMMITTED).unlink()
                shutil.rmtree(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None when every file is as its manifest says."""
    try:
        if (folder / COMMITTED).read_text(encoding="utf-8").strip() != hash_file(folder / MANIFEST):
            return "its manifest was changed"
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            hashes = pool.map(lambda name: hash_file(folder / name), manifest["files"])
            for found, (name, expected) in zip(hashes, manifest["files"].items(), strict=True):
                if found != expected["sha256"]:
                    return f"{name} does not match its hash"
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        return "it was never finished" if missing == COMMITTED else f"{missing} is missing"
    except (ValueError, KeyError, UnicodeDecodeError):
        return "its manifest cannot be read"
    return None


def read_identity(read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Return what the run was begun with that left a checkpoint; {} where it does not say, or no longer.

    Args:
        read: gives the content of a file of the checkpoint, or None.
    """
    data = read(IDENTITY)
    if data is None:
        return {}
    expected = parse_object(read(MANIFEST)).get("files", {}).get(IDENTITY, {}).get("sha256")
    return parse_object(data) if hashlib.sha256(data).hexdigest() == expected else {}


def set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"damaged-{number}-{folder.name}")).exists():
        number += 1
    return folder.rename(aside)


def describe_files(folder: Path, known: Files | None = None) -> Files:
    """Return size and hash of every file in a folder, by their paths in it; what is new is made durable.

    Args:
        known: files that are described already.
    """
    files = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in files:
            flush_to_disk(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return dict(sorted(files.items()))


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
