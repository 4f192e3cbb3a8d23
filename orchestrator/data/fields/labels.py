"""Class names and targets: what the model's outputs mean, and the labels as arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import Examples, Indices
from orchestrator.data.fields.label_columns import (
    NUMBER,
    WHOLE,
    flat_labels,
    is_multi_hot,
    name_codes,
    name_places,
    owners,
    repeats_items,
    text_to_float,
    unify_numbers,
    with_items,
)
from orchestrator.data.messages import NUM_SHOWN, show_names, show_some, show_value
from orchestrator.errors import DataError, Problem, nearest

_INTEGER = re.compile(r"-?\d+")


def find_label_names(splits: Mapping[str, Examples], column: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names, in the order of the model's outputs; for single labels and for lists of labels.

    They are those `given` in the recipe; else those that the data declare; else the numbers of the places of multi-hot
    lists; else the distinct labels of all splits, sorted as text, or as numbers where all are whole numbers.

    Raises:
        DataError: a name given twice, splits that number their classes differently, labels with fractions, multi-hot
            lists beside others.
    """
    if given is not None:
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise DataError(Problem(f"label names stand twice: {show_names(twice)}", remedy="name each class once"))
        return tuple(given)
    lists = list(dict.fromkeys(split.names[column] for split in splits.values() if column in split.names))
    if not lists and (places := count_places(splits, column)):
        return tuple(map(str, range(places)))
    texts: set[str] = set()
    # Text first: the numbers of other splits are named as text of the same value is, such as 1 as "1.0".
    for examples in sorted(splits.values(), key=lambda examples: not _holds_text(examples, column)):
        texts.update(label_texts(examples, column, () if _holds_text(examples, column) else texts))
    declared = tuple(dict.fromkeys(chain.from_iterable(lists)))
    if declared and any(_holds_integers(examples, column) for examples in splits.values()):
        if len(lists) > 1:
            what = f"{' and '.join(splits)} number their classes differently: their lists of class names differ"
            raise DataError(Problem(what, remedy="write the labels as text"))
        return declared
    # A list of which no label is a member is about something else.
    if texts.intersection(declared):
        return declared
    return tuple(sorted(sorted(texts), key=int if all(map(_INTEGER.fullmatch, texts)) else None))


def declares_names(splits: Mapping[str, Examples], column: str, given: Sequence[str] | None) -> bool:
    """Whether the recipe (`given`) or the data name the classes, so that whole numbers are positions among the names.

    Where they do not, a class is named after its number: 2 is "2", whether or not there is a 0 and a 1.
    """
    return given is not None or any(column in examples.names for examples in splits.values())


def count_places(splits: Mapping[str, Examples], column: str) -> int | None:
    """Return the number of labels where each row is multi-hot: a list with a 0 or 1 for every label; else None.

    Raises:
        DataError: the lists of *train* can be nothing else, but those of another split are something else.
    """
    columns = {name: examples.table.column(column) for name, examples in splits.items() if len(examples)}
    first = next(iter(columns.values()), None)
    if first is None or not pa.types.is_list(first.type) or not is_multi_hot(first):
        return None
    places: int = pc.unique(pc.list_value_length(first)).drop_null()[0].as_py()
    others = [name for name, values in columns.items() if not is_places(values, places)]
    if not others:
        return places
    if repeats_items(first):
        what = f"the labels of {next(iter(columns))} are lists of {places} numbers that are 0 or 1, one for each "
        what += f"label; those of {' and '.join(others)} are not"
        where = splits[others[0]].where(0)
        raise DataError(Problem(what, where, "write the labels of all splits in the same way"))
    return None


def name_labels(examples: Examples, column: str, names: Sequence[str], are_codes: bool) -> Examples:
    """Return the same examples with the names of classes as their labels: text, or lists of text.

    Text that is no name stays as it is. Numbers become the name of the same value, so that 1 and 1.0 are "1".

    Args:
        are_codes: whole numbers are positions in `names`; see `declares_names`. Where no name is a number, they are
            nothing else anyway.

    Raises:
        DataError: labels with fractions that are no names, positions that have no name.
    """
    values = examples.table.column(column)
    if pa.types.is_list(values.type) and is_multi_hot(values, len(names)):
        return _with_labels(examples, column, name_places(values, names))
    flat = flat_labels(values)
    if pa.types.is_string(flat.type) and not set(pc.unique(flat).to_pylist()).intersection(names):
        flat = unify_numbers(flat, "classes")
    if pa.types.is_integer(flat.type) and (are_codes or not any(re.fullmatch(NUMBER, name) for name in names)):
        return _with_labels(examples, column, name_codes(with_items(values, flat), names, examples.where))
    return _with_labels(examples, column, with_items(values, _match(flat, names, examples, column)))


def label_texts(examples: Examples, column: str, names: Collection[str] = ()) -> list[str]:
    """Return the distinct labels of a split as text, without nulls; list columns are taken apart.

    Args:
        names: numbers become the name of the same value where there is one.

    Raises:
        DataError: labels are numbers with fractions that are no names.
    """
    flat = flat_labels(examples.table.column(column))
    distinct = pc.unique(_match(flat, names, examples, column))
    return [text for text in distinct.to_pylist() if text is not None]


def encode_labels(
    examples: Examples, column: str, names: Sequence[str], are_codes: bool = False
) -> npt.NDArray[np.int64 | np.float32]:
    """Return labels as class numbers (int64, shape [n]); lists of labels as multi-hot rows (float32, [n, num_labels]).

    Args:
        are_codes: as for `name_labels`.

    Raises:
        DataError: null labels, and labels that `names` lacks or positions beyond it, with their places.
    """
    labels = name_labels(examples, column, names, are_codes).table.column(column)
    is_list = pa.types.is_list(labels.type)
    flat, rows = flat_labels(labels), owners(labels)
    found = pc.index_in(flat, pa.array(names, pa.string()), skip_nulls=True)
    codes: Indices = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    bad = np.flatnonzero(codes < 0)
    nulls = np.flatnonzero(labels.is_null().to_numpy()) if is_list else np.zeros(0, np.int64)
    if len(bad) or len(nulls):
        faults = [(int(rows[item]), flat[int(item)].as_py()) for item in bad]
        raise DataError(_label_problems(examples, [*faults, *((int(row), None) for row in nulls)], names))
    if not is_list:
        return codes
    hot = np.zeros((len(examples), len(names)), dtype=np.float32)
    hot[rows, codes] = 1.0
    return hot


def encode_targets(examples: Examples, column: str) -> npt.NDArray[np.float32]:
    """Return regression targets, float32, shape [n]. Text is read as a number, since CSV has no others.

    Null, NaN, infinity and what is no number become NaN; `check_regression_targets` finds them beforehand.
    """
    values = examples.table.column(column)
    if pa.types.is_list(values.type):
        return np.full(len(examples), np.nan, dtype=np.float32)
    if pa.types.is_string(values.type):
        values = text_to_float(values)
    numbers = values.cast(pa.float64()).to_numpy()
    with np.errstate(over="ignore"):
        targets = numbers.astype(np.float32)
    return np.where(np.isfinite(targets), targets, np.float32(np.nan))


def is_places(values: pa.ChunkedArray, places: int) -> bool:
    """Whether each list has so many places that hold 0 or 1; lists that are all missing may be anything."""
    return values.null_count == len(values) or (pa.types.is_list(values.type) and is_multi_hot(values, places))


def _holds_integers(examples: Examples, column: str) -> bool:
    return bool(pa.types.is_integer(flat_labels(examples.table.column(column)).type))


def _holds_text(examples: Examples, column: str) -> bool:
    return bool(pa.types.is_string(flat_labels(examples.table.column(column)).type))


def _with_labels(examples: Examples, column: str, values: pa.ChunkedArray) -> Examples:
    position = examples.table.column_names.index(column)
    return replace(examples, table=examples.table.set_column(position, column, values))


def _match(flat: pa.ChunkedArray, names: Collection[str], examples: Examples, column: str) -> pa.ChunkedArray:
    """Return labels as text; numbers, also whole ones stored as text, as the name of the same value, if any."""
    flat = unify_numbers(flat, "classes") if pa.types.is_floating(flat.type) else flat
    by_value: dict[float, list[str]] = {}
    for name in names:
        if re.fullmatch(NUMBER if pa.types.is_floating(flat.type) else WHOLE, name):
            by_value.setdefault(float(name), []).append(name)
    if not len(flat) or pa.types.is_null(flat.type):
        return flat.cast(pa.string())
    encoded = flat.combine_chunks().dictionary_encode()
    texts = []
    for value in encoded.dictionary.to_pylist():
        is_number = not isinstance(value, str) or (value not in names and re.fullmatch(WHOLE, value))
        same = by_value.get(float(value), []) if is_number else []
        if len(same) != 1 and isinstance(value, float) and math.isfinite(value):
            _refuse_fractions(flat, examples, column)
        is_missing = isinstance(value, float) and not math.isfinite(value)
        texts.append(None if is_missing else same[0] if len(same) == 1 else str(value))
    return pa.chunked_array([pa.array(texts, pa.string()).take(encoded.indices)])


def _refuse_fractions(flat: pa.ChunkedArray, examples: Examples, column: str) -> None:
    fractions = np.flatnonzero(pc.fill_null(pc.not_equal(flat, pc.floor(flat)), False).to_numpy())
    item = int(fractions[0]) if len(fractions) else 0
    row = int(owners(examples.table.column(column))[item])
    what = f"{column} is {flat[item].as_py()} (one of {max(1, len(fractions))} such), which is no class"
    raise DataError(Problem(what, examples.where(row), "write classes as text or whole numbers"))


def _label_problems(
    examples: Examples, faults: Sequence[tuple[int, str | None]], names: Sequence[str]
) -> list[Problem]:
    """Return one problem for the missing labels, and one for each unknown label (the three most frequent).

    Each fault is a row and its label, None for a missing one.
    """
    problems = []
    missing = sorted({row for row, text in faults if text is None})
    if missing:
        shown = show_some([examples.where(row) for row in missing[:NUM_SHOWN]], len(missing))
        what = f"the label is missing in {len(missing)} of {len(examples)} rows: {shown}"
        problems.append(Problem(what, examples.where(missing[0]), "label these rows or remove them"))
    rows_of: dict[str, list[int]] = {}
    for row, text in faults:
        if text is not None:
            rows_of.setdefault(text, []).append(row)
    for text in sorted(rows_of, key=lambda text: -len(rows_of[text]))[:NUM_SHOWN]:
        problems.append(_unknown_label(examples, text, rows_of[text], names))
    if len(rows_of) > NUM_SHOWN:
        problems.append(Problem(f"{len(rows_of) - NUM_SHOWN} more labels are not among the classes"))
    return problems


def _unknown_label(examples: Examples, text: str, rows: Sequence[int], names: Sequence[str]) -> Problem:
    where = examples.where(rows[0])
    count = f"in {len(rows)} of {len(examples)} rows"
    close = nearest(text, names)
    what = f"the label {show_value(text)} ({count}) is not among the {len(names)} classes: {show_names(names)}"
    remedy = f"write {show_value(close)} in its place" if close else "correct it, or add it to the list of label names"
    return Problem(what, where, remedy)
