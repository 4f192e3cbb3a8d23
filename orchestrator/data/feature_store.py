"""Arrays on disk whose rows are expensive to compute: several processes compute them together, and all map them.

An entry is a folder, named by the hash of everything its rows depend on, with `values.bin` (the rows one after another,
without padding) and `layout.json`. While it is computed its name is `<key>.partial`. Processes claim shards of rows by
locks that end with the process, so that others compute the shard of a killed process, and a later command continues.
The entry gets its final name when every row is on the disk.

The folder has a limited size. Entries that are not in use are removed, those that were read longest ago first.
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

from orchestrator.formatting import format_bytes

VALUES, LAYOUT, CLAIMS, DONE, IN_USE = "values.bin", "layout.json", "claims", "done", "in-use"
LOCK = "lock"  # In the store's folder; held while an entry begins, gets its final name or is removed.
SECONDS_BETWEEN_LOOKS = 0.02
KEPT_FREE = 0.05  # Share of the disk that stays free.

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The shape and dtype of an entry's rows."""

    shape: tuple[int, ...]
    """Shape of a row; of one position in a row, if rows have different lengths."""
    dtype: str
    """NumPy's name of the dtype."""
    num_rows: int
    lengths: tuple[int, ...] | None = None
    """Number of positions in each row; None if all rows have the same shape."""

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


class StoredFeatures:
    """A complete entry, mapped into memory, which all processes that read it share."""

    def __init__(self, folder: Path) -> None:
        # The lock keeps the entry from being removed while it is read.
        self._lock = (folder / IN_USE).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        described = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
        self.note: str = described.pop("note")
        """The writer's note about the rows."""
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

    def __init__(self, folder: Path, layout: Layout, num_shards: int, note: str) -> None:
        self.folder = folder
        self.num_shards = num_shards
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # The lock keeps the entry from being removed between shards, when nothing is claimed.
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

    def is_done(self, shard: int) -> bool:
        return os.pread(self._done, 1, shard) == b"\1"

    @property
    def is_complete(self) -> bool:
        return os.pread(self._done, self.num_shards, 0) == b"\1" * self.num_shards

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Yield whether this is the only process that computes a shard."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, shard)

    def write(self, row: int, values: npt.NDArray[Any]) -> None:
        """Write one row; `values` is [positions or more, *shape], or [*shape] for even rows."""
        start, end = self._offsets[row], self._offsets[row + 1]
        self._values[start:end] = values[: end - start] if values.ndim == self._values.ndim else values

    def mark_done(self, shard: int) -> None:
        """Flush a complete shard to the disk, then mark it as complete."""
        os.fdatasync(self._file)
        os.pwrite(self._done, b"\1", shard)

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
        """Return the bytes for all entries: as given, or half of the disk space that is free or used by entries."""
        return (shutil.disk_usage(self.folder).free + self.num_bytes()) // 2 if self._budget is None else self._budget

    def open(self, key: str) -> StoredFeatures | None:
        """Return the entry, if it exists and is complete."""
        try:
            return StoredFeatures(self.folder / key)
        except FileNotFoundError:
            return None

    def writer(self, key: str, layout: Layout, num_shards: int, note: str = "") -> Writer:
        """Begin an entry, or join in computing it; an entry that is complete meanwhile has nothing left to compute.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        with self._alone():
            whole = self.folder / key
            return Writer(whole if whole.exists() else self._partial(key), layout, num_shards, note)

    def finish(self, key: str) -> StoredFeatures:
        """Rename a complete entry to its final name, which the first of its writers does."""
        with self._alone():
            if not (self.folder / key).exists():  # Another process may have done it.
                self._partial(key).rename(self.folder / key)
        return StoredFeatures(self.folder / key)

    def adopt(self, key: str, folder: Path) -> None:
        """Move a complete entry from a folder on the same disk into the store, unless it has the entry."""
        with self._alone():
            if not (self.folder / key).exists():
                folder.rename(self.folder / key)

    def make_room(self, num_bytes: int, but: frozenset[str] = frozenset()) -> str | None:
        """Remove entries that were read longest ago until `num_bytes` fit; return why they do not fit, or None.

        Args:
            but: keys of entries that stay, though nobody has opened them yet.
        """
        disk = shutil.disk_usage(self.folder)
        spare = min(self.budget - self.num_bytes(), disk.free - int(KEPT_FREE * disk.total))
        entries = sorted(self._entries(), key=_last_use)
        others = [entry for entry in entries if entry.name.removesuffix(".partial") not in but]
        # If removing all of them is not enough, none is removed.
        possible = spare + sum(map(_size, others))
        for entry in others if possible >= num_bytes else ():
            if spare >= num_bytes:
                break
            with self._alone():
                spare += _remove_unused(entry)
        if spare >= num_bytes:
            return None
        needed, left = format_bytes(num_bytes), format_bytes(max(0, possible if possible < num_bytes else spare))
        return f"it needs {needed} of disk in {self.folder}, and {left} are left for it"

    def bytes_to_come(self, key: str, layout: Layout) -> int:
        """Return what an incomplete entry will take beyond the space that its writers have reserved."""
        return max(0, layout.num_bytes - _size(self._partial(key)))

    def num_bytes(self) -> int:
        """Return the bytes that all entries take."""
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


def wait_for_others() -> None:
    """Sleep until other processes may have computed more of their shards."""
    time.sleep(SECONDS_BETWEEN_LOOKS)


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    """Open a file to read and write, creating it if it is missing; the stack closes it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _reserve(file: int, num_bytes: int) -> None:
    """Allocate the file's size at once: a full disk is noticed here, not when a page of the map is written."""
    before = os.fstat(file).st_size
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError:
        os.ftruncate(file, before)
        raise


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
