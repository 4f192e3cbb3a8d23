"""Labels: a class, several classes, or a number for each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.column_types import is_list, plain_type
from orchestrator.data.examples import SourceFile
from orchestrator.data.fields.base import Field, Part
from orchestrator.data.fields.label_columns import Numbers, declared_labels, flat_labels, unify_numbers
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.messages import show_name
from orchestrator.errors import DataError, Problem


@dataclass(frozen=True)
class LabelField(Field):
    """Labels, held as strings, whole numbers, numbers, or lists of strings or whole numbers.

    What else is wrong with them depends on the task; see `data.checks`.
    """

    numbers: Numbers = "any"
    """How numbers are read."""

    needs = "text, numbers, or lists of text, of whole numbers or of true and false"
    plural = "labels"
    is_target = True

    def wanted_type(self, type_: pa.DataType) -> pa.DataType | None:
        if is_list(type_) and pa.types.is_boolean(type_.value_type):
            return pa.list_(pa.int64())  # As places of multi-hot lists.
        return plain_type(type_)

    def convert(self, values: pa.ChunkedArray, name: str, source: str, file: SourceFile) -> pa.ChunkedArray:
        converted = super().convert(values, name, source, file)
        if converted.type == pa.list_(pa.float64()):
            converted = unify_numbers(converted, "classes")
            if converted.type == pa.list_(pa.float64()):
                what = f"the column {show_name(source)} holds lists of numbers with fractions, which are no labels"
                remedy = f"write lists of text, of whole numbers, or of 0 and 1, or map {name} to another column"
                raise DataError(Problem(what, file.place, remedy))
        if converted.type == pa.string():
            # CSV has no null: an empty label is a missing one, in every format alike.
            blank = pc.equal(pc.utf8_trim_whitespace(converted), "")
            converted = pc.if_else(blank, pa.scalar(None, pa.string()), converted)
        return converted

    def read(self, raw: RawFile, name: str, source: str) -> Part:
        """Return the column of one file, with class names in place of numbers where the file declares any."""
        values = raw.fetch(source)
        names = raw.label_names.get(source)
        converted = self.convert(values, name, source, raw.source)
        if self.numbers == "targets":
            return Part(raw, converted)
        if pa.types.is_dictionary(values.type) and names is None:
            unified = values.unify_dictionaries()
            if unified.num_chunks and converted.type == pa.string() and not pa.types.is_boolean(values.type.value_type):
                names = tuple(name for name in unified.chunk(0).dictionary.to_pylist() if name is not None)
            return Part(raw, converted, names)
        named = None if names is None else declared_labels(converted, names, raw.source.where)
        return Part(raw, converted) if named is None else Part(raw, named, names)

    def unify(self, parts: Sequence[Part]) -> list[pa.ChunkedArray]:
        """Read whole numbers of files that declare no names as those of the other files, which agree on theirs."""
        declared = {part.names for part in parts if part.names is not None}
        if len(declared) != 1:
            return super().unify(parts)
        (names,) = declared
        return [
            declared_labels(part.values, names, part.raw.source.where) or part.values
            if part.names is None and pa.types.is_integer(flat_labels(part.values).type)
            else part.values
            for part in parts
        ]

    def finish(self, values: pa.ChunkedArray, parts: Sequence[Part]) -> pa.ChunkedArray:
        are_names = any(part.names is not None or part.raw.labels_are_names for part in parts)
        return values if are_names else unify_numbers(values, self.numbers)
