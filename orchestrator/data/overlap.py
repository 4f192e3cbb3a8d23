"""Find the same text or image in two splits, or in *train* with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import IMAGE, Examples
from orchestrator.data.messages import NUM_SHOWN, show_some, show_value
from orchestrator.errors import Problem

_Mask = npt.NDArray[np.bool_]
_PAIRS = (("train", "select"), ("train", "test"), ("select", "test"))
_NOT_LETTERS = r"[\pP\pS\pN\pZ\s\x{00}-\x{1f}]+"


def check_overlap(
    splits: Mapping[str, Examples], text_columns: Sequence[str], label: str | None = None
) -> list[Problem]:
    """Return problems of texts that are in two splits, exactly or but for case, punctuation, digits and spaces.

    Warnings; but fatal when half or more of *select* or *test* stands in *train* word for word. With a `label`, texts
    that stand in *train* with two labels too. Pictures are compared by their files' content: the same one, saved anew,
    is another.
    """
    exact = {split: text_keys(examples, text_columns) for split, examples in splits.items()}
    near = {split: near_keys(examples, text_columns) for split, examples in splits.items()}
    problems = []
    for first, second in _PAIRS:
        if first in splits and second in splits:
            same = _members(exact[second], exact[first])
            share = float(same.mean()) if len(same) else 0.0
            found = _Found(splits, first, second, text_columns)
            problems += found.report(
                exact, same, f"({share:.1%}) are also in {first}", first == "train" and share >= 0.5
            )
            alike = _members(near[second], near[first]) & ~same
            how = f"are nearly in {first} (but for case, punctuation, digits and spaces)"
            problems += found.report(near, alike, how, fatal=False)
    return problems + (check_conflicting_labels(splits["train"], text_columns, label) if label else [])


@dataclass(frozen=True)
class _Found:
    """Texts of the split `second` that are also in `first`."""

    splits: Mapping[str, Examples]
    first: str
    second: str
    columns: Sequence[str]

    def report(self, keys: Mapping[str, pa.ChunkedArray], mask: _Mask, how: str, fatal: bool) -> list[Problem]:
        """Return one problem for the rows of the mask, with up to three of them and their duplicates."""
        rows = np.flatnonzero(mask).tolist()
        if not rows:
            return []
        first, second = self.splits[self.first], self.splits[self.second]
        shown = []
        for row in rows[:NUM_SHOWN]:
            twin = pc.index(keys[self.first], keys[self.second][row]).as_py()
            shown.append(f"{_text(second, row, self.columns)} at {second.where(row)} and {first.where(twin)}")
        what = f"{len(rows)} of {len(second)} examples of {self.second} {how}: {show_some(shown, len(rows))}"
        if self.first == "train":
            remedy = f"remove them from one of the two, or the {self.second} score will be too good"
        else:
            remedy = "remove them from one of the two: select picks the checkpoint that test is to judge"
        return [Problem(what, second.where(rows[0]), remedy, fatal)]


def check_conflicting_labels(examples: Examples, text_columns: Sequence[str], label: str) -> list[Problem]:
    """Return a warning about the same text (or image) with two labels, which no model can learn."""
    if pa.types.is_floating(examples.table.column(label).type):
        return []  # Scores of the same text may differ.
    keys = text_keys(examples, text_columns).to_pylist()
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
        f"{_text(examples, row, text_columns)} is {show_value(labels[firsts[key]])} at {examples.where(firsts[key])}"
        f" and {show_value(labels[row])} at {examples.where(row)}"
        for key, row in list(clashes.items())[:NUM_SHOWN]
    ]
    kind = "pictures" if _has_pictures(examples, text_columns) else "texts"
    what = f"{len(clashes)} {kind} stand in train with two labels: {show_some(shown, len(clashes))}"
    where = examples.where(next(iter(clashes.values())))
    return [Problem(what, where, "keep the right label of each", fatal=False)]


def text_keys(examples: Examples, text_columns: Sequence[str]) -> pa.ChunkedArray:
    """Return keys that are equal for equal text columns; null where all columns are null.

    For pictures, the hashes of their content. Columns that are not there count as null, since another split may have
    them.
    """
    nothing = pa.chunked_array([pa.nulls(len(examples), pa.string())])
    held = examples.table.column_names
    columns = [_keys(examples.table.column(name)) if name in held else nothing for name in text_columns]
    if len(columns) == 1:
        return columns[0]
    return pc.binary_join_element_wise(*columns, "\x1e", null_handling="replace", null_replacement="")


def near_keys(examples: Examples, text_columns: Sequence[str]) -> pa.ChunkedArray:
    """Return keys that are equal for nearly equal texts: their lower-case letters, or all of a text without letters.

    Pictures have nothing of the kind: they are the same or not.
    """
    keys = text_keys(examples, text_columns)
    if _has_pictures(examples, text_columns):
        return keys
    letters = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(keys), _NOT_LETTERS, " "))
    return pc.if_else(pc.equal(letters, ""), keys, letters)


def _keys(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type == IMAGE:
        return pc.struct_field(column, "digest")
    return pc.binary_join(column, "\x1e") if pa.types.is_list(column.type) else column  # The turns of a conversation.


def _has_pictures(examples: Examples, columns: Sequence[str]) -> bool:
    return any(field.name in columns and field.type == IMAGE for field in examples.table.schema)


def _members(values: pa.ChunkedArray, among: pa.ChunkedArray) -> _Mask:
    found: _Mask = pc.is_in(values, value_set=among.drop_null().combine_chunks(), skip_nulls=True).to_numpy()
    return found


def _text(examples: Examples, row: int, columns: Sequence[str]) -> str:
    held = [examples.table.column(name) for name in columns if name in examples.table.column_names]
    values = next((column for column in held if column[row].is_valid), held[0])
    return "a picture" if values.type == IMAGE else show_value(values[row].as_py())
