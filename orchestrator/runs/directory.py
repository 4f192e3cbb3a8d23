"""The run directory and its records.

Every record is written to a temporary file, then renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.errors import InputError, Problem
from orchestrator.json_lines import append_json_line, finite, format_json_lines, parse_object, read_json_lines


def write_atomically(path: Path, text: str) -> None:
    """Replace a file. The new content is on the disk before it is visible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


DESCRIPTION = "transfer.json"
"""The file in a model directory that describes how the model was trained; transformers does not read it."""
LOCK = ".lock"


class RunDirectory:
    """Paths and records of a run directory on a disk."""

    leads_node = True
    """Whether this worker does the work that each node needs once."""
    kind = "run"
    """The purpose of the directory: `run` or `search`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.record = root / "run.json"
        self.metrics = root / "metrics.jsonl"
        self.result = root / "result.json"
        self.predictions = root / "predictions.parquet"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.logs = root / "logs"

    def create(self) -> None:
        """Create the directory, without access for other users: it may hold private data."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)

    @property
    def place(self) -> str:
        """The path or URL of the run, as users know it."""
        return str(self.root)

    def names(self) -> set[str]:
        """Return the names of its files and folders, without hidden ones."""
        found = self.root.iterdir() if self.root.is_dir() else ()
        return {path.name for path in found if not path.name.startswith(".")}

    def committed(self) -> list[str]:
        """Return the names of the committed checkpoints, the newest first."""
        return sorted((path.parent.name for path in self.checkpoints.glob("step-*/COMMITTED")), reverse=True)

    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    def download(self) -> None:
        """Copy the records from an object store to this machine; nothing to do for a directory on a disk."""

    def upload(self) -> None:
        """Copy the records to the object store."""

    def upload_logs(self) -> None:
        """Copy the logs to the object store."""

    def upload_results(self) -> None:
        """Copy the model and the records to the object store."""

    def upload_progress(self) -> None:
        """Copy the progress to the object store, at most every few seconds."""

    def download_progress(self) -> None:
        """Copy the progress from the object store."""

    def finish(self) -> None:
        """Remove what a finished run no longer needs from this machine's copy."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory against a second command on this machine; the lock ends with the process, however it ends.

        Raises:
            InputError: another command holds the lock.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(FileLock(self.root / LOCK, timeout=0))
            except Timeout:
                remedy = "wait for it, stop it, or give another --output"
                raise InputError(Problem("another command is running in this directory", self.place, remedy)) from None
            yield

    def set_aside(self) -> str:
        """Rename the directory to a free name next to it; return that name."""
        number = 1
        while (aside := self.root.with_name(f"{self.root.name}.old-{number}")).exists():
            number += 1
        self.root.rename(aside)
        return str(aside)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of the run, from the object store if it is kept there; None if it is missing."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_record(self) -> dict[str, Any]:
        """Return the content of run.json; {} where it is missing or damaged."""
        return parse_object(self.read(self.record.name))

    def read_result(self) -> dict[str, Any]:
        """Return the content of result.json; {} where it is missing or damaged."""
        return parse_object(self.result.read_bytes()) if self.result.exists() else {}

    def has_finished(self) -> bool:
        """Whether result.json is whole, and the model's description too, unless the model was removed."""
        description = self.read(f"{self.model.name}/{DESCRIPTION}")
        is_whole = bool(parse_object(description)) or self.model.name not in self.names()
        return bool(self.read_result()) and is_whole

    def update_record(self, **changes: Any) -> dict[str, Any]:
        """Change entries of run.json; return its new content."""
        record = {**self.read_record(), **changes}
        write_json(self.record, finite(record))
        return record

    def add_note(self, text: str) -> None:
        """Add a sentence to run.json that users see at the end of the run."""
        notes = self.read_record().get("notes", [])
        if text not in notes:  # A resumed run makes the same observations.
            self.update_record(notes=[*notes, text])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, without damaged ones."""
        return read_json_lines(self.metrics)

    def append_metrics(self, row: dict[str, Any]) -> None:
        append_json_line(self.metrics, row)

    def forget_metrics_after(self, step: int) -> int:
        """Drop the rows of steps that a resumed run takes again; return the number of rows left but those of *test*."""
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        write_atomically(self.metrics, format_json_lines(kept))
        return sum(row.get("split") != "test" for row in kept)
