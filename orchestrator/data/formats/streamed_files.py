"""The formats that can be read in pieces: JSON Lines by stretches of bytes, Parquet by row groups, Arrow by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data.examples import LinesAt, line_at
from orchestrator.data.formats.arrow_files import damaged, map_arrow, open_parquet, raw_table
from orchestrator.data.formats.json_files import LineReader, raw_rows
from orchestrator.data.formats.raw import BYTE_ORDER_MARK, RawFile, read_bytes, refuse_utf16
from orchestrator.data.formats.readers import missing_path
from orchestrator.data.streaming import MAX_TURN, NUM_TOGETHER, Chunk, Streamed
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path

_MAX_BYTES = 2**20  # of a piece of JSON Lines

ReadTables = Callable[[int, int], Iterator[pa.Table]]
"""The rows of a piece, up to so many at a time."""


class StreamedLines(Streamed):
    """A file of one JSON object a line. Rows of faulty lines are None, and told by `raw`."""

    def __init__(self, path: Path, wanted: frozenset[str], names: dict[str, None]) -> None:
        """
        Args:
            wanted: the columns that are kept.
            names: takes up the columns that are met; files that belong together share it, since few rows of each may
                be read, and keys may be left out in some.
        """
        self.place = show_path(path)
        refuse_utf16(read_bytes(path, len(BYTE_ORDER_MARK)), self.place)
        size = path.stat().st_size
        step = min(_MAX_BYTES, -(-size // NUM_TOGETHER))
        self._edges = [*range(0, size, step), size]
        self.sizes = np.diff(self._edges).tolist()
        self._path, self._wanted, self._names = path, wanted, names
        self._reader = LineReader()

    def read(self, piece: int, turn: int) -> Iterator[Chunk]:
        starts: list[int] = []
        rows: list[dict[str, Any] | None] = []
        for position, line in self._lines(*self._edges[piece : piece + 2]):
            row = self._reader.read_bytes(line, position)
            starts.append(position)
            rows.append(None if row is None else {name: row[name] for name in row if name in self._wanted})
            self._names.update(dict.fromkeys(row or ()))
            if len(rows) == turn:
                yield np.array(starts, np.int64), rows
                starts, rows = [], []
        if rows:
            yield np.array(starts, np.int64), rows

    def _lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Return the lines that begin between two bytes, and where; blank ones are passed over."""
        with self._path.open("rb") as file:
            if start:
                # Only after a line's end does another begin, and that may be the byte before.
                file.seek(start - 1)
                file.readline(stop - start + 1)
            position = file.tell()
            while position < stop and (line := file.readline()):
                own = (line if position else line.removeprefix(BYTE_ORDER_MARK)).removesuffix(b"\n")
                if own and not own.isspace():
                    yield position, own
                position += len(line)

    def raw(self, chunks: Sequence[Chunk]) -> RawFile:
        self._reader.check(self._path, partial(line_at, self._path))
        starts = np.concatenate([np.zeros(0, np.int64), *(positions for positions, _ in chunks)])
        rows = [row for _, own in chunks for row in own]
        raw = raw_rows(self._path, rows, LinesAt(self._path, starts), self._names)
        return replace(raw, folder=self._path.parent)


class StreamedTables(Streamed):
    """Rows that come as Arrow tables, each piece with the number of its first row."""

    def __init__(
        self, place: str, schema: pa.Schema | None, firsts: Sequence[int], sizes: Sequence[float], read: ReadTables
    ) -> None:
        """
        Args:
            schema: of all columns; None where only the rows tell it.
        """
        self.place = place
        self.sizes = sizes
        self._schema, self._firsts, self._read = schema, firsts, read

    def read(self, piece: int, turn: int) -> Iterator[Chunk]:
        number = self._firsts[piece]
        for table in self._read(piece, turn):
            if len(table):
                yield np.arange(number, number + len(table)), table
            number += len(table)

    def raw(self, chunks: Sequence[Chunk]) -> RawFile:
        numbers = np.concatenate([np.zeros(0, np.int64), *(positions for positions, _ in chunks)])
        # Pieces of JSON on the Hub may differ in what they are taken for: whole numbers, numbers, nothing.
        table = pa.concat_tables([rows for _, rows in chunks], promote_options="permissive") if chunks else pa.table({})
        raw = raw_table(self.place, self._schema or table.schema, len(table), table.column)
        return replace(raw, row_numbers=numbers)


def stream_parquet(path: Path, wanted: frozenset[str], _names: dict[str, None]) -> StreamedTables:
    """Return a stream of Parquet, in which a row group is a piece."""
    with open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    firsts = np.cumsum([0, *(group.num_rows for group in groups)])[:-1].tolist()

    def read(piece: int, turn: int) -> Iterator[pa.Table]:
        # So neither a row group nor a column of it is in memory as a whole.
        file = open_parquet(path, metadata=metadata, memory_map=True, pre_buffer=False)
        with file, _telling_damage(path, "Parquet"):
            for batch in file.iter_batches(turn, [piece], _choose(schema, wanted)):
                yield pa.Table.from_batches([batch])

    sizes = [group.total_byte_size for group in groups]
    return StreamedTables(show_path(path), schema, firsts, sizes, read)


def stream_arrow(path: Path, wanted: frozenset[str], _names: dict[str, None]) -> StreamedTables:
    """Return a stream of Arrow's formats, memory-mapped, in which any rows can be a piece."""
    table = map_arrow(path)
    chosen = table.select(_choose(table.schema, wanted))
    edges = [*range(0, len(table), min(MAX_TURN, -(-len(table) // NUM_TOGETHER)) or 1), len(table)]

    def read(piece: int, turn: int) -> Iterator[pa.Table]:
        start, stop = edges[piece : piece + 2]
        for first in range(start, stop, turn):
            part = chosen.slice(first, min(turn, stop - first))
            with _telling_damage(path, "Arrow"):
                part.validate(full=True)
            yield part

    bytes_per_row = path.stat().st_size / max(1, len(table))
    sizes = [(stop - start) * bytes_per_row for start, stop in pairwise(edges)]
    return StreamedTables(show_path(path), table.schema, edges[:-1], sizes, read)


STREAMERS: Mapping[str, Callable[[Path, frozenset[str], dict[str, None]], Streamed]] = MappingProxyType(
    {".jsonl": StreamedLines, ".parquet": stream_parquet, ".arrow": stream_arrow}
)


def stream_file(path: Path, wanted: frozenset[str], names: dict[str, None]) -> Streamed:
    """Open a data file to be read in pieces; the arguments are those of `StreamedLines`.

    Raises:
        DataError: the file is missing, empty or damaged, or of a format that has no pieces.
    """
    if not path.exists():
        raise DataError(missing_path(path))
    streamer = STREAMERS.get(path.suffix.lower())
    if streamer is None:
        kind = "a folder of pictures" if path.is_dir() else path.suffix or "a file without suffix"
        what = f"target.data.stream is true, and {kind} cannot be read in pieces; {', '.join(STREAMERS)} can"
        raise DataError(Problem(what, show_path(path), "convert it to one of them, or set target.data.stream to false"))
    return streamer(path, wanted, names)


def _choose(schema: pa.Schema, wanted: frozenset[str]) -> list[str]:
    """Return the wanted columns; where there are none, the first one, so that the number of rows is known."""
    return [name for name in schema.names if name in wanted] or schema.names[:1]


@contextmanager
def _telling_damage(path: Path, format_: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(damaged(path, format_, error)) from None
