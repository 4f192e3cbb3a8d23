"""A tag for each word of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.column_types import is_list, plain_type
from orchestrator.data.fields.base import Field, Part
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.messages import show_value
from orchestrator.errors import DataError, Problem


@dataclass(frozen=True)
class TagsField(Field):
    """The tag of each word, held as lists of strings; or of whole numbers where nothing names them."""

    names: tuple[str, ...] | None = None
    """Names of tags 0, 1, ..., which go before those that files declare."""

    needs = "lists of text or of whole numbers, one a word"
    plural = "tags"
    is_target = True

    def wanted_type(self, type_: pa.DataType) -> pa.DataType | None:
        plain = plain_type(type_) if is_list(type_) else None
        return plain if plain in (pa.list_(pa.string()), pa.list_(pa.int64())) else None

    def read(self, raw: RawFile, name: str, source: str) -> Part:
        """Return the column of one file, with names in place of numbers where there are any."""
        values = self.convert(raw.fetch(source), name, source, raw.source)
        names = self.names or raw.label_names.get(source)
        if names is None or values.type == pa.list_(pa.string()):
            return Part(raw, values, names)
        return Part(raw, name_tags(values, names, name, raw), names)

    def unify(self, parts: Sequence[Part]) -> list[pa.ChunkedArray]:
        """Read numbers of files that declare no names as those of the other files, which agree on theirs."""
        declared = {part.names for part in parts if part.names is not None}
        if len(declared) != 1:
            return super().unify(parts)
        (names,) = declared
        numbers = pa.list_(pa.int64())
        return [
            name_tags(part.values, names, "tags", part.raw) if part.values.type == numbers else part.values
            for part in parts
        ]

    def show(self, value: Any) -> str:
        return show_value(" ".join(map(str, value)))


def name_tags(values: pa.ChunkedArray, names: Sequence[str], column: str, raw: RawFile) -> pa.ChunkedArray:
    """Return lists of whole numbers as lists of the names at those positions.

    Raises:
        DataError: numbers that have no name.
    """
    lists = values.combine_chunks()
    flat = pc.list_flatten(lists)
    numbers = pc.fill_null(flat, 0).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(bad):
        row = int(pc.list_parent_indices(lists)[int(bad[0])].as_py())
        what = f"{column} holds {numbers[bad[0]]} (one of {len(bad)} such), but {len(names)} tags are numbered 0 to "
        what += f"{len(names) - 1}"
        remedy = "number the tags from 0, or name every one in target.options.label_names"
        raise DataError(Problem(what, raw.source.where(row), remedy))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    named = pc.take(pa.array(names, pa.string()), flat)
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, named, mask=lists.is_null())])
