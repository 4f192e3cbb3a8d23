"""The progress of a run: worker 0 writes it to a small file, the command shows it as one live line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from orchestrator.formatting import format_duration

_FILE = ".progress.json"
_SECONDS_BETWEEN_WRITES = 0.2
_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_SECONDS_BETWEEN_DOWNLOADS = 5.0


class ProgressFile:
    """Writes the latest state, at most a few times a second; used by worker 0.

    Args:
        upload: called after each write, where the command sees another folder.
    """

    def __init__(self, folder: Path, upload: Callable[[], None] = lambda: None) -> None:
        self.path = folder / _FILE
        self.upload = upload
        self.written = 0.0

    def show(self, force: bool = False, **state: Any) -> None:
        """Write `state`; without `force`, only if the last write was a moment ago."""
        now = time.monotonic()
        if force or now - self.written >= _SECONDS_BETWEEN_WRITES:
            self.written = now
            temporary = self.path.with_name(f"{_FILE}.partial")
            with contextlib.suppress(OSError):  # The progress is only shown.
                temporary.write_text(json.dumps(state), encoding="utf-8")
                temporary.replace(self.path)
            self.upload()


def describe(state: dict[str, Any]) -> str:
    """Return one line: phase, step, loss, select metric, examples per second, time left."""
    parts = [state["phase"]]
    if "step" in state:
        parts.append(f"step {state['step']}/{state['steps']}")
    if state.get("loss") is not None:
        parts.append(f"loss {state['loss']:.4f}")
    if state.get("score") is not None:
        parts.append(f"select {state['metric']} {state['score']:.4f}")
    if state.get("examples_per_second"):
        parts.append(f"{state['examples_per_second']:.0f} examples/s")
    if state.get("seconds_left") is not None:
        parts.append(f"{format_duration(state['seconds_left'], whole=True)} left")
    return "  ".join(parts)


class ProgressLine:
    """Shows the progress: one line that is rewritten in a terminal, or a new line now and then elsewhere."""

    def __init__(self, folder: Path, out: TextIO) -> None:
        self.path = folder / _FILE
        self.out = out
        self.live = out.isatty()
        self.last_text = ""
        self.last_phase = ""
        self.last_printed = 0.0

    def refresh(self) -> None:
        """Show the state of the file, if there is anything new."""
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        text = describe(state)
        now = time.monotonic()
        new_phase = state["phase"] != self.last_phase
        if text == self.last_text or not (
            self.live or new_phase or now - self.last_printed > _SECONDS_BETWEEN_PLAIN_LINES
        ):
            return
        self.last_text, self.last_phase, self.last_printed = text, state["phase"], now
        self.out.write(f"\r\033[K{text}" if self.live else f"{text}\n")
        self.out.flush()

    def clear(self) -> None:
        """Erase the line from a terminal."""
        if self.live and self.last_text:
            self.out.write("\r\033[K")
            self.out.flush()


@contextlib.contextmanager
def duplicate_stream(out: TextIO) -> Iterator[TextIO]:
    """Yield a stream to the same terminal or file that stays open while the process's own output goes to a log."""
    try:
        descriptor = os.dup(out.fileno())
    except io.UnsupportedOperation:  # A stream in memory.
        yield out
        return
    with os.fdopen(descriptor, "w", encoding="utf-8") as screen:
        yield screen


@contextlib.contextmanager
def show_progress(
    folder: Path, out: TextIO | None = None, download: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Show the progress of the run in `folder` while the body runs.

    Args:
        download: called every few seconds, where the workers write to another folder.
    """
    (folder / _FILE).unlink(missing_ok=True)
    done = threading.Event()
    with duplicate_stream(out or sys.stderr) as screen:
        line = ProgressLine(folder, screen)
        thread = threading.Thread(target=refresh_until_done, args=(line, done, download), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            line.clear()
            (folder / _FILE).unlink(missing_ok=True)


def refresh_until_done(line: ProgressLine, done: threading.Event, download: Callable[[], None]) -> None:
    last_download = 0.0
    while not done.wait(_SECONDS_BETWEEN_WRITES):
        if time.monotonic() - last_download > _SECONDS_BETWEEN_DOWNLOADS:
            download()
            last_download = time.monotonic()
        line.refresh()
