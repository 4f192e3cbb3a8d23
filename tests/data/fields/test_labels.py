"""Class names and encoded labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.data import encode_labels, encode_targets, find_label_names
from orchestrator.errors import DataError


@pytest.fixture
def label(make_examples: Any) -> Any:
    """Examples with these labels, and the class names that the data bring along."""

    def make(labels: list[Any], names: tuple[str, ...] | None = None) -> Any:
        examples = make_examples([(f"text {n}", label) for n, label in enumerate(labels)])
        return examples if names is None else replace(examples, names={"label": names})

    return make


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["b", "a", "b"], None, ("a", "b")),
        ([10, 9, 2], None, ("2", "9", "10")),
        (["10", "9", "2"], None, ("2", "9", "10")),
        ([1.0, 0.0], None, ("0", "1")),
        ([True, False], None, ("false", "true")),
        ([0, 1, 0], ("no", "yes", "maybe"), ("no", "yes", "maybe")),
        (["0", "1"], ("no", "yes"), ("no", "yes")),
        (["yes", "no"], ("no", "yes"), ("no", "yes")),
        (["x", "y"], ("no", "yes"), ("x", "y")),
        ([["b", "a"], [], ["c"]], None, ("a", "b", "c")),
        ([[1, 0], [2]], ("x", "y", "z"), ("x", "y", "z")),
    ],
)
def test_label_names_are_the_datas_or_the_sorted_labels(
    label: Any, labels: list[Any], names: Any, expected: Any
) -> None:
    assert find_label_names({"train": label(labels, names)}, "label", None) == expected


def test_given_names_win_and_none_stands_twice(label: Any) -> None:
    splits = {"train": label(["a", "b"], ("b", "a"))}
    assert find_label_names(splits, "label", ["b", "a", "c"]) == ("b", "a", "c")
    with pytest.raises(DataError, match="label names stand twice: a"):
        find_label_names(splits, "label", ["a", "b", "a"])


def test_names_cover_the_labels_of_all_splits(make_examples: Any) -> None:
    splits = {"train": make_examples([("x", "a")]), "test": make_examples([("y", "b")], "test.jsonl")}
    assert find_label_names(splits, "label", None) == ("a", "b")


def test_splits_that_number_their_classes_differently_are_refused(label: Any) -> None:
    splits = {"train": label([0, 1], ("no", "yes")), "test": label([0, 1], ("yes", "no"))}
    with pytest.raises(DataError, match="number their classes differently"):
        find_label_names(splits, "label", None)


def test_fractions_are_no_classes(label: Any) -> None:
    with pytest.raises(DataError, match=r"label is 0.5 \(one of 1 such\)") as caught:
        find_label_names({"train": label([0.0, 0.5])}, "label", None)
    assert (caught.value.problems[0].where or "").endswith("train.jsonl:2")


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([2, 0, 1], ["x", "y", "z"], [2, 0, 1]),
        # Names that are numbers are matched as text: 2 is the first class here.
        ([2, 3, 2], ["2", "3"], [0, 1, 0]),
        (["1", "0"], ["no", "yes"], [1, 0]),
        ([1.0, 0.0], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_become_class_numbers(label: Any, labels: list[Any], names: list[str], expected: list[int]) -> None:
    encoded = encode_labels(label(labels), "label", names)
    assert encoded.dtype == np.int64
    assert encoded.tolist() == expected


def test_lists_of_labels_become_multi_hot_rows(label: Any) -> None:
    encoded = encode_labels(label([["c", "a"], [], ["b"]]), "label", ["a", "b", "c"])
    assert encoded.dtype == np.float32
    assert encoded.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    taken = encode_labels(label([["c", "a"], [], ["b"]]).take([2, 0]), "label", ["a", "b", "c"])
    assert taken.tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "names", "what", "line"),
    [
        (["spam", "hma"], ["ham", "spam"], 'the label "hma" (in 1 of 2 rows) is not among the 2 classes: ham, spam', 2),
        ([0, 2, 2], ["no", "yes"], "the label 2 (in 2 of 3 rows) is out of range: 2 classes are numbered 0 to 1", 2),
        ([0, -1], ["no", "yes"], "the label -1 (in 1 of 2 rows) is out of range", 2),
        (["a", None, " "], ["a"], "the label is missing in 2 of 3 rows", 2),
        ([["a"], ["a", "b"]], ["a"], 'the label "b"', 2),
        ([["a"], None, ["a", None]], ["a"], "the label is missing in 2 of 3 rows", 2),
    ],
)
def test_wrong_labels_are_refused_with_their_place(
    label: Any, labels: list[Any], names: list[str], what: str, line: int
) -> None:
    with pytest.raises(DataError) as caught:
        encode_labels(label(labels), "label", names)
    (problem,) = caught.value.problems
    assert problem.what.startswith(what)
    assert (problem.where or "").endswith(f"train.jsonl:{line}")
    assert problem.remedy


def test_an_unknown_label_gets_the_nearest_name(label: Any) -> None:
    with pytest.raises(DataError) as caught:
        encode_labels(label(["pozitive"]), "label", ["negative", "positive"])
    assert caught.value.problems[0].remedy == 'write "positive" in its place'


def test_no_examples_give_no_labels(label: Any) -> None:
    assert encode_labels(label(["a"]).take([]), "label", ["a"]).shape == (0,)
    assert encode_labels(label([["a"]]).take([]), "label", ["a", "b"]).shape == (0, 2)


def test_regression_targets_are_read_from_numbers_and_text(label: Any) -> None:
    assert encode_targets(label([1, 2, None]), "label").tolist()[:2] == [1.0, 2.0]
    targets = encode_targets(label(["1.5", " -2e1 ", "+3", "four", "nan", "1_0", "1e999", None]), "label")
    assert targets.dtype == np.float32
    assert targets[:3].tolist() == [1.5, -20.0, 3.0]
    assert np.isnan(targets[3:]).all()
