"""Class names and targets: what the model's outputs mean, and the labels as arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import Examples, Rows
from orchestrator.data.messages import NUM_SHOWN, show_names, show_some, show_value
from orchestrator.errors import DataError, Problem, nearest

_INTEGER = re.compile(r"-?\d+")
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


def find_label_names(splits: Mapping[str, Examples], column: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The class names, in the order of the model's outputs; for single labels and for lists of labels.

    They are those `given` in the recipe; else those that the data bring along; else the distinct labels of all splits,
    sorted as text, or as numbers where all are whole numbers.

    Raises:
        DataError: a name given twice, splits that number their classes differently, labels with fractions.
    """
    if given is not None:
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise DataError(Problem(f"label names stand twice: {show_names(twice)}", remedy="name each class once"))
        return tuple(given)
    texts: set[str] = set()
    for examples in splits.values():
        texts.update(label_texts(examples, column))
    lists = list(dict.fromkeys(split.label_names for split in splits.values() if split.label_names is not None))
    declared = tuple(dict.fromkeys(chain.from_iterable(lists)))
    if declared and _are_positions(texts, declared):
        if len(lists) > 1:
            what = f"{' and '.join(splits)} number their classes differently: their lists of class names differ"
            raise DataError(Problem(what, remedy="write the labels as text"))
        return declared
    # A list of which no label is a member is about something else.
    if texts.intersection(declared):
        return declared
    return tuple(sorted(texts, key=int if all(map(_INTEGER.fullmatch, texts)) else None))


def label_texts(examples: Examples, column: str) -> list[str]:
    """The distinct labels of a split as text, without nulls; list columns are taken apart.

    Raises:
        DataError: labels are numbers with fractions.
    """
    return [text for text in _dictionary(_flat(examples, column), examples, column)[0] if text is not None]


def encode_labels(examples: Examples, column: str, names: Sequence[str]) -> npt.NDArray[np.int64 | np.float32]:
    """Labels as class numbers (int64, shape [n]); lists of labels as multi-hot rows (float32, [n, num_labels]).

    Whole numbers are positions in `names`, unless the names themselves are numbers; all else is matched as text.

    Raises:
        DataError: null labels, and labels that `names` lacks or positions beyond it, with their places.
    """
    is_list = pa.types.is_list(examples.table.column(column).type)
    texts, indices = _dictionary(_flat(examples, column), examples, column)
    codes = _codes(texts, names)[indices]
    owners = _owners(examples, column) if is_list else np.arange(len(examples))
    bad = np.flatnonzero(codes < 0)
    nulls = np.flatnonzero(examples.table.column(column).is_null().to_numpy()) if is_list else np.zeros(0, np.int64)
    if len(bad) or len(nulls):
        faults = [(int(row), texts[index]) for row, index in zip(owners[bad], indices[bad], strict=True)]
        raise DataError(_label_problems(examples, [*faults, *((int(row), None) for row in nulls)], names))
    if not is_list:
        return codes
    hot = np.zeros((len(examples), len(names)), dtype=np.float32)
    hot[owners, codes] = 1.0
    return hot


def encode_targets(examples: Examples, column: str) -> npt.NDArray[np.float32]:
    """Regression targets, float32, shape [n]. Text is read as a number, since CSV has no others.

    Null, NaN, infinity and what is no number become NaN; `check_regression_targets` finds them beforehand.
    """
    values = examples.table.column(column)
    if pa.types.is_list(values.type):
        return np.full(len(examples), np.nan, dtype=np.float32)
    if pa.types.is_string(values.type):
        values = pc.if_else(pc.match_substring_regex(values, _NUMBER), pc.utf8_trim_whitespace(values), None)
        # Arrow's parser takes no plus sign.
        values = pc.replace_substring_regex(values, r"^\+", "")
    numbers = values.cast(pa.float64()).to_numpy()
    with np.errstate(over="ignore"):
        targets = numbers.astype(np.float32)
    return np.where(np.isfinite(targets), targets, np.float32(np.nan))


def _flat(examples: Examples, column: str) -> pa.ChunkedArray:
    values = examples.table.column(column)
    return pc.list_flatten(values) if pa.types.is_list(values.type) else values


def _owners(examples: Examples, column: str) -> Rows:
    """The row that each item of a list column belongs to."""
    lengths = pc.fill_null(pc.list_value_length(examples.table.column(column)), 0).to_numpy()
    return np.repeat(np.arange(len(examples)), lengths)


def _dictionary(values: pa.ChunkedArray, examples: Examples, column: str) -> tuple[list[str | None], Rows]:
    """Distinct values as text (None for null), and each value's index among them."""
    if pa.types.is_floating(values.type):
        fractions = np.flatnonzero(pc.fill_null(pc.not_equal(values, pc.floor(values)), False).to_numpy())
        if len(fractions):
            row = int(fractions[0])
            what = f"{column} is {values[row].as_py()} (one of {len(fractions)} such), which is no class"
            raise DataError(Problem(what, examples.where(row), "write classes as text or whole numbers"))
        values = pc.if_else(pc.is_finite(values), values, None).cast(pa.int64())
    if not len(values):
        return [], np.zeros(0, dtype=np.int64)
    encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
    texts = [None if value is None else str(value) for value in encoded.dictionary.to_pylist()]
    return texts, encoded.indices.to_numpy().astype(np.int64)


def _are_positions(texts: Iterable[str], names: Sequence[str]) -> bool:
    if any(map(_INTEGER.fullmatch, names)):
        return False
    return all(map(_INTEGER.fullmatch, texts))


def _codes(texts: Sequence[str | None], names: Sequence[str]) -> Rows:
    """The class number of each distinct text, -1 for none."""
    positions = _are_positions([text for text in texts if text is not None], names)
    valid = {str(number) if positions else name: number for number, name in enumerate(names)}
    return np.array([-1 if text is None else valid.get(text, -1) for text in texts], dtype=np.int64)


def _label_problems(
    examples: Examples, faults: Sequence[tuple[int, str | None]], names: Sequence[str]
) -> list[Problem]:
    """One problem for the missing labels, and one for each unknown label (the three most frequent).

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
    if _are_positions([text], names):
        what = f"the label {text} ({count}) is out of range: {len(names)} classes are numbered 0 to {len(names) - 1}"
        return Problem(what, where, "number the classes from 0, or name every class in the list of label names")
    close = nearest(text, names)
    what = f"the label {show_value(text)} ({count}) is not among the {len(names)} classes: {show_names(names)}"
    remedy = f"write {show_value(close)} in its place" if close else "correct it, or add it to the list of label names"
    return Problem(what, where, remedy)
