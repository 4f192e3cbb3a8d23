"""Tables that are expensive to build, stored on disk by the hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

Built: TypeAlias = pa.Table | pa.RecordBatchReader
"""A table, or its batches one after the other if it is large."""
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return the folder for what can be built again, which $ORCHESTRATOR_CACHE may set.

    Else it is `transfer-orchestrator` in $XDG_CACHE_HOME or ~/.cache. It is created without access for others.

    Raises:
        OSError: it cannot be created.
    """
    named = os.environ.get("ORCHESTRATOR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else (Path(base) if base else Path("~/.cache").expanduser()) / "transfer-orchestrator"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def content_key(*parts: object) -> str:
    """Return the SHA-256 of JSON-able parts: the name under which `cached_table` stores what is built from them."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def cached_table(key: str, build: Callable[[], Built]) -> pa.Table:
    """Return the table stored under `key` (see `content_key`), memory-mapped; a missing or damaged one is built.

    Several processes may do so at once: each writes aside and renames, and either file is whole. Where the folder
    cannot be written or is full, the table is built in memory; one that comes in batches is in memory only then.
    """
    path = _path(key)
    if path is None:
        return as_table(build())
    table = _load(path)
    if table is not None:
        return table
    built = build()
    stored = None
    with suppress(OSError):
        _store(built, path)
        stored = _load(path)
    if stored is not None:
        return stored
    # The reader has no more batches to return.
    return built if isinstance(built, pa.Table) else as_table(build())


def find_cached_table(key: str) -> pa.Table | None:
    """Return the table that `cached_table` has stored under `key`; None if there is none."""
    path = _path(key)
    return None if path is None else _load(path)


def as_table(built: Built) -> pa.Table:
    """Return all batches as one table."""
    return built if isinstance(built, pa.Table) else built.read_all()


def with_column(built: Built, name: str, values: pa.Array) -> Built:
    """Return a table with a further column; of batches, each gets its rows of it."""
    if isinstance(built, pa.Table):
        return built.append_column(name, values)
    schema = built.schema.append(pa.field(name, values.type))

    def extend() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in built:
            own = values.slice(start, batch.num_rows)
            yield pa.record_batch([*batch.columns, own], schema=schema)
            start += batch.num_rows

    return pa.RecordBatchReader.from_batches(schema, extend())


def _path(key: str) -> Path | None:
    """Return where a table is stored; None if none can be."""
    try:
        folder = cache_folder() / "tables"
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder.
        return None
    return folder / f"{key}.arrow"


def _load(path: Path) -> pa.Table | None:
    """Return the mapped table, or None if the file is missing or not what was written."""
    try:
        with pa.memory_map(str(path)) as source:
            contents = source.read_buffer()
            body = contents.slice(0, max(0, contents.size - _DIGEST_BYTES))
            digest = bytes(memoryview(contents)[body.size :])
            if hashlib.sha256(memoryview(body)).digest() != digest:
                return None
            return pa.ipc.open_file(pa.BufferReader(body)).read_all()
    except (OSError, pa.ArrowException):
        return None


def _store(built: Built, path: Path) -> None:
    """Write Arrow's file format and its SHA-256: Arrow itself detects a truncated file, but not a changed byte."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.stem[:16]}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, built.schema) as writer:
            for batch in built.to_batches() if isinstance(built, pa.Table) else built:
                writer.write_batch(batch)
        with partial.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(digest)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
