"""What is refused and what is warned of, each with count, place and examples; and good data raise nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.data import Column
from orchestrator.data.checks import check_class_labels, check_regression_targets, check_sizes
from orchestrator.data.fields.text import TextField, check_text
from orchestrator.data.overlap import check_overlap
from orchestrator.errors import Problem
from orchestrator.recipe import Origin

TEXT, TEXT_PAIR = Column("text", TextField()), Column("text_pair", TextField(), required=False)
WORDS = ("apple", "bread", "cheese", "dates", "eggs", "figs", "grapes", "honey")
GOOD = [(f"please send {word}", "order" if n % 2 else "ask") for n, word in enumerate(WORDS)]


@pytest.fixture
def split(make_examples: Any) -> Any:
    """Three splits of these pairs; train is good unless given."""

    def make(**pairs: Any) -> Any:
        given = {"train": GOOD, "test": [("is there tea", "ask"), ("two coffees", "order")], **pairs}
        return {name: make_examples(rows, f"{name}.jsonl") for name, rows in given.items()}

    return make


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def test_good_data_raise_no_problem(split: Any) -> None:
    splits = split(select=[("any jam", "ask"), ("one tea", "order")])
    found = check_class_labels(splits, "label") + check_overlap(splits, [TEXT], "label")
    found += check_sizes(splits, 8, Origin())
    found += [problem for examples in splits.values() for problem in check_text(examples, "text")]
    assert found == []


def test_null_blank_and_nul_texts_are_grouped_with_their_places(make_examples: Any) -> None:
    texts = ["fine", None, "  ", "\t\n", "", "a\0b", "\u3000", "\u200a"]
    problems = check_text(make_examples([(text, "a") for text in texts]), "text")
    null, blank, nul = problems
    assert null.what.startswith("text is missing (null) in 1 of 8 rows")
    assert (null.where or "").endswith("train.jsonl:2")
    assert blank.what.startswith("text is blank in 5 of 8 rows")
    assert blank.what.endswith("and 2 more")
    assert (blank.where or "").endswith("train.jsonl:3")
    assert "NUL" in nul.what and "\\x00" in nul.what
    assert all(problem.fatal and problem.remedy for problem in problems)


def test_missing_labels_are_refused(split: Any) -> None:
    problem = only(check_class_labels(split(train=[*GOOD, ("x", None), ("y", " ")]), "label"))
    assert problem.what.startswith("label is missing (null or blank) in 2 of 10 rows")
    assert (problem.where or "").endswith("train.jsonl:9")


def test_a_test_split_without_labels_gets_its_own_remedy(split: Any) -> None:
    problem = only(check_class_labels(split(test=[("x", None), ("y", None)]), "label"))
    assert "withhold" in (problem.remedy or "")


def test_a_class_that_only_test_has_is_refused(split: Any) -> None:
    problem = only(check_class_labels(split(test=[("x", "ask"), ("y", "refund"), ("z", "refund")]), "label"))
    assert problem.what == "1 of the classes of test have no training example: refund (2)"
    assert (problem.where or "").endswith("test.jsonl:2")
    assert problem.fatal


def test_a_single_class_is_refused(split: Any) -> None:
    problem = only(check_class_labels(split(train=[("x", "ask"), ("y", "ask")], test=[("z", "ask")]), "label"))
    assert "same label" in problem.what and problem.fatal


def test_a_class_with_one_training_example_is_a_warning(split: Any) -> None:
    problem = only(check_class_labels(split(train=[*GOOD, ("x", "refund")]), "label"))
    assert problem.what == "1 of 3 classes have one training example: refund"
    assert not problem.fatal


def test_a_given_name_without_examples_is_refused_and_the_datas_own_warned_of(split: Any) -> None:
    splits = split()
    given = only(check_class_labels(splits, "label", ["ask", "order", "refund"]))
    assert given.fatal and given.what == "1 of 3 named classes have no example: refund"
    brought = {
        name: replace(examples, names={"label": ("ask", "order", "refund")}) for name, examples in splits.items()
    }
    assert not only(check_class_labels(brought, "label")).fatal
    numbers = split(train=[("x", 0), ("y", 1), ("z", 0), ("w", 1)], test=[("v", 0)])
    assert check_class_labels(numbers, "label", ["no", "yes"]) == []
    assert "maybe" in only(check_class_labels(numbers, "label", ["no", "yes", "maybe"])).what


def test_lists_of_labels_are_checked_too(split: Any) -> None:
    train = [("x", ["a", "b"]), ("y", []), ("z", ["a", "b"]), ("w", None), ("v", ["a", None])]
    missing, only_test = check_class_labels(split(train=train, test=[("u", ["c"])]), "label")
    assert missing.what.startswith("label is missing (null or blank) in 2 of 5 rows")
    assert only_test.what == "1 of the classes of test have no training example: c (1)"


@pytest.mark.parametrize(("value", "count"), [(None, 1), (float("nan"), 1), (float("inf"), 1), ("many", 1), ("2.5", 0)])
def test_regression_targets_must_be_finite_numbers(make_examples: Any, value: Any, count: int) -> None:
    others = ["1", "2"] if isinstance(value, str) else [1.0, 2.0]
    problems = check_regression_targets(make_examples([("x", others[0]), ("y", value), ("z", others[1])]), "label")
    assert len(problems) == count
    assert all((problem.where or "").endswith("train.jsonl:2") and problem.fatal for problem in problems)


def test_a_few_duplicates_across_splits_are_a_warning_with_both_places(split: Any) -> None:
    test = [(f"new {word}", "ask") for word in WORDS] + [GOOD[2]]
    problem = only(check_overlap(split(test=test), [TEXT], "label"))
    assert not problem.fatal
    assert problem.what.startswith('1 of 9 examples of test (11.1%) are also in train: "please send cheese" at ')
    assert "test.jsonl:9" in problem.what and "train.jsonl:3" in problem.what


@pytest.mark.parametrize("name", ["select", "test"])
def test_a_split_that_is_half_in_train_is_refused(split: Any, name: str) -> None:
    problems = check_overlap(split(**{name: [GOOD[0], ("something new", "ask")]}), [TEXT], "label")
    assert only(problems).fatal


def test_select_and_test_may_be_the_same_with_a_warning(split: Any) -> None:
    same = [("is there tea", "ask"), ("two coffees", "order")]
    problem = only(check_overlap(split(select=same, test=same), [TEXT], "label"))
    assert not problem.fatal and "2 of 2 examples of test (100.0%) are also in select" in problem.what


def test_near_duplicates_are_a_warning(split: Any) -> None:
    test = [("Please, send  APPLE!", "ask"), ("please send 7 breads", "ask"), ("99", "ask")]
    problem = only(check_overlap(split(train=[*GOOD, ("100", "ask")], test=test), [TEXT], "label"))
    assert problem.what.startswith("1 of 3 examples of test are nearly in train")
    assert not problem.fatal


def test_pairs_are_the_same_only_when_both_texts_are(write_jsonl: Any, columns: Any) -> None:
    from orchestrator.data import open_files

    train = write_jsonl([{"text": "a dog", "text_pair": "an animal", "label": 1}])
    test = write_jsonl([{"text": "a dog", "text_pair": "a cat", "label": 0}], "test.jsonl")
    splits = {"train": open_files([train], columns, {}), "test": open_files([test], columns, {})}
    assert check_overlap(splits, [TEXT, TEXT_PAIR], "label") == []
    assert len(check_overlap(splits, [TEXT], "label")) == 1


def test_the_same_text_with_two_labels_is_a_warning(split: Any) -> None:
    problem = only(check_overlap(split(train=[*GOOD, (GOOD[1][0], "ask"), GOOD[0]]), [TEXT], "label"))
    assert problem.what.startswith('1 texts stand in train with two labels: "please send bread" is "order" at ')
    assert (problem.where or "").endswith("train.jsonl:9") and not problem.fatal


def test_differing_scores_of_one_text_are_no_conflict(split: Any) -> None:
    splits = split(train=[("x", 0.5), ("x", 0.7)], test=[("y", 0.1)])
    assert check_overlap(splits, [TEXT], "label") == []


def test_fewer_examples_than_a_global_batch_are_refused(split: Any) -> None:
    problem = only(check_sizes(split(), 32, Origin()))
    assert problem.what == "there are 8 training examples, fewer than one global batch of 32"
    assert problem.remedy == "set train.global_batch_size to 8 or less"


def test_an_empty_split_is_refused_and_breaks_no_check(split: Any) -> None:
    splits = split()
    for name in ("train", "test"):
        empty = {**splits, name: splits[name].take([])}
        assert f"the {name} split has no examples" in only(check_sizes(empty, 8, Origin())).what
        check_class_labels(empty, "label")
        check_overlap(empty, [TEXT], "label")
        assert check_text(empty[name], "text") == []


def test_long_and_hostile_texts_are_shortened_and_neutralised(make_examples: Any) -> None:
    (problem,) = check_text(make_examples([("\x1b[2J\u202e" + "x" * 500 + "\0", "a")]), "text")
    assert len(problem.what) < 400
    assert "\x1b" not in problem.what and "\u202e" not in problem.what
