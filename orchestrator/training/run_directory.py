"""One directory with everything about one training, and the records in it.

Every record is written aside and renamed, so that a reader (or the next attempt) never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, Problem


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


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunDirectory:
    """Names and records of a run directory (design, section 5)."""

    leads_node = True
    """Whether this worker does for its node what is done there once."""

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

    def exists(self) -> bool:
        """Whether there is a run in it."""
        return self.record.exists()

    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    def bring(self) -> None:
        """Have the records here as they are where the run is kept: nothing to do where that is here."""

    def send(self) -> None:
        """Have the records where the run is kept as they are here; and so the next ones."""

    def send_logs(self) -> None: ...

    def send_results(self) -> None: ...

    def send_progress(self) -> None: ...

    def bring_progress(self) -> None: ...

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

    def read_record(self) -> dict[str, Any]:
        """run.json, or an empty dict where there is none (or only a damaged one: it is rebuilt)."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

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
        """The rows of metrics.jsonl; a torn last line is passed over."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will take again."""
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        write_atomically(self.metrics, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
