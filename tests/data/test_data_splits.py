"""Cut splits are stratified, disjoint, without leaks and always the same; limits are nested."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.data import Column, check_overlap, cut_missing_splits, limit_examples
from orchestrator.data.fields.text import TextField
from orchestrator.errors import DataError
from orchestrator.recipe import Limit, Split

TEXT = Column("text", TextField())
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(number: int) -> str:
    """A text of letters alone for each number."""
    return LETTERS[number // 676 % 26] + LETTERS[number // 26 % 26] + LETTERS[number % 26]


@pytest.fixture
def pool(make_examples: Any) -> Any:
    """1000 examples: 600 of one class, 300, 90 and 10."""
    sizes = {"large": 600, "middle": 300, "small": 90, "tiny": 10}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    return make_examples([(f"text {word(n)}", label) for n, label in enumerate(labels)])


def texts(examples: Any) -> list[str]:
    found: list[str] = examples.table["text"].to_pylist()
    return found


def labels(examples: Any) -> Counter[str]:
    return Counter(examples.table["label"].to_pylist())


def test_both_splits_are_cut_disjoint_and_stratified(pool: Any) -> None:
    splits = cut_missing_splits({"train": pool}, Split(select=0.1, test=0.2), "label", [TEXT])
    assert list(splits) == ["train", "select", "test"]
    assert labels(splits["select"]) == {"large": 60, "middle": 30, "small": 9, "tiny": 1}
    assert labels(splits["test"]) == {"large": 120, "middle": 60, "small": 18, "tiny": 2}
    everything = [text for split in splits.values() for text in texts(split)]
    assert sorted(everything) == sorted(texts(pool))
    assert len(set(everything)) == 1000


def test_cut_examples_keep_their_place(pool: Any) -> None:
    splits = cut_missing_splits({"train": pool}, Split(), "label", [TEXT])
    line = texts(pool).index(texts(splits["select"])[3]) + 1
    assert splits["select"].where(3).endswith(f"train.jsonl:{line}")


def test_the_cut_is_the_same_every_time_and_differs_by_seed(pool: Any) -> None:
    cuts = [cut_missing_splits({"train": pool}, Split(seed=seed), "label", [TEXT]) for seed in (0, 0, 1, -1)]
    prints = [cut["select"].fingerprint for cut in cuts]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_present_splits_stay_and_the_test_cut_does_not_depend_on_select(pool: Any) -> None:
    select = pool.take(range(5))
    with_select = cut_missing_splits({"train": pool, "select": select}, Split(), "label", [TEXT])
    assert with_select["select"] is select
    alone = cut_missing_splits({"train": pool}, Split(), "label", [TEXT])
    assert with_select["test"].fingerprint == alone["test"].fingerprint


def test_a_share_of_zero_means_no_test_but_select_is_needed(pool: Any) -> None:
    assert list(cut_missing_splits({"train": pool}, Split(test=0.0), "label", [TEXT])) == ["train", "select"]
    with pytest.raises(DataError, match="select is needed"):
        cut_missing_splits({"train": pool}, Split(select=0.0), "label", [TEXT])
    kept = cut_missing_splits({"train": pool, "select": pool.take([0])}, Split(select=0.0), "label", [TEXT])
    assert list(kept) == ["train", "select", "test"]
    with pytest.raises(DataError, match="leave nothing"):
        cut_missing_splits({"train": pool}, Split(select=0.5, test=0.5), "label", [TEXT])


def test_alike_texts_stay_on_one_side(make_examples: Any) -> None:
    pairs = [
        (f"{form} {word(n // 4)}", "ab"[n // 4 % 2])
        for n in range(800)
        for form in [("Text", "text", "TEXT!", "text 7")[n % 4]]
    ]
    splits = cut_missing_splits({"train": make_examples(pairs)}, Split(), "label", [TEXT])
    assert 60 <= len(splits["select"]) <= 100 and 60 <= len(splits["test"]) <= 100
    assert check_overlap(splits, [TEXT], "label") == []


def test_texts_that_differ_in_digits_alone_can_still_be_cut(make_examples: Any) -> None:
    pairs = [(f"message {n // 2}", "ab"[n // 2 % 2]) for n in range(400)]
    splits = cut_missing_splits({"train": make_examples(pairs)}, Split(), "label", [TEXT])
    assert len(splits["select"]) == len(splits["test"]) == 40
    assert not set(texts(splits["train"])) & (set(texts(splits["select"])) | set(texts(splits["test"])))


def test_every_class_keeps_training_examples(make_examples: Any) -> None:
    sizes = {"a": 50, "b": 50, "one": 1, "two": 2, "three": 3}
    names = [label for label, size in sizes.items() for _ in range(size)]
    examples = make_examples([(f"text {word(n)}", label) for n, label in enumerate(names)])
    splits = cut_missing_splits({"train": examples}, Split(select=0.4, test=0.4), "label", [TEXT])
    assert set(labels(splits["train"])) == set(sizes)
    assert "one" not in labels(splits["select"]) and "one" not in labels(splits["test"])


def test_too_few_examples_to_cut_from_are_refused(make_examples: Any) -> None:
    with pytest.raises(DataError, match="2 training examples are too few to cut test"):
        cut_missing_splits({"train": make_examples([("x", "a"), ("y", "b")])}, Split(), "label", [TEXT])


@pytest.mark.parametrize("stratify", [None, "label"])
def test_numbers_and_lists_are_cut_without_strata(make_examples: Any, stratify: str | None) -> None:
    for value in (0.5, ["a", "b"]):
        examples = make_examples([(f"text {word(n)}", value) for n in range(100)])
        splits = cut_missing_splits({"train": examples}, Split(), stratify, [TEXT])
        assert [len(split) for split in splits.values()] == [80, 10, 10]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 40), min_size=12, max_size=80),
    select=st.floats(0.05, 0.45),
    test=st.floats(0.0, 0.45),
)
def test_no_text_is_ever_on_two_sides(make_examples: Any, numbers: list[int], select: float, test: float) -> None:
    examples = make_examples([(f"text {word(n)}", "ab"[n % 2]) for n in numbers])
    try:
        splits = cut_missing_splits({"train": examples}, Split(select=select, test=test), "label", [TEXT])
    except DataError:
        assert min(Counter({n: n % 2 for n in numbers}.values()).values()) <= 3 or len(set(numbers)) <= 6
        return
    sides = [set(texts(split)) for split in splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert sum(len(split) for split in splits.values()) == len(numbers)


def test_limits_are_stratified_and_nested(pool: Any) -> None:
    drawn = {}
    for total in (4, 50, 100, 200):
        limited = limit_examples({"train": pool}, Limit(train=total), "label", 0)["train"]
        assert len(limited) == total
        drawn[total] = limited
    assert set(texts(drawn[4])) < set(texts(drawn[50])) < set(texts(drawn[100])) < set(texts(drawn[200]))
    assert labels(drawn[4]) == {"large": 1, "middle": 1, "small": 1, "tiny": 1}
    shares = labels(drawn[200])
    assert abs(shares["large"] - 120) <= 2 and abs(shares["middle"] - 60) <= 2 and abs(shares["small"] - 18) <= 2


def test_limits_per_class_are_nested_and_combine_with_a_total(pool: Any) -> None:
    eight = limit_examples({"train": pool}, Limit(per_class=8), "label", 0)["train"]
    sixteen = limit_examples({"train": pool}, Limit(per_class=16), "label", 0)["train"]
    assert labels(eight) == dict.fromkeys(("large", "middle", "small", "tiny"), 8)
    assert labels(sixteen) == {"large": 16, "middle": 16, "small": 16, "tiny": 10}
    assert set(texts(eight)) < set(texts(sixteen))
    both = limit_examples({"train": pool}, Limit(per_class=16, train=20), "label", 0)["train"]
    assert len(both) == 20 and set(texts(both)) <= set(texts(sixteen))


def test_limits_of_other_splits_and_other_seeds(pool: Any) -> None:
    splits = {"train": pool, "test": pool}
    limited = limit_examples(splits, Limit(test=10), "label", 0)
    assert limited["train"] is pool
    assert len(limited["test"]) == 10
    other = limit_examples(splits, Limit(test=10), "label", 1)
    assert set(texts(other["test"])) != set(texts(limited["test"]))


def test_per_class_without_classes_is_refused(make_examples: Any) -> None:
    examples = make_examples([("x", 0.5), ("y", 0.7)])
    with pytest.raises(DataError, match="no classes") as caught:
        limit_examples({"train": examples}, Limit(per_class=1), "label", 0)
    assert caught.value.problems[0].where == "target.limit.per_class"
    assert len(limit_examples({"train": examples}, Limit(train=1), None, 0)["train"]) == 1
