"""Rows of numbers that are costly to compute, kept on disk: several processes compute them together, all map them.

An entry is a folder named by the hash of what its rows are made from, with `values.bin` (the rows one after another,
without padding) and `layout.json`. While it is computed it is called `<key>.partial`: processes that want the same one
claim stretches of rows by locks that end with the process, so that a killed one leaves its stretch to the others, and a
later command goes on with what is there. It gets its final name when every row is on the disk.

The folder is kept under a budget: entries that were read longest ago and are not in use go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VALUES, LAYOUT, CLAIMS, DONE, IN_USE = "values.bin", "layout.json", "claims", "done", "in-use"
LOCK = "lock"  # In the store's folder; held while an entry begins, gets its final name or goes.
SECONDS_BETWEEN_LOOKS = 0.02
KEPT_FREE = 0.05  # Share of the disk that is left to others.

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The form of an entry's rows."""

    shape: tuple[int, ...]
    """Shape of a row; of one position of it, where rows are of uneven length."""
    dtype: str
    """NumPy's name of the number format."""
    num_rows: int
    lengths: tuple[int, ...] | None = None
    """Positions of each row; None where all rows have the same shape."""

    @property
    def offsets(self) -> Indices:
        """Return where each row begins, and the last one ends, in positions; shape [num_rows + 1]."""
        lengths = np.ones(self.num_rows, np.int64) if self.lengths is None else np.asarray(self.lengths, np.int64)
        return np.concatenate([[0], np.cumsum(lengths)])

    @property
    def num_bytes(self) -> int:
        return int(self.offsets[-1]) * int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def map(self, path: Path, mode: Any) -> npt.NDArray[Any]:
        """Return the file as an array of shape [positions, *shape]."""
        return np.memmap(path, self.dtype, mode, shape=(int(self.offsets[-1]), *self.shape))


class Rows:
    """A whole entry, mapped into memory: processes that read the same one share it."""

    def __init__(self, folder: Path) -> None:
        # The lock keeps the entry from being removed for as long as somebody reads it.
        self._lock = (folder / IN_USE).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        described = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
        self.note: str = described.pop("note")
        """What the writer noted about the rows."""
        lengths = described.pop("lengths")
        self.layout = Layout(**{**described, "shape": tuple(described["shape"])}, lengths=lengths and tuple(lengths))
        self._values = self.layout.map(folder / VALUES, "r")
        self._offsets = self.layout.offsets
        os.utime(folder / LAYOUT)

    def take(self, rows: Indices, length: int | None = None) -> npt.NDArray[Any]:
        """Return these rows, those of uneven length padded with zeros on the right.

        Returns:
            Shape [len(rows), *shape]; where lengths differ [len(rows), length or that of the longest, *shape].
        """
        if self.layout.lengths is None:
            found: npt.NDArray[Any] = self._values[rows]
            return found
        starts, ends = self._offsets[rows], self._offsets[rows + 1]
        longest = int((ends - starts).max(initial=1)) if length is None else length
        padded = np.zeros((len(rows), longest, *self.layout.shape), self.layout.dtype)
        for line, start, end in zip(padded, starts, ends, strict=True):
            line[: end - start] = self._values[start:end]
        return padded

    def join(self, rows: Indices) -> npt.NDArray[Any]:
        """Return these rows, of uneven length, one after the other; shape [1, sum of their lengths, *shape]."""
        found = [
            self._values[start:end] for start, end in zip(self._offsets[rows], self._offsets[rows + 1], strict=True)
        ]
        return np.concatenate(found)[None]


class Writer:
    """An entry that is being computed, perhaps by several processes."""

    def __init__(self, folder: Path, layout: Layout, num_stretches: int, note: str) -> None:
        self.folder = folder
        self.num_stretches = num_stretches
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # The lock keeps the entry from being removed between the stretches, when nothing is claimed.
            fcntl.flock(stack.enter_context((folder / IN_USE).open("w")), fcntl.LOCK_SH)
            self._claims = stack.enter_context((folder / CLAIMS).open("a+b"))
            self._done = _open(folder / DONE, stack)
            self._file = _open(folder / VALUES, stack)
            _reserve(self._file, max(1, layout.num_bytes))
            self._files = stack.pop_all()
        self._values = layout.map(folder / VALUES, "r+")
        self._offsets = layout.offsets
        lengths = None if layout.lengths is None else list(layout.lengths)
        described = {"shape": layout.shape, "dtype": layout.dtype, "num_rows": layout.num_rows, "lengths": lengths}
        temporary = folder / f"{LAYOUT}.{os.getpid()}"
        temporary.write_text(json.dumps({**described, "note": note}), encoding="utf-8")
        temporary.replace(folder / LAYOUT)

    def is_done(self, stretch: int) -> bool:
        return os.pread(self._done, 1, stretch) == b"\1"

    @property
    def is_complete(self) -> bool:
        return os.pread(self._done, self.num_stretches, 0) == b"\1" * self.num_stretches

    @contextlib.contextmanager
    def claim(self, stretch: int) -> Iterator[bool]:
        """Try to be the only process that computes a stretch; whether that is so."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, stretch)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, stretch)

    def write(self, row: int, values: npt.NDArray[Any]) -> None:
        """Put one row where it belongs; `values` is [positions or more, *shape], or [*shape] for even rows."""
        start, end = self._offsets[row], self._offsets[row + 1]
        self._values[start:end] = values[: end - start] if values.ndim == self._values.ndim else values

    def mark_done(self, stretch: int) -> None:
        """Mark the shard as whole, once it is durable."""
        os.fdatasync(self._file)
        os.pwrite(self._done, b"\1", stretch)

    def close(self) -> None:
        self._files.close()


class FeatureStore:
    """A folder of entries.

    Args:
        folder: where they are; made if it is not there.
        budget: bytes that all of them together may take; None for half of what is free.
    """

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._budget = budget

    @property
    def budget(self) -> int:
        """Return bytes for all entries: as given; or half of the disk that is free or theirs already."""
        return (shutil.disk_usage(self.folder).free + self.num_bytes()) // 2 if self._budget is None else self._budget

    def open(self, key: str) -> Rows | None:
        """Return the entry, if it is there and whole."""
        try:
            return Rows(self.folder / key)
        except FileNotFoundError:
            return None

    def writer(self, key: str, layout: Layout, num_stretches: int, note: str = "") -> Writer:
        """Begin an entry, or take part in computing it; one that got whole meanwhile has nothing left to compute.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        with self._alone():
            whole = self.folder / key
            return Writer(whole if whole.exists() else self._partial(key), layout, num_stretches, note)

    def finish(self, key: str) -> Rows:
        """Give a complete entry its final name; whoever of its writers comes first does it."""
        with self._alone():
            if not (self.folder / key).exists():  # Another process may have been first.
                self._partial(key).rename(self.folder / key)
        return Rows(self.folder / key)

    def adopt(self, key: str, folder: Path) -> None:
        """Take in a whole entry that lies in a folder on the same disk, unless there is one."""
        with self._alone():
            if not (self.folder / key).exists():
                folder.rename(self.folder / key)

    def make_room(self, num_bytes: int, but: frozenset[str] = frozenset()) -> str | None:
        """Remove what was read longest ago until so many bytes fit; why they cannot, or None when they do.

        Args:
            but: keys of entries that stay, though nobody has opened them yet.
        """
        disk = shutil.disk_usage(self.folder)
        spare = min(self.budget - self.num_bytes(), disk.free - int(KEPT_FREE * disk.total))
        entries = sorted(self._entries(), key=_last_use)
        others = [entry for entry in entries if entry.name.removesuffix(".partial") not in but]
        # Where even all of them would not do, none has to go.
        possible = spare + sum(map(_size, others))
        for entry in others if possible >= num_bytes else ():
            if spare >= num_bytes:
                break
            with self._alone():
                spare += _remove_unused(entry)
        if spare >= num_bytes:
            return None
        needed, left = _in_words(num_bytes), _in_words(max(0, possible if possible < num_bytes else spare))
        return f"it needs {needed} of disk in {self.folder}, and {left} are left for it"

    def bytes_to_come(self, key: str, layout: Layout) -> int:
        """Return the bytes that an unfinished entry takes beyond those reserved by the processes that began it."""
        return max(0, layout.num_bytes - _size(self._partial(key)))

    def num_bytes(self) -> int:
        """Return bytes that all entries take."""
        return sum(_size(entry) for entry in self._entries())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _partial(self, key: str) -> Path:
        return self.folder / f"{key}.partial"

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()]


def wait_a_little() -> None:
    """Wait until other processes may have computed more shards."""
    time.sleep(SECONDS_BETWEEN_LOOKS)


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    """Open a file to read and write, created if it is missing, closed with the stack."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _reserve(file: int, num_bytes: int) -> None:
    """Make a file so large at once: a full disk is noticed here, not when a page of the map is written."""
    before = os.fstat(file).st_size
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError:
        os.ftruncate(file, before)
        raise


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _size(entry: Path) -> int:
    try:
        return (entry / VALUES).stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(entry: Path) -> float:
    try:
        return (entry / LAYOUT).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unused(entry: Path) -> int:
    """Remove an entry that no process reads or writes; returns the bytes that this frees."""
    size = _size(entry)
    try:
        with (entry / IN_USE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = entry.with_name(f".{entry.name}.{os.getpid()}.removed")
            entry.rename(gone)
    except OSError:
        return 0
    shutil.rmtree(gone, ignore_errors=True)
    return size
