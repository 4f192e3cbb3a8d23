"""Label columns as they are read: one type for equal values however they are stored, and names in place of codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import Indices
from orchestrator.data.messages import NUM_SHOWN, show_names, show_value
from orchestrator.errors import DataError, Problem

Numbers = Literal["text", "classes", "any", "targets"]
"""How numbers are read. `any`: numbers stored as text become numbers. `classes`: only whole ones do, because others are
names, such as versions. `text`: none do, because the recipe lists the names. `targets`: as `any`, and codes stay
numbers where the data declare names for them."""

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
# Not 007, +1 or 1e3, which are spellings that a name may have and a number loses; nor what is beyond 64 bits.
WHOLE = r"^\s*-?(0|[1-9]\d{0,17})(\.0*)?\s*$"
_NOT_A_NUMBER = r"^\s*(?i:nan)\s*$"  # As pandas may write what is missing.
_LARGEST_WHOLE = 2.0**53  # Up to here each whole number is a float64 of its own.
_WITHHELD = -1  # The Hub's mark for a label that is kept secret.


def unify_numbers(values: pa.ChunkedArray, numbers: Numbers) -> pa.ChunkedArray:
    """Return numbers in the type that their values ask for: int64 where all are whole, else float64.

    Files of one kind hold 1, of another 1.0, "1" or "1.0". NaN among whole numbers is a missing label. A column that
    holds anything but numbers is returned as it is.
    """
    if pa.types.is_list(values.type):
        return _unify_lists(values)
    if pa.types.is_string(values.type):
        values = _read_texts(values, numbers)
    if pa.types.is_floating(values.type) and _are_whole(values):
        return pc.if_else(pc.is_finite(values), values, None).cast(pa.int64())
    return values


def text_to_float(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text as float64, null where it is no number."""
    plain = pc.if_else(pc.match_substring_regex(values, NUMBER), pc.utf8_trim_whitespace(values), None)
    # Arrow's parser takes no plus sign.
    return pc.replace_substring_regex(plain, r"^\+", "").cast(pa.float64())


def is_multi_hot(values: pa.ChunkedArray, num_labels: int | None = None) -> bool:
    """Whether each list has a place for every label, which holds 0 or 1.

    Text is taken for that only where a list repeats an item, which a list of labels has no reason to do.

    Args:
        num_labels: how many places there must be; None for any number from 2 on, in lists of equal length.
    """
    lengths = pc.unique(pc.list_value_length(values)).drop_null().to_pylist()
    if len(lengths) != 1 or lengths[0] < 2 or num_labels not in (None, lengths[0]):
        return False
    items = set(pc.unique(pc.list_flatten(values)).to_pylist())
    return items <= {0, 1} or (items <= {"0", "1"} and repeats_items(values))


def repeats_items(values: pa.ChunkedArray) -> bool:
    """Whether any list holds an item twice."""
    return any(row is not None and len(set(row)) < len(row) for row in values.to_pylist())


def name_places(values: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    """Return multi-hot lists as lists of the names of their places."""
    rows = values.combine_chunks()
    hot = pc.list_flatten(rows).cast(pa.int64()).to_numpy().reshape(-1, len(names)) == 1
    lengths = np.zeros(len(rows), np.int64)
    lengths[rows.is_valid().to_numpy(zero_copy_only=False)] = hot.sum(axis=1)
    return _as_lists(pa.array(names, pa.string()).take(pa.array(np.nonzero(hot)[1])), lengths, rows.is_null())


def declared_labels(
    values: pa.ChunkedArray, names: Sequence[str], where: Callable[[int], str]
) -> pa.ChunkedArray | None:
    """Return the labels of a file that declares names. Whole numbers are positions among these, and become names.

    Text is left as it is where any of it is a name. None where the names are about something else: numbers with
    fractions, or text of which nothing is a name.

    Args:
        where: the place of a row, for messages.

    Raises:
        DataError: positions that have no name, names that are declared twice, text that may be either.
    """
    if len(set(names)) < len(names):
        twice = show_names(sorted({name for name in names if names.count(name) > 1}))
        raise DataError(Problem(f"names of labels are declared twice: {twice}", where(0), "name each label once"))
    if pa.types.is_list(values.type) and is_multi_hot(values, len(names)):
        return name_places(values, names)
    flat = flat_labels(values)
    if pa.types.is_string(flat.type):
        texts = set(pc.unique(flat).drop_null().to_pylist())
        if not texts or texts.intersection(names):
            refuse_ambiguous(texts, names, where(0), "remove the declared names (labels.json)")
            return values
        flat = _read_texts(flat, "classes")
    elif pa.types.is_floating(flat.type):
        flat = unify_numbers(flat, "classes")
    if not pa.types.is_integer(flat.type):
        return None
    flat = pc.if_else(pc.equal(flat, _WITHHELD), pa.scalar(None, pa.int64()), flat)
    return name_codes(with_items(values, flat), names, where)


def name_codes(values: pa.ChunkedArray, names: Sequence[str], where: Callable[[int], str]) -> pa.ChunkedArray:
    """Return positions (int64, or lists of them) as the names at those.

    Raises:
        DataError: positions that have no name; lists that repeat 0 and 1 as only multi-hot ones do, but that have
            another number of places than there are names.
    """
    flat = flat_labels(values)
    if pa.types.is_list(values.type) and is_multi_hot(values) and repeats_items(values):
        (length,) = pc.unique(pc.list_value_length(values)).drop_null().to_pylist()
        what = f"the labels are lists of {length} numbers that are 0 or 1, as for {length} labels, "
        what += f"but {len(names)} labels are named"
        raise DataError(Problem(what, where(0), "name as many labels as the lists have places"))
    numbers = pc.fill_null(flat, 0).to_numpy()
    bad = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(bad):
        rows = owners(values)[bad]
        found = sorted(set(numbers[bad].tolist()), key=lambda number: -int((numbers == number).sum()))
        raise DataError(
            _out_of_range(number, rows[numbers[bad] == number], len(values), len(names), where)
            for number in found[:NUM_SHOWN]
        )
    return with_items(values, pc.take(pa.array(names, pa.string()), flat))


def refuse_ambiguous(texts: set[str], names: Sequence[str], where: str | None, remedy: str) -> None:
    """Raise DataError where text may as well be the names as their positions, which would mean other labels."""
    if not texts or not texts.issubset(names) or not all(re.fullmatch(r"\d{1,9}", text) for text in texts):
        return
    numbers = {text: int(text) for text in texts}
    other = [text for text in sorted(texts, key=int) if numbers[text] < len(names) and names[numbers[text]] != text]
    if not other or max(numbers.values()) >= len(names):
        return
    what = f"the label {show_value(other[0])} may be the class of this name or, as a position among the names, "
    what += f"the class {show_value(names[numbers[other[0]]])}"
    remedy = f"write the labels as numbers (JSON Lines, Parquet) if they are positions; if they are names, {remedy}"
    raise DataError(Problem(what, where, remedy))


def flat_labels(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return all labels in a row; lists are taken apart."""
    return pc.list_flatten(values) if pa.types.is_list(values.type) else values


def owners(values: pa.ChunkedArray) -> Indices:
    """Return the row of each label of `flat_labels`."""
    if not pa.types.is_list(values.type):
        return np.arange(len(values))
    return np.repeat(np.arange(len(values)), pc.fill_null(pc.list_value_length(values), 0).to_numpy())


def with_items(values: pa.ChunkedArray, flat: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column with other labels, given as by `flat_labels`."""
    if not pa.types.is_list(values.type):
        return flat
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
    return _as_lists(flat.combine_chunks(), lengths, values.is_null().combine_chunks())


def _as_lists(flat: pa.Array, lengths: Indices, is_null: pa.Array) -> pa.ChunkedArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, flat, mask=is_null)])


def _unify_lists(values: pa.ChunkedArray) -> pa.ChunkedArray:
    flat = flat_labels(values)
    return with_items(values, unify_numbers(flat, "classes")) if pa.types.is_floating(flat.type) else values


def _read_texts(values: pa.ChunkedArray, numbers: Numbers) -> pa.ChunkedArray:
    """Return text as numbers, where all of it is numbers of the wanted sort; else as it is."""
    known = pc.if_else(pc.match_substring_regex(values, _NOT_A_NUMBER), pa.scalar(None, pa.string()), values)
    distinct = pc.unique(known).drop_null()
    if numbers == "text" or not len(distinct):
        return values
    if pc.all(pc.match_substring_regex(distinct, WHOLE)).as_py():
        return pc.replace_substring_regex(pc.utf8_trim_whitespace(known), r"\.0*$", "").cast(pa.int64())
    if numbers == "classes" or not pc.all(pc.match_substring_regex(distinct, NUMBER)).as_py():
        return values
    return values if _are_whole(text_to_float(distinct)) else text_to_float(known)


def _are_whole(values: pa.ChunkedArray | pa.Array) -> bool:
    """Whether all numbers (float64, nulls and NaN left out) are whole, and there are some."""
    numbers = values.drop_null().to_numpy(zero_copy_only=False)
    numbers = numbers[~np.isnan(numbers)]
    return bool(len(numbers)) and bool(np.all((np.abs(numbers) <= _LARGEST_WHOLE) & (numbers == np.floor(numbers))))


def _out_of_range(number: int, rows: Indices, num_rows: int, num_names: int, where: Callable[[int], str]) -> Problem:
    what = f"the label {number} (in {len(rows)} of {num_rows} rows) is out of range: {num_names} classes are numbered "
    what += f"0 to {num_names - 1}"
    remedy = "number the classes from 0, or name every class in the list of label names"
    return Problem(what, where(int(rows[0])), remedy)
