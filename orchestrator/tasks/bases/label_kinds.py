"""Kinds of labels: how the values of a column are read, and how a model's config names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import pyarrow as pa

from orchestrator.data.column_types import describe_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields.label_columns import Numbers
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE: Final = "single_label_classification"
MULTI: Final = "multi_label_classification"
REGRESSION: Final = "regression"
MANY_ROWS = 10
"""Rows of each class, as a rule."""
NUM_LABELS_SHOWN = 12
INTEGER_LABELS, CODES = "integer_labels", "positions"


class LabelOptions(Section):
    """Options of tasks that predict labels."""

    problem_type: Literal["auto", "single_label_classification", "multi_label_classification"] = "auto"
    """`auto` goes by the values, however they are stored: lists are multi-label, everything else is single-label."""
    label_names: list[str] | None = None
    """Names of labels 0, 1, ... where the data hold whole numbers, or of the places of multi-hot lists; or the order of
    the labels where the data hold names."""


class LabelOrNumberOptions(LabelOptions):
    """Options of tasks that predict labels or numbers."""

    problem_type: Literal["auto"] | ProblemType = "auto"  # type: ignore[assignment]
    """`auto` goes by the values, however they are stored: lists are multi-label, numbers of which some have a fraction
    are regression, everything else is single-label."""
    label_names: list[str] | None = None
    """Names of labels 0, 1, ... where the data hold whole numbers, or of the places of multi-hot lists; or the order of
    the labels where the data hold names. With them, numbers are never regression, unless `problem_type` says so."""


def may_be_numbers(options: LabelOptions) -> bool:
    """Whether the task predicts numbers too, where the data hold some."""
    return isinstance(options, LabelOrNumberOptions)


def numbers_of(options: LabelOptions | LabelOrNumberOptions) -> Numbers:
    """Return how numbers in a column of labels are read."""
    wanted: Literal["auto"] | ProblemType = options.problem_type
    if wanted == REGRESSION:
        return "targets"
    if options.label_names is not None:
        return "text"
    return "any" if options.problem_type == "auto" and may_be_numbers(options) else "classes"


def find_problem_type(options: LabelOptions, train: Examples) -> ProblemType:
    """Return the kind of these labels: lists of labels, numbers some of which have a fraction, or one label.

    Where names are declared, numbers are classes.
    """
    if options.problem_type != "auto":
        return options.problem_type
    kind = train.table["label"].type
    if pa.types.is_list(kind):
        return MULTI
    is_named = options.label_names is not None or "label" in train.names
    is_number = pa.types.is_floating(kind) and not is_named and may_be_numbers(options)
    return REGRESSION if is_number else SINGLE


def describe_decision(options: LabelOptions, train: Examples) -> str:
    """Return how the values decided the kind of labels, and how the recipe says otherwise; "" without a choice."""
    is_named = "label" in train.names or options.label_names is not None
    if options.problem_type != "auto" or is_named or not may_be_numbers(options):
        return ""
    kind = train.table["label"].type
    if pa.types.is_floating(kind):
        otherwise = "to predict classes, set target.options.problem_type to single_label_classification"
        return f"numbers to be predicted, since some have a fraction; {otherwise}"
    if pa.types.is_integer(kind):
        otherwise = "to predict numbers, set target.options.problem_type to regression"
        return f"classes, since all numbers are whole; {otherwise}"
    return ""


def doubt_problem_type(options: LabelOptions, train: Examples, recipe: Recipe) -> list[Problem]:
    """Return a warning where numbers become classes though most are rare, or amounts though few differ."""
    decision = describe_decision(options, train)
    if not decision:
        return []
    values = train.table["label"].drop_null()
    count = len(values.unique())
    many_rows_each = count * MANY_ROWS <= len(values)
    if pa.types.is_integer(values.type) and (many_rows_each or count <= MANY_ROWS):
        return []
    if pa.types.is_floating(values.type) and (count > MANY_ROWS or not many_rows_each):
        return []
    what = f"the labels of train are {count} different numbers: they are read as {decision}"
    remedy = "set target.options.problem_type to what they are, regression or single_label_classification"
    return [Problem(what, recipe.origin.where("target.options.problem_type"), remedy, fatal=False)]


def check_label_kind(problem_type: ProblemType, examples: Examples, noun: str) -> list[Problem]:
    """Return a problem of lists of labels where one is needed for each example, or the other way round."""
    values = examples.table["label"]
    wants_lists = problem_type == MULTI
    if pa.types.is_list(values.type) == wants_lists or values.null_count == len(values):
        return []
    what = f"label holds {describe_type(values.type)}, but {problem_type} needs "
    what += f"a list of labels for each {noun}" if wants_lists else f"one label for each {noun}"
    remedy = "write the labels so, map `label` to another column, or remove target.options.problem_type"
    return [Problem(what, examples.where(0), remedy)]


def label_config(names: Sequence[str], problem_type: str, are_codes: bool) -> dict[str, Any]:
    """Return what a model's config says of its labels, as transformers does; and how whole numbers in data are read.

    Args:
        are_codes: whether they are positions among the names, rather than names themselves.
    """
    return {
        INTEGER_LABELS: CODES if are_codes else "names",
        "problem_type": problem_type,
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def numbers_are_codes(config: Any) -> bool:
    """Whether whole numbers in data are positions among the label names of a model's config."""
    return getattr(config, INTEGER_LABELS, None) == CODES


def names_in(config: Any) -> tuple[str, ...]:
    """Return the label names in a model's config."""
    return tuple(config.id2label[index] for index in range(config.num_labels))


def describe_labels(names: Sequence[str]) -> str:
    """Return the labels in a few words: `3 labels: ask, order, refund`."""
    shown = ", ".join(names[:NUM_LABELS_SHOWN]) + (", ..." if len(names) > NUM_LABELS_SHOWN else "")
    return f"{len(names)} labels: {shown}"
