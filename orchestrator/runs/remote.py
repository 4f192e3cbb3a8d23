"""A run directory in an object store, with a copy on the machine of the command and on each node with workers.

The object store is authoritative. run.json is read there each time; the other records are downloaded when a copy is
opened, and uploaded when a checkpoint is committed and at the end, result.json last. A node that is lost takes only
records with it that are newer than the last checkpoint, which a resumed run drops in any case.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from orchestrator.data.cache import cache_folder
from orchestrator.runs.directory import LOCK, RunDirectory, write_atomically
from orchestrator.storage import RemoteFolder, is_url, join, split

RECORDS = ("recipe.yaml", "metrics.jsonl", "predictions.parquet", "report.html", "result.json")
"""In the order of their upload. Not run.json: it is updated in the store, so that no copy overwrites it."""
PROGRESS = ".progress.json"
SECONDS_BETWEEN_PROGRESS = 5.0


def open_run(place: str | Path, holder: str = "command") -> RunDirectory:
    """Open the run directory at a path or a URL.

    Args:
        holder: names the copy of an object store's directory: a machine may have one of the command, and one of its
            workers.
    """
    if isinstance(place, str) and is_url(place):
        return RemoteRunDirectory(place, holder)
    return RunDirectory(Path(place).absolute())


class RemoteRunDirectory(RunDirectory):
    """A copy of a run directory, in the cache folder of this machine."""

    def __init__(self, url: str, holder: str) -> None:
        self.remote = RemoteFolder(url)
        self._home, name = split(url)
        digest = hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        super().__init__(cache_folder() / "runs" / f"{name}-{digest}" / holder)
        self._upload: threading.Thread | None = None
        self._last_upload = 0.0

    @property
    def place(self) -> str:
        return self.remote.url

    def create(self) -> None:
        super().create()
        probe = f".probe-{time.time_ns()}"
        self.remote.write(probe, b"")
        self.remote.delete(probe)
        self.download()

    def download(self) -> None:
        stored = self.remote.names()
        for name in (*RECORDS, self.record.name):
            if name not in stored or not self.remote.download(name, self.root / name):
                (self.root / name).unlink(missing_ok=True)

    def upload(self) -> None:
        for name in RECORDS:
            self.remote.upload(self.root / name, name)

    def upload_logs(self) -> None:
        for path in self.logs.glob("*.log"):
            self.remote.upload(path, f"logs/{path.name}")

    def upload_results(self) -> None:
        self.remote.upload(self.model, "model")
        self.upload()

    def names(self) -> set[str]:
        found = {name.partition("/")[0] for name in self.remote.names()}
        return {name for name in found if not name.startswith(".")}

    def has_checkpoints(self) -> bool:
        return any(name.startswith("step-") for name in self.remote.folders("checkpoints"))

    def committed(self) -> list[str]:
        found = (name.partition("/") for name in self.remote.names("checkpoints"))
        steps = [step for step, _, name in found if step.startswith("step-") and name == "COMMITTED"]
        return sorted(steps, reverse=True)

    def read(self, name: str) -> bytes | None:
        return self.remote.read(name)

    def update_record(self, **changes: Any) -> dict[str, Any]:
        record = super().update_record(**changes)
        self.remote.upload(self.record, self.record.name)
        return record

    def set_aside(self) -> str:
        number = 1
        _, name = split(self.remote.url)
        while (aside := RemoteFolder(join(self._home, f"{name}.old-{number}"))).names():
            number += 1
        self.remote.move(aside)
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:  # Held by this command.
                path.unlink()
        return aside.url

    def upload_progress(self) -> None:
        now = time.monotonic()
        is_uploading = self._upload is not None and self._upload.is_alive()
        if is_uploading or now - self._last_upload < SECONDS_BETWEEN_PROGRESS:
            return
        self._last_upload = now
        self._upload = threading.Thread(target=self._upload_progress, name="upload-progress", daemon=True)
        self._upload.start()

    def _upload_progress(self) -> None:
        with contextlib.suppress(OSError):  # The progress is only shown.
            self.remote.upload(self.root / PROGRESS, PROGRESS)

    def download_progress(self) -> None:
        with contextlib.suppress(OSError):
            data = self.remote.read(PROGRESS)
            if data is not None:
                write_atomically(self.root / PROGRESS, data.decode())

    def finish(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.remote.delete(PROGRESS)
