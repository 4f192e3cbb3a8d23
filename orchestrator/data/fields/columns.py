"""The task's columns, and finding them among the data's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import SourceFile
from orchestrator.data.fields.images import convert_images
from orchestrator.data.fields.label_columns import Numbers, unify_numbers
from orchestrator.data.fields.turns import convert_turns, is_list
from orchestrator.data.messages import show_name, show_names
from orchestrator.errors import DataError, Problem, nearest
from orchestrator.recipe.origin import Origin

NEEDS = {
    "text": "text",
    "label": "text, numbers, or lists of text, of whole numbers or of true and false",
    "turns": "text, or lists of objects such as {role, content}",
}


@dataclass(frozen=True)
class Column:
    """A column that a task reads, by the task's own name for it."""

    name: str
    kind: Literal["text", "label", "image", "turns"]
    """`text` holds text; `label` holds text, whole numbers, numbers, or lists of text or of whole numbers;
    `image` holds pictures, or their paths; `turns` holds text, or conversations: lists of objects, one a turn."""
    required: bool = True
    aliases: tuple[str, ...] = ()
    """Names that it goes by in common data sets, tried in this order when the recipe maps none."""
    may_vary: bool = False
    """Some files may have it and others not: their rows hold nulls."""
    numbers: Numbers = "any"
    """How the numbers of a `label` are read."""


def check_mapping(columns: Sequence[Column], mapping: Mapping[str, str], origin: Origin) -> list[Problem]:
    """What is wrong with `target.columns` whatever the data: keys the task does not know, a column named twice."""
    known = [column.name for column in columns]
    problems = []
    for key in mapping:
        if key not in known:
            close = nearest(key, known)
            what = f"{show_name(key)} is not a column of this task, which has {show_names(known)}"
            remedy = f"write {close} in place of {show_name(key)}" if close else "name one of the task's columns"
            problems.append(Problem(what, origin.where(f"target.columns.{key}"), remedy))
    for source in dict.fromkeys(mapping.values()):
        keys = [key for key in mapping if mapping[key] == source]
        if len(keys) > 1:
            what = f"the data's column {show_name(source)} is used for {' and '.join(map(show_name, keys))}"
            where = origin.where(f"target.columns.{keys[-1]}")
            problems.append(Problem(what, where, "give each of the task's columns a data column of its own"))
    return problems


def match_columns(
    found: Sequence[str], columns: Sequence[Column], mapping: Mapping[str, str], place: str
) -> tuple[dict[str, str], list[Problem]]:
    """The data's column for each of the task's: as mapped, else by its own name, else by an alias.

    A column that is optional and not mapped may be absent, and so may one that varies; `place` is the file, for the
    problems.
    """
    matched: dict[str, str] = {}
    problems = []
    taken = {mapping[column.name] for column in columns if column.name in mapping}
    free = [name for name in found if name not in taken]
    for column in columns:
        if column.name in mapping:
            wanted = [mapping[column.name]] if mapping[column.name] in found else []
        else:
            wanted = [name for name in (column.name, *column.aliases) if name in free]
        if wanted:
            matched[column.name] = wanted[0]
        elif column.required or (column.name in mapping and not column.may_vary):
            problems.append(missing_column(column, mapping, found, place))
    if not matched and not problems:
        known = [column.name for column in columns]
        what = f"there is none of the columns {show_names(known)}; the columns are {show_names(found)}"
        remedy = f"map them in the recipe, `target.columns: {{{known[0]}: THE_DATA_COLUMN}}`"
        problems.append(Problem(what, place, remedy))
    return matched, problems


def missing_column(column: Column, mapping: Mapping[str, str], found: Sequence[str], place: str) -> Problem:
    wanted = mapping.get(column.name, column.name)
    close = nearest(wanted, found)
    what = f"there is no column {show_name(wanted)}; the columns are {show_names(found)}"
    target = show_name(close) if close else "THE_DATA_COLUMN"
    remedy = f"map it in the recipe, `target.columns: {{{column.name}: {target}}}`, or on the command line"
    return Problem(what, place, f"{remedy}: `target.columns.{column.name}={target}`")


def convert_column(values: pa.ChunkedArray, column: Column, source: str, file: SourceFile) -> pa.ChunkedArray:
    """The column in one of the types that `Examples` holds, whatever Arrow type the file had.

    Raises:
        DataError: the type does not suit the column's kind, or paths of pictures lead to none.
    """
    if column.kind == "image":
        return convert_images(values, column.name, source, file)
    if column.kind == "turns" and (found := convert_turns(values)) is not None:
        return found
    wanted = plain_type(values.type)
    if column.kind == "label" and is_list(values.type) and pa.types.is_boolean(values.type.value_type):
        wanted = pa.list_(pa.int64())  # As places of multi-hot lists.
    fits = wanted is not None and (column.kind == "label" or wanted == pa.string())
    if not fits:
        needs = NEEDS[column.kind]
        what = f"the column {show_name(source)} holds {describe_type(values.type)}; {column.name} must be {needs}"
        remedy = f"turn its values into {needs}, or map {column.name} to another column in `target.columns`"
        raise DataError(Problem(what, file.place, remedy))
    try:
        converted = values.cast(wanted)
    except pa.ArrowInvalid as error:
        what = f"the values of column {show_name(source)} cannot be read: {show_name(str(error))}"
        raise DataError(Problem(what, file.place, "write this column anew")) from error
    if wanted == pa.list_(pa.float64()):
        converted = unify_numbers(converted, "classes")
        if converted.type == wanted:
            what = f"the column {show_name(source)} holds lists of numbers with fractions, which are no labels"
            remedy = f"write lists of text, of whole numbers, or of 0 and 1, or map {column.name} to another column"
            raise DataError(Problem(what, file.place, remedy))
    if column.kind == "label" and wanted == pa.string():
        # CSV has no null: an empty label is a missing one, in every format alike.
        blank = pc.equal(pc.utf8_trim_whitespace(converted), "")
        converted = pc.if_else(blank, pa.scalar(None, pa.string()), converted)
    return converted


def plain_type(type_: pa.DataType) -> pa.DataType | None:
    """The one type that stands for all of its kind, so that formats give the same table; None for what has none."""
    types = pa.types
    if types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if types.is_integer(type_):
        return pa.int64()
    if types.is_floating(type_) or types.is_decimal(type_):
        return pa.float64()
    text_like = types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
    if text_like or types.is_boolean(type_) or types.is_null(type_):
        return pa.string()
    if is_list(type_):
        inner = plain_type(type_.value_type)
        return None if inner is None or types.is_list(inner) else pa.list_(inner)
    return None


def describe_type(type_: pa.DataType) -> str:
    """A column's type in plain words."""
    types = pa.types
    if types.is_dictionary(type_):
        return describe_type(type_.value_type)
    if is_list(type_):
        return f"lists of {describe_type(type_.value_type)}"
    words = {
        "whole numbers": types.is_integer(type_),
        "numbers": types.is_floating(type_) or types.is_decimal(type_),
        "true and false": types.is_boolean(type_),
        "nested objects": types.is_struct(type_) or types.is_map(type_),
        "bytes": types.is_binary(type_) or types.is_large_binary(type_),
        "text": plain_type(type_) == pa.string(),
    }
    return next((word for word, fits in words.items() if fits), f"values of the type {type_}")
