"""Checks for the same text or picture in two places: in two splits, or in *train* with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.messages import NUM_SHOWN, show_some, show_value
from orchestrator.errors import Problem

_Mask = npt.NDArray[np.bool_]
_PAIRS = (("train", "select"), ("train", "test"), ("select", "test"))
_NOT_LETTERS = r"[\pP\pS\pN\pZ\s\x{00}-\x{1f}]+"


def check_overlap(splits: Mapping[str, Examples], columns: Sequence[Column], label: str | None = None) -> list[Problem]:
    """Return problems of examples that stand in two splits, exactly or nearly (the same but for case, punctuation,
    digits and spaces).

    Warnings; but fatal when half or more of *select* or *test* stands in *train* word for word. With a `label`, also
    of examples that stand in *train* with two labels. Pictures are compared by their files' content: one that is saved
    again is another.

    Args:
        columns: those that examples are compared by.
        label: the name of a column of labels.
    """
    exact = {split: exact_keys(examples, columns) for split, examples in splits.items()}
    near = {split: near_keys(examples, columns) for split, examples in splits.items()}
    problems = []
    for first, second in _PAIRS:
        if first in splits and second in splits:
            same = _members(exact[second], exact[first])
            share = float(same.mean()) if len(same) else 0.0
            found = _Found(splits, first, second, columns)
            problems += found.report(
                exact, same, f"({share:.1%}) are also in {first}", first == "train" and share >= 0.5
            )
            alike = _members(near[second], near[first]) & ~same
            how = f"are nearly in {first} (but for case, punctuation, digits and spaces)"
            problems += found.report(near, alike, how, fatal=False)
    return problems + (check_conflicting_labels(splits["train"], columns, label) if label else [])


@dataclass(frozen=True)
class _Found:
    """Texts of the split `second` that are in `first` as well."""

    splits: Mapping[str, Examples]
    first: str
    second: str
    columns: Sequence[Column]

    def report(self, keys: Mapping[str, pa.ChunkedArray], mask: _Mask, how: str, fatal: bool) -> list[Problem]:
        """Return one problem for the rows of the mask, with up to three of them and their twins."""
        rows = np.flatnonzero(mask).tolist()
        if not rows:
            return []
        first, second = self.splits[self.first], self.splits[self.second]
        shown = []
        for row in rows[:NUM_SHOWN]:
            twin = pc.index(keys[self.first], keys[self.second][row]).as_py()
            shown.append(f"{_mention(second, row, self.columns)} at {second.where(row)} and {first.where(twin)}")
        what = f"{len(rows)} of {len(second)} examples of {self.second} {how}: {show_some(shown, len(rows))}"
        if self.first == "train":
            remedy = f"remove them from one of the two, or the {self.second} score will be too good"
        else:
            remedy = "remove them from one of the two: select picks the checkpoint that test is to judge"
        return [Problem(what, second.where(rows[0]), remedy, fatal)]


def check_conflicting_labels(examples: Examples, columns: Sequence[Column], label: str) -> list[Problem]:
    """Return a warning of the same text (or picture) with two labels: no model can learn both."""
    if pa.types.is_floating(examples.table.column(label).type):
        return []  # A score of the same text may well differ.
    keys = exact_keys(examples, columns).to_pylist()
    firsts: dict[str, int] = {}
    clashes: dict[str, int] = {}
    labels = examples.table.column(label).to_pylist()
    for row, key in enumerate(keys):
        if key is None:
            continue
        first = firsts.setdefault(key, row)
        if labels[first] != labels[row]:
            clashes.setdefault(key, row)
    if not clashes:
        return []
    shown = [
        f"{_mention(examples, row, columns)} is {show_value(labels[firsts[key]])} at {examples.where(firsts[key])}"
        f" and {show_value(labels[row])} at {examples.where(row)}"
        for key, row in list(clashes.items())[:NUM_SHOWN]
    ]
    kind = columns[0].field.plural
    what = f"{len(clashes)} {kind} stand in train with two labels: {show_some(shown, len(clashes))}"
    where = examples.where(next(iter(clashes.values())))
    return [Problem(what, where, "keep the right label of each", fatal=False)]


def exact_keys(examples: Examples, columns: Sequence[Column]) -> pa.ChunkedArray:
    """Return a text for each example, the same where all values of the columns are; null where all are null.

    Columns that are not there count as null, since another split may have them.
    """
    nothing = pa.chunked_array([pa.nulls(len(examples), pa.string())])
    held = examples.table.column_names
    keys = [column.field.keys(examples.table[column.name]) if column.name in held else nothing for column in columns]
    if len(keys) == 1:
        return keys[0]
    return pc.binary_join_element_wise(*keys, "\x1e", null_handling="replace", null_replacement="")


def near_keys(examples: Examples, columns: Sequence[Column]) -> pa.ChunkedArray:
    """Return a text for each example, the same for nearly equal ones: their lower-case letters, or all of a text
    without letters. Pictures are the same or not.
    """
    keys = exact_keys(examples, columns)
    if not all(column.field.has_letters for column in columns):
        return keys
    letters = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(keys), _NOT_LETTERS, " "))
    return pc.if_else(pc.equal(letters, ""), keys, letters)


def _members(values: pa.ChunkedArray, among: pa.ChunkedArray) -> _Mask:
    found: _Mask = pc.is_in(values, value_set=among.drop_null().combine_chunks(), skip_nulls=True).to_numpy()
    return found


def _mention(examples: Examples, row: int, columns: Sequence[Column]) -> str:
    """Return the first value of the columns that an example has, for a message."""
    held = [column for column in columns if column.name in examples.table.column_names]
    shown = next((column for column in held if examples.table[column.name][row].is_valid), held[0])
    return shown.field.mention(examples.table[shown.name][row].as_py())
