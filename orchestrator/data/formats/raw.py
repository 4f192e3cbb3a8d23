"""A data file as read, before its columns are chosen and typed; and the checks that all text formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from orchestrator.data.examples import LinesAt, Rows, SourceFile
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path

NUM_BAD_SHOWN = 5
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, eq=False)
class RawFile:
    """Only the columns that a task asks for are fetched, so what is odd in the others does not matter."""

    place: str
    """As shown in messages: `data/train.jsonl`, `nyu-mll/glue train`."""
    names: tuple[str, ...]
    """Column names, each once."""
    num_rows: int
    fetch: Callable[[str], pa.ChunkedArray]
    """The column of that name, in the file's own type. Raises DataError."""
    lines: Rows | LinesAt | None = None
    """Line (from 1) on which each row begins, for formats that have lines."""
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names that the file brings along, by column."""
    labels_are_names: bool = False
    """Labels are names and stay as they are written, also where they could be read as numbers."""
    row_places: tuple[str, ...] | None = None
    """The place of each row, for data that lie in a file each."""
    folder: Path | None = None
    """What paths in the data are relative to, and may not lead out of."""
    part: int = 0
    """Which entry of the recipe's list it belongs to."""
    count: int | None = None
    """How many examples of that entry are drawn; None for all."""
    row_numbers: Rows | None = None
    """The number of each row in the file, where only some of its rows were read."""

    @property
    def source(self) -> SourceFile:
        """Return the part of the file's description that is kept once its columns are read."""
        return SourceFile(
            place=self.place,
            num_rows=self.num_rows,
            lines=self.lines,
            row_places=self.row_places,
            folder=self.folder,
            part=self.part,
            count=self.count,
            row_numbers=self.row_numbers,
        )


def read_utf8(path: Path) -> str:
    """Return the text of a file without its byte-order mark.

    Raises:
        DataError: the file is empty, unreadable, not UTF-8, or holds NUL bytes.
    """
    place = show_path(path)
    data = read_bytes(path)
    refuse_utf16(data, place)
    data = data.removeprefix(BYTE_ORDER_MARK)
    nul = data.find(b"\0")
    if nul >= 0:
        what = f"the file holds {data.count(0)} NUL bytes, so it is damaged or not text"
        raise DataError(Problem(what, f"{place}:{_line_of(data, nul)}", "remove them, or write the file anew"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        start_of_line = data.rfind(b"\n", 0, error.start) + 1
        what = f"the file is not UTF-8: byte {error.start - start_of_line + 1} of this line is {data[error.start]:#04x}"
        where = f"{place}:{_line_of(data, error.start)}"
        raise DataError(Problem(what, where, "save the file as UTF-8 (it may be Latin-1 or Windows-1252)")) from None


def refuse_utf16(beginning: bytes, place: str) -> None:
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(Problem("the file is UTF-16, not UTF-8", place, "save it as UTF-8"))


def read_bytes(path: Path, count: int = -1) -> bytes:
    """Return the contents of a file that has some, or the first `count` bytes of them."""
    place = show_path(path)
    try:
        with path.open("rb") as file:
            data = file.read(count)
    except OSError as error:
        raise DataError(Problem(f"the file cannot be read: {error.strerror}", place, "make it readable")) from error
    if not data:
        raise DataError(Problem("the file is empty (0 bytes)", place, "write the file anew"))
    return data


def bad_lines(
    path: Path, kind: str, faults: Sequence[tuple[int, str]], remedy: str, line_of: Callable[[int], int] = int
) -> Problem:
    """Return one problem for all faulty lines of a file, the first five shown. Each fault is a line and what it has.

    Args:
        line_of: turns what the faults have for a line into one.
    """
    lines = [line_of(number) for number, _ in faults[:NUM_BAD_SHOWN]]
    shown = "; ".join(f"line {line}: {fault}" for line, (_, fault) in zip(lines, faults, strict=False))
    more = len(faults) - NUM_BAD_SHOWN
    count = f"{len(faults)} line{'s' if len(faults) > 1 else ''}"
    what = f"{count} {kind} ({shown}{f'; and {more} more' if more > 0 else ''})"
    return Problem(what, f"{show_path(path)}:{lines[0]}", remedy)


def _line_of(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
