"""Checks of sizes and of labels. Each groups all rows of a kind into one problem."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import group_rows
from orchestrator.data.fields.label_columns import flat_labels, owners, refuse_ambiguous
from orchestrator.data.fields.labels import count_places, declares_names, encode_targets, find_label_names, name_labels
from orchestrator.data.messages import show_names, show_value
from orchestrator.errors import Problem
from orchestrator.recipe.origin import Origin


def check_sizes(splits: Mapping[str, Examples], global_batch_size: int, origin: Origin) -> list[Problem]:
    """Return problems of splits without examples, and of fewer training examples than one global batch."""
    problems = []
    for split, examples in splits.items():
        if not len(examples):
            remedy = "add examples, or check `target.limit` and `target.split`"
            problems.append(Problem(f"the {split} split has no examples", origin.where("target.data"), remedy))
    num_train = len(splits["train"])
    if 0 < num_train < global_batch_size:
        what = f"there are {num_train} training examples, fewer than one global batch of {global_batch_size}"
        remedy = f"set train.global_batch_size to {num_train} or less"
        problems.append(Problem(what, origin.where("train.global_batch_size"), remedy))
    return problems


def check_class_labels(
    splits: Mapping[str, Examples], column: str, given: Sequence[str] | None = None
) -> list[Problem]:
    """Return problems of missing labels, and of classes that cannot be learned or scored; labels may be lists.

    Fatal: missing labels, a single class, classes that only *select* or *test* have, `given` names without a training
    example. Warnings: classes with one training example, names that the data bring along and never use, multi-hot
    lists whose places nothing names.

    Raises:
        DataError: labels are numbers with fractions, or positions that have no name.
    """
    names = find_label_names(splits, column, given)
    are_codes = declares_names(splits, column, given)
    place = splits["train"].where(0) if len(splits["train"]) else None
    if given is not None:
        texts = {text for examples in splits.values() for text in _texts(examples, column)}
        refuse_ambiguous(texts, names, place, "remove target.options.label_names")
    problems = _places_problem(splits, column, are_codes) + _lists_in_text(splits["train"], column)
    splits = {split: name_labels(examples, column, names, are_codes) for split, examples in splits.items()}
    problems += [problem for examples in splits.values() if (problem := _missing_labels(examples, column))]
    counts = {split: _count_labels(examples, column) for split, examples in splits.items()}
    train = counts["train"]
    for split, examples in splits.items():
        only = [text for text in counts[split] if text not in train]
        if only:
            shown = show_names(f"{text} ({counts[split][text]})" for text in only)
            what = f"{len(only)} of the classes of {split} have no training example: {shown}"
            remedy = "add training examples of them, or remove them from all splits"
            problems.append(Problem(what, examples.where(_first_row(examples, column, only[0])), remedy))
    is_list = pa.types.is_list(splits["train"].table.column(column).type)
    if train and len(train) < 2 and not is_list:
        what = f"all training examples have the same label, {show_value(next(iter(train)))}"
        problems.append(Problem(what, place, "give at least two classes, or map `label` to another column"))
    elif not train and len(splits["train"]) and not problems:
        problems.append(Problem("no training example has a label", place, "label the training examples"))
    single = [text for text, count in train.items() if count < 2]
    if single:
        what = f"{len(single)} of {len(train)} classes have one training example: {show_names(sorted(single))}"
        problems.append(Problem(what, place, "add examples of them, or merge them into other classes", fatal=False))
    return problems + _unused_names(names, set().union(*counts.values()), given is not None, place)


def check_regression_targets(examples: Examples, column: str) -> list[Problem]:
    """Return problems of targets that are null, NaN, infinite, or not numbers."""
    values = examples.table.column(column)
    null = values.is_null()
    bad = pc.and_not(pa.chunked_array([pa.array(np.isnan(encode_targets(examples, column)))]), null)
    write = "write a number, or remove these rows"
    found = [
        group_rows(examples, column, null, "is missing (null)", write),
        group_rows(examples, column, bad, "is not a finite number", write),
    ]
    return [problem for problem in found if problem]


def _missing_labels(examples: Examples, column: str) -> Problem | None:
    values = examples.table.column(column)
    missing = values.is_null()
    if pa.types.is_list(values.type):
        holed = [value is not None and None in value for value in values.to_pylist()]
        missing = pc.or_(missing, pa.chunked_array([pa.array(holed, pa.bool_())]))
    remedy = "label these rows or remove them"
    if len(examples) and pc.all(missing).as_py():
        remedy = "name a split that has labels (many public test sets withhold theirs)"
    return group_rows(examples, column, missing, "is missing (null or blank)", remedy)


def _count_labels(examples: Examples, column: str) -> dict[str, int]:
    """Return the number of rows of each label (text), most frequent first."""
    flat = flat_labels(examples.table.column(column))
    counted = pc.value_counts(pc.drop_null(flat)) if len(flat) else []
    counts = {item["values"].as_py(): item["counts"].as_py() for item in counted}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _first_row(examples: Examples, column: str, text: str) -> int:
    values = examples.table.column(column)
    return int(owners(values)[pc.index(flat_labels(values), text).as_py()])


def _texts(examples: Examples, column: str) -> list[str]:
    """Return the distinct labels that are text in the data."""
    flat = flat_labels(examples.table.column(column))
    return pc.unique(flat).drop_null().to_pylist() if pa.types.is_string(flat.type) else []


def _lists_in_text(train: Examples, column: str) -> list[Problem]:
    """Return a warning where text looks like lists, as CSV files hold them, each of which is a class of its own."""
    texts = [] if pa.types.is_list(train.table.column(column).type) else _texts(train, column)
    if not texts or not all(re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL) for text in texts):
        return []
    what = f"{column} holds text such as {show_value(texts[0])}: each different text is a class of its own"
    remedy = "write lists of labels in a format that has lists, such as JSON Lines or Parquet"
    return [Problem(what, train.where(0), remedy, fatal=False)]


def _places_problem(splits: Mapping[str, Examples], column: str, are_codes: bool) -> list[Problem]:
    """Return a warning where lists are taken for multi-hot ones, and nothing names their places."""
    places = None if are_codes else count_places(splits, column)
    if places is None:
        return []
    what = f"{column} holds lists of {places} numbers that are 0 or 1: they are read as a place for each of {places} "
    what += f"labels, named 0 to {places - 1}"
    remedy = "name the labels in target.options.label_names; if these are lists of labels, write the labels as words"
    return [Problem(what, splits["train"].where(0), remedy, fatal=False)]


def _unused_names(names: Sequence[str], used: set[str], is_given: bool, place: str | None) -> list[Problem]:
    """Return a problem of class names that no example has."""
    unused = [name for name in names if name not in used]
    if not unused or not used:
        return []
    what = f"{len(unused)} of {len(names)} named classes have no example: {show_names(unused)}"
    return [Problem(what, place, "add examples of them, or take them off the list of label names", fatal=is_given)]
