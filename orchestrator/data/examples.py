"""A split of the target data, and the origin of each of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Indices = npt.NDArray[np.int64]
IMAGE = pa.struct(
    [pa.field("bytes", pa.large_binary()), pa.field("path", pa.string()), pa.field("digest", pa.string())]
)
"""An image: its bytes, or else the full path of its file; and the SHA-256 of its content."""
_BYTES_TOGETHER = 2**20
_ROWS_TOGETHER = 4096


@dataclass(frozen=True, eq=False)
class LinesAt:
    """Lines (from 1) of rows whose positions in bytes are known; they are counted when they are needed."""

    path: Path
    starts: Indices

    def __getitem__(self, row: int) -> int:
        return line_at(self.path, int(self.starts[row]))


def line_at(path: Path, position: int) -> int:
    """Return the line (from 1) of a file that the byte at `position` (from 0) is part of."""
    line = 1
    with path.open("rb") as file:
        while position > 0 and (data := file.read(min(position, _BYTES_TOGETHER))):
            line += data.count(b"\n")
            position -= len(data)
    return line


@dataclass(frozen=True, eq=False)
class SourceFile:
    """The origin of rows in one file (or one split on the Hub)."""

    place: str
    """As shown in messages: `data/train.jsonl`, `nyu-mll/glue train`."""
    num_rows: int
    lines: Indices | LinesAt | None
    """Line (from 1) on which each row begins, for formats that have lines."""
    row_places: tuple[str, ...] | None = None
    """The place of each row, for data with one file per row."""
    folder: Path | None = None
    """The folder that paths in the data are relative to, and must stay in; None if they must not name files."""
    part: int = 0
    """The index of its entry in the recipe's list."""
    count: int | None = None
    """The number of examples to draw from that entry; None for all."""
    row_numbers: Indices | None = None
    """The number of each row in the file, if only some of its rows were read."""
    columns: tuple[str, ...] | None = None
    """The task's columns in it; None for all columns of the table."""

    def where(self, row: int) -> str:
        """Return the place of a row: `data/train.jsonl:40`, or `data/train.parquet row 39` (rows count from 0)."""
        if self.row_places is not None:
            return self.row_places[row]
        if self.lines is not None:
            return f"{self.place}:{self.lines[row]}"
        return f"{self.place} row {row if self.row_numbers is None else self.row_numbers[row]}"


@dataclass(frozen=True, eq=False)
class Examples:
    """A split: an Arrow table whose columns have the task's names, and the origin of each row."""

    table: pa.Table
    """Columns of the types that the task's fields convert to."""
    rows: Indices
    """Shape [len]: original row number of each example, counted through `files` in their order."""
    files: tuple[SourceFile, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that the data declare for the labels of a column, in the order of their numbers."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, indices: Sequence[int] | Indices) -> Examples:
        """Return the examples at these positions, in this order."""
        positions = np.asarray(indices, dtype=np.int64)
        return Examples(self.table.take(pa.array(positions)), self.rows[positions], self.files, self.names)

    def slice(self, start: int, stop: int) -> Examples:
        """Return the examples from one position up to another, without a copy."""
        return Examples(self.table.slice(start, stop - start), self.rows[start:stop], self.files, self.names)

    def values(self, column: str) -> Iterator[Any]:
        """Yield the values of a column as Python objects, of which few are made at a time."""
        for start in range(0, len(self), _ROWS_TOGETHER):
            yield from self.table.column(column).slice(start, _ROWS_TOGETHER).to_pylist()

    def where(self, row: int) -> str:
        """Return the place of the example at position `row`, in the user's terms: `data/train.jsonl:40`."""
        file, original = self.source(row)
        return file.where(original)

    def source(self, row: int) -> tuple[SourceFile, int]:
        """Return the file of the example at position `row`, and its row number there."""
        original = int(self.rows[row])
        for file in self.files:
            if original < file.num_rows:
                return file, original
            original -= file.num_rows
        raise IndexError(f"row {row} lies in none of the files")

    def file_numbers(self) -> Indices:
        """Return the position among `files` of each example's file; shape [len]."""
        ends = np.cumsum([file.num_rows for file in self.files])
        return np.searchsorted(ends, self.rows, side="right")

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 of column names, types and values in order, whatever the file format and the chunking."""
        digest = hashlib.sha256()
        for name in sorted(self.table.column_names):
            column = self.table.column(name)
            _add(digest, f"{name}\0{column.type}\0{len(column)}\0".encode())
            _add_values(digest, column)
        return digest.hexdigest()


def _add(digest: hashlib._Hash, data: bytes | memoryview) -> None:
    # The length comes first, so that different sequences of parts have different hashes.
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _add_values(digest: hashlib._Hash, column: pa.ChunkedArray) -> None:
    """Hash lengths and contents instead of Arrow's buffers, which depend on offsets and on values under nulls."""
    _add(digest, column.is_valid().combine_chunks().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_struct(column.type) and column.type.get_field_index("digest") >= 0:
        _add_values(digest, pc.struct_field(column, "digest"))
    elif pa.types.is_list(column.type):
        _add(digest, _as_bytes(pc.list_value_length(column).cast(pa.int64()), 0))
        _add_values(digest, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        _add(digest, _as_bytes(pc.binary_length(column).cast(pa.int64()), 0))
        texts = pc.fill_null(column, "").cast(pa.large_string())
        array = pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.large_string())
        offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
        contents = array.buffers()[2]
        _add(digest, memoryview(contents)[offsets[0] : offsets[-1]] if contents is not None and len(array) else b"")
    elif pa.types.is_primitive(column.type):
        _add(digest, _as_bytes(column, 0))
    else:
        _add(digest, repr(column.to_pylist()).encode("utf-8", "surrogatepass"))


def _as_bytes(column: pa.ChunkedArray, null: int) -> bytes:
    data: bytes = pc.fill_null(column, null).to_numpy().tobytes()
    return data
