"""Parquet and Arrow (IPC file or stream, as `datasets` saves them)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from orchestrator.data.formats.raw import RawFile
from orchestrator.data.messages import show_name
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path

if TYPE_CHECKING:
    import pyarrow.parquet as pq


def read_parquet(path: Path) -> RawFile:
    """Open a Parquet file; columns are read when fetched.

    Raises:
        DataError: the file is empty, cut off or damaged, or has a column name twice.
    """
    file = open_parquet(path)

    def fetch(name: str) -> pa.ChunkedArray:
        try:
            return file.read(columns=[name]).column(name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(damaged(path, "Parquet", error)) from None

    return raw_table(show_path(path), file.schema_arrow, file.metadata.num_rows, fetch)


def open_parquet(path: Path, **options: Any) -> pq.ParquetFile:
    """Return the file, of which only the metadata are read; `options` are pyarrow's.

    Raises:
        DataError: the file is empty, cut off or damaged.
    """
    import pyarrow.parquet as pq

    _check_size(path)
    try:
        return pq.ParquetFile(path, **options)
    except (pa.ArrowException, OSError) as error:
        raise DataError(damaged(path, "Parquet", error)) from None


def read_arrow(path: Path) -> RawFile:
    """Open an Arrow IPC file or stream, memory-mapped.

    Raises:
        DataError: the file is empty, cut off or damaged, or has a column name twice.
    """
    table = map_arrow(path)
    return raw_table(show_path(path), table.schema, table.num_rows, partial(_validated, path, table))


def map_arrow(path: Path) -> pa.Table:
    """Return the table of an Arrow IPC file or stream, memory-mapped.

    Raises:
        DataError: the file is empty, cut off or damaged.
    """
    _check_size(path)
    try:
        with pa.memory_map(str(path)) as source:
            # The file format begins with this mark; the stream format has none.
            opener = pa.ipc.open_file if source.read(6) == b"ARROW1" else pa.ipc.open_stream
            source.seek(0)
            return opener(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(damaged(path, "Arrow", error)) from None


def raw_table(place: str, schema: pa.Schema, num_rows: int, fetch: Callable[[str], pa.ChunkedArray]) -> RawFile:
    """Return a RawFile with Arrow's columns, and the class names that the schema holds."""
    twice = [show_name(name) for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        what = f"the file has the columns {', '.join(twice)} more than once"
        raise DataError(Problem(what, place, "give each column a name of its own"))
    return RawFile(place, tuple(schema.names), num_rows, fetch, label_names=_class_names(schema))


def _validated(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table.column(name)
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(damaged(path, "Arrow", error)) from None
    return column


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Names of `ClassLabel` columns, which `datasets` writes into the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    found = {}
    for column, feature in features.items():
        # Lists have their items' feature under this name, or are lists of one feature.
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
        inner = inner[0] if isinstance(inner, list) and len(inner) == 1 else inner
        names = inner.get("names") if isinstance(inner, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = tuple(names)
    return found


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise DataError(Problem(what, show_path(path), "make it readable")) from error
    if not size:
        raise DataError(Problem("the file is empty (0 bytes)", show_path(path), "write the file anew"))


def damaged(path: Path, format_: str, error: Exception) -> Problem:
    """Return the problem of a file that Arrow cannot read."""
    detail = show_name(str(error).splitlines()[0] if str(error) else type(error).__name__)
    what = f"the file is not whole {format_}: cut off, damaged or of another format ({detail})"
    return Problem(what, show_path(path), "copy or write the file anew")
