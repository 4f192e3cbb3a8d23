"""CSV and TSV with a header line. All values are text: nothing is guessed to be a number, a date or a null."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from orchestrator.data.formats.raw import RawFile, bad_lines, read_utf8
from orchestrator.data.messages import show_name
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path


def read_csv(path: Path) -> RawFile:
    """Read comma-separated values, quoted as in RFC 4180 (a quoted value may run over several lines).

    Raises:
        DataError: wrong quoting, rows with more or fewer fields than the header, a column name that stands twice.
    """
    return _read(path, read_utf8(path), ",", csv.QUOTE_MINIMAL)


def read_tsv(path: Path) -> RawFile:
    """Read tab-separated values. A file whose quotes do not follow CSV's rules is read with quotes as plain characters.

    Raises:
        DataError: as `read_csv`.
    """
    text = read_utf8(path)
    try:
        return _read(path, text, "\t", csv.QUOTE_MINIMAL)
    except DataError:
        return _read(path, text, "\t", csv.QUOTE_NONE)


def _read(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> RawFile:
    place = show_path(path)
    rows: list[list[str]] = []
    lines: list[int] = []
    with _unlimited_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        end = 0
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(end + 1)
                end = reader.line_num
        except csv.Error as error:
            what = f"the quotes of the row that begins here are wrong: {error}"
            remedy = 'double each quote inside a quoted value: "She said ""no"""'
            raise DataError(Problem(what, f"{place}:{end + 1}", remedy)) from None
    if not rows:
        raise DataError(Problem("the file holds blank lines only", place, "write the file anew, with a header line"))
    header = tuple(rows.pop(0))
    header_line = lines.pop(0)
    problems = _check_header(header, f"{place}:{header_line}")
    ragged = [(line, f"{len(row)}") for line, row in zip(lines, rows, strict=True) if len(row) != len(header)]
    if ragged:
        kind = f"with another number of fields than the header's {len(header)}"
        problems.append(bad_lines(path, kind, ragged, "put values that hold the separator or line ends in quotes"))
    if problems:
        raise DataError(problems)

    def fetch(name: str) -> pa.ChunkedArray:
        position = header.index(name)
        return pa.chunked_array([pa.array([row[position] for row in rows], pa.string())])

    return RawFile(place, header, len(rows), fetch, np.array(lines, dtype=np.int64))


def _check_header(header: tuple[str, ...], where: str) -> list[Problem]:
    problems = []
    # A column without a name is an index that pandas wrote; nobody asks for it.
    twice = [show_name(name) for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        what = f"the header has {', '.join(twice)} more than once"
        problems.append(Problem(what, where, "give each column a name of its own"))
    if len(header) == 1:
        marks = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
        found = next((word for mark, word in marks.items() if mark in header[0]), None)
        if found:
            what = f"the file is separated by {found}: its whole header reads as one column"
            problems.append(Problem(what, where, "separate the values by commas (.csv) or by tabs (.tsv)"))
    return problems


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a field, which is global, and restore it."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
