"""One directory with everything about one training, and the records in it.

Every record is written aside and renamed, so that a reader (or the next attempt) never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, Problem
from orchestrator.json_lines import append_json_line, finite, format_json_lines, parse_object, read_json_lines


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a whole new one, durable before it is visible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


DESCRIPTION = "transfer.json"
"""The file in a model directory that says how it was trained; transformers does not read it."""


class RunDirectory:
    """Names and records of a run directory (design, section 5)."""

    leads_node = True
    """Whether this worker does for its node what is done there once."""
    kind = "run"
    """What the directory is made for: a run or a search."""

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
        """Make the directory, without access for others (it may hold private data)."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)

    @property
    def place(self) -> str:
        """Where the run is, for people."""
        return str(self.root)

    def names(self) -> set[str]:
        """Return the names of the files and folders in it, without hidden ones."""
        found = self.root.iterdir() if self.root.is_dir() else ()
        return {path.name for path in found if not path.name.startswith(".")}

    def committed(self) -> list[str]:
        """Return the names of the committed checkpoints, the newest first."""
        return sorted((path.parent.name for path in self.checkpoints.glob("step-*/COMMITTED")), reverse=True)

    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    def download(self) -> None:
        """Have the records here as they are where the run is kept: nothing to do where that is here."""

    def upload(self) -> None:
        """Have the records where the run is kept as they are here; and so the next ones."""

    def upload_logs(self) -> None: ...

    def upload_results(self) -> None: ...

    def upload_progress(self) -> None: ...

    def download_progress(self) -> None: ...

    def finish(self) -> None: ...

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against a second command on this machine; the lock ends with the process, however it ends."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "wait for it, stop it, or give another --output"
                raise InputError(Problem("another command is running in this directory", self.place, remedy)) from None
            yield

    def set_aside(self) -> str:
        """Move the whole directory to a free name beside it; returns that name."""
        number = 1
        while (aside := self.root.with_name(f"{self.root.name}.old-{number}")).exists():
            number += 1
        self.root.rename(aside)
        return str(aside)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of the run, as it is where the run is kept; None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_record(self) -> dict[str, Any]:
        """run.json, or an empty dict where there is none (or only a damaged one: it is rebuilt)."""
        return parse_object(self.read(self.record.name))

    def read_result(self) -> dict[str, Any]:
        """Return the content of result.json; {} where there is none, or a damaged one."""
        return parse_object(self.result.read_bytes()) if self.result.exists() else {}

    def has_finished(self) -> bool:
        """Whether the result is there and whole, and so is the model's description, unless the model was taken away."""
        description = self.read(f"{self.model.name}/{DESCRIPTION}")
        is_whole = bool(parse_object(description)) or self.model.name not in self.names()
        return bool(self.read_result()) and is_whole

    def update_record(self, **changes: Any) -> dict[str, Any]:
        record = {**self.read_record(), **changes}
        write_json(self.record, finite(record))
        return record

    def note(self, text: str) -> None:
        """Keep a sentence about the run that its user should see at the end."""
        notes = self.read_record().get("notes", [])
        if text not in notes:  # A run that goes on finds out the same again.
            self.update_record(notes=[*notes, text])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; damaged lines are skipped."""
        return read_json_lines(self.metrics)

    def append_metrics(self, row: dict[str, Any]) -> None:
        append_json_line(self.metrics, row)

    def forget_metrics_after(self, step: int) -> int:
        """Drop the rows of steps that a resumed run will take again; returns how many of its training are left."""
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        write_atomically(self.metrics, format_json_lines(kept))
        return sum(row.get("split") != "test" for row in kept)
