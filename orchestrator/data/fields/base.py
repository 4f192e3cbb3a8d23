"""A kind of value that a column of data holds. One file a field: adding a kind of data is adding a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.column_types import describe_type
from orchestrator.data.examples import Examples, SourceFile
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.messages import NUM_SHOWN, show_name, show_some, show_value
from orchestrator.errors import DataError, Problem


@dataclass
class Part:
    """A column as one file of a split holds it."""

    raw: RawFile
    values: pa.ChunkedArray
    names: tuple[str, ...] | None = None
    """Names that the file declares for the values, in the order of their numbers."""


class Field(ABC):
    """Reads, checks, compares, shows and sends the values of a column."""

    needs: ClassVar[str]
    """What the column of a file must hold, for messages."""
    plural: ClassVar[str] = "examples"
    """A word for several values, for messages."""
    is_target: ClassVar[bool] = False
    """Whether the values are to be predicted. Examples can be predicted for without them. Those of any other field are
    predicted from: examples with equal ones stay together when splits are cut."""
    has_letters: ClassVar[bool] = True
    """Whether keys are texts that are nearly the same where they differ in case, punctuation, digits and spaces."""

    names_files: ClassVar[bool] = False
    """Whether values may lie in files of their own, which `paths` returns."""

    @abstractmethod
    def wanted_type(self, type_: pa.DataType) -> pa.DataType | None:
        """Return the type in which `Examples` hold what a file holds in another; None for types that do not fit."""

    def convert(self, values: pa.ChunkedArray, name: str, source: str, file: SourceFile) -> pa.ChunkedArray:
        """Return a column in a type that `Examples` hold, whatever Arrow type the file has.

        Args:
            name: the task's name for the column; `source` is that of the data.

        Raises:
            DataError: the values are of another kind, or cannot be read.
        """
        wanted = self.wanted_type(values.type)
        if wanted is None:
            what = f"the column {show_name(source)} holds {describe_type(values.type)}; {name} must be {self.needs}"
            remedy = f"turn its values into {self.needs}, or map {name} to another column in `target.columns`"
            raise DataError(Problem(what, file.place, remedy))
        try:
            return values.cast(wanted)
        except pa.ArrowInvalid as error:
            what = f"the values of column {show_name(source)} cannot be read: {show_name(str(error))}"
            raise DataError(Problem(what, file.place, "write this column again")) from error

    def read(self, raw: RawFile, name: str, source: str) -> Part:
        """Return the column of one file; raises DataError as `convert` does."""
        return Part(raw, self.convert(raw.fetch(source), name, source, raw.source))

    def unify(self, parts: Sequence[Part]) -> list[pa.ChunkedArray]:
        """Return the values of each file, read as those of the split's other files are."""
        return [part.values for part in parts]

    def finish(self, values: pa.ChunkedArray, parts: Sequence[Part]) -> pa.ChunkedArray:
        """Return the values of a whole split (`unify`'s, one after the other) as they stay."""
        return values

    def open(self, path: Path) -> RawFile | None:
        """Read a path that is no data file but holds values of this field, such as a picture; None for others.

        Raises:
            DataError: a folder that holds none.
        """
        return None

    def check(self, splits: Mapping[str, Examples], column: str) -> list[Problem]:
        """Return what is wrong with the values, whatever the task."""
        return []

    def keys(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return a text for each value, the same for equal ones; null for nulls."""
        return values

    def show(self, value: Any) -> str:
        """Return a value as one short printable line."""
        return show_value(value)

    def mention(self, value: Any) -> str:
        """Return a value for a message that names its place too."""
        return self.show(value)

    def paths(self, values: pa.ChunkedArray) -> list[str | None]:
        """Return the files that values lie in, which travel with the data; None for values that lie in the column."""
        return [None] * len(values)

    def without_content(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return what of the values workers need to name examples: small, and fit to be shown."""
        return values


def group_rows(
    examples: Examples,
    column: str,
    mask: pa.ChunkedArray,
    what: str,
    remedy: str,
    show: Callable[[Any], str] = show_value,
) -> Problem | None:
    """Return one problem for all rows where the mask is true, with up to three of them; None where it never is.

    Args:
        show: returns a value as a line of text.
    """
    rows = np.flatnonzero(pc.fill_null(mask, False).to_numpy())
    if not len(rows):
        return None
    values = examples.table.column(column)
    shown = [_show_row(examples.where(int(row)), values[int(row)].as_py(), show) for row in rows[:NUM_SHOWN]]
    text = f"{column} {what} in {len(rows)} of {len(examples)} rows: {show_some(shown, len(rows))}"
    return Problem(text, examples.where(int(rows[0])), remedy)


def _show_row(where: str, value: Any, show: Callable[[Any], str]) -> str:
    """Return place and value; the place alone where that is the value's own file."""
    if value is None:
        return f"{where} (null)"
    shown = show(value)
    return where if shown == show_value(where) else f"{where} ({shown})"
