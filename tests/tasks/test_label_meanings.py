"""Labels mean the same however they are stored, and come back from predictions as they were written."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import Column, Examples, encode_labels, open_files, open_splits
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.tasks import find_task

TEXT, IMAGE = find_task("text-classification"), find_task("image-classification")
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
RECIPE = Recipe.model_validate(
    {"name": "test", "source": {"model": "m"}, "target": {"task": "text-classification", "data": "x"}}
)
datasets.disable_progress_bars()


def write_jsonl(path: Path, labels: list[Any]) -> Path:
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, labels: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *([f"text {n}", label] for n, label in enumerate(labels))])
    return path


def write_parquet(path: Path, labels: Any) -> Path:
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(len(labels))], "label": labels}), path)
    return path


def write_pandas(path: Path, labels: list[Any]) -> Path:
    pd.DataFrame({"text": [f"text {n}" for n in range(len(labels))], "label": labels}).to_parquet(path)
    return path


def write_datasets(folder: Path, labels: list[Any], feature: Any) -> Path:
    """Write a data set with `save_to_disk`, the labels as codes."""
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    texts = [f"text {number}" for number in range(len(labels))]
    datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features).save_to_disk(str(folder))
    return next(folder.glob("*.arrow"))


STORED: dict[str, Callable[[Path, list[Any]], Path]] = {
    "jsonl": lambda folder, labels: write_jsonl(folder / "a.jsonl", labels),
    "jsonl, floats": lambda folder, labels: write_jsonl(folder / "a.jsonl", [float(label) for label in labels]),
    "jsonl, text": lambda folder, labels: write_jsonl(folder / "a.jsonl", [str(label) for label in labels]),
    "csv": lambda folder, labels: write_csv(folder / "a.csv", labels),
    "csv, floats": lambda folder, labels: write_csv(folder / "a.csv", [float(label) for label in labels]),
    "csv, some floats": lambda folder, labels: write_csv(folder / "a.csv", [float(labels[0]), *labels[1:]]),
    "parquet": lambda folder, labels: write_parquet(folder / "a.parquet", labels),
    "parquet, 8 bits": lambda folder, labels: write_parquet(folder / "a.parquet", pa.array(labels).cast(pa.int8())),
    "pandas, floats": lambda folder, labels: write_pandas(folder / "a.parquet", [float(label) for label in labels]),
    "pandas, categories": lambda folder, labels: write_parquet(
        folder / "a.parquet", pa.Array.from_pandas(pd.Series(labels).astype("category"))
    ),
}
"""Ways to store whole numbers."""


def columns_of(task: Any, **options: Any) -> list[Column]:
    """Without pictures, which say nothing of labels."""
    return [column for column in task.columns(task.Options(**options)) if column.name in ("text", "label")]


def read(path: Path, task: Any, **options: Any) -> Examples:
    return open_files([path], columns_of(task, **options), {})


def problems_of(examples: Examples, **options: Any) -> list[Problem]:
    return TEXT.check(TEXT.Options(**options), {"train": examples}, RECIPE)


def come_back(examples: Examples, task_class: Any = TEXT, **options: Any) -> list[Any]:
    """Return the predictions of a model that has memorised the labels, before and after its config was saved."""
    given_options = task_class.Options(**options)
    task = task_class.prepare(given_options, {"train": examples})
    restored = task_class.restore(given_options, SimpleNamespace(**task.config_changes()))
    found = []
    for each in (task, restored):
        encoded = encode_labels(examples, "label", each.label_names, each.are_codes)
        hot = np.eye(len(each.label_names))[encoded] if encoded.ndim == 1 else encoded
        found.append(each.prediction_rows({"logits": 20.0 * (hot - 0.5)}, examples)["prediction"])
    assert found[0] == found[1]
    return found[0]


@settings(deadline=None, max_examples=60)
@given(
    numbers=st.lists(st.integers(-3, 12), min_size=2, max_size=8).filter(lambda found: len(set(found)) > 1),
    how=st.sampled_from(sorted(STORED)),
    task=st.sampled_from([TEXT, IMAGE]),
)
def test_whole_numbers_with_gaps_are_classes_of_their_own_name_however_they_are_stored(
    numbers: list[int], how: str, task: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        examples = read(STORED[how](Path(folder), numbers), task)
        if task is TEXT:
            assert not [problem for problem in problems_of(examples) if problem.fatal]
        assert come_back(examples, task) == [str(number) for number in numbers]
        assert task.prepare(task.Options(), {"train": examples}).label_names == tuple(map(str, sorted(set(numbers))))


@settings(deadline=None, max_examples=40)
@given(
    labels=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=5).filter(str.strip),
        min_size=2,
        max_size=6,
    ).filter(lambda found: len(set(found)) > 1 and any(not label.strip()[0].isdigit() for label in found)),
    is_csv=st.booleans(),
)
def test_text_comes_back_as_it_was_written(labels: list[str], is_csv: bool) -> None:
    labels = ["a word", *labels]
    with tempfile.TemporaryDirectory() as folder:
        write = write_csv if is_csv else write_jsonl
        assert come_back(read(write(Path(folder) / ("a.csv" if is_csv else "a.jsonl"), labels), TEXT)) == labels


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(
        st.one_of(st.integers(0, 12).map(str), st.sampled_from(["no", "yes", "1.5", "007", "2.0"])),
        min_size=2,
        max_size=12,
        unique=True,
    ),
    data=st.data(),
    how=st.sampled_from(["label", "list", "given", "beside"]),
    task=st.sampled_from([TEXT, IMAGE]),
)
def test_codes_come_back_as_the_names_that_are_declared_for_them(
    names: list[str], data: Any, how: str, task: Any
) -> None:
    codes = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=2, max_size=8))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if how == "label":
            path = write_datasets(folder / "saved", codes, datasets.ClassLabel(names=names))
            assert come_back(read(path, task), task) == [names[code] for code in codes]
        elif how == "list":
            feature = datasets.Sequence(datasets.ClassLabel(names=names))
            examples = read(write_datasets(folder / "saved", [[code] for code in codes], feature), TEXT)
            assert come_back(examples) == [[names[code]] for code in codes]
        elif how == "given":
            examples = read(write_parquet(folder / "a.parquet", codes), task, label_names=names)
            assert come_back(examples, task, label_names=names) == [names[code] for code in codes]
        else:
            (folder / "labels.json").write_text(json.dumps(names))
            target = RECIPE.target.model_copy(update={"data": str(write_jsonl(folder / "a.jsonl", codes))})
            examples = open_splits(RECIPE.model_copy(update={"target": target}), columns_of(task))["train"]
            assert come_back(examples, task) == [names[code] for code in codes]


def test_codes_of_numeric_names_in_the_order_of_text_are_positions(tmp_path: Path) -> None:
    numbers = [2, 10, 1, 11, 0, 3, 4, 5, 6, 7, 8, 9, 2]
    data = datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(len(numbers))], "label": numbers})
    data = data.class_encode_column("label")
    assert data.features["label"].names[2] == "10"
    data.save_to_disk(str(tmp_path / "saved"))
    examples = read(next((tmp_path / "saved").glob("*.arrow")), TEXT)
    assert come_back(examples) == [str(number) for number in numbers]


def test_a_trained_model_knows_what_numbers_without_names_stand_for(tmp_path: Path) -> None:
    names = ["3", "1", "2"]
    declared = read(write_datasets(tmp_path / "saved", [0, 1, 2], datasets.ClassLabel(names=names)), TEXT)
    plain = read(write_jsonl(tmp_path / "a.jsonl", [1, 2, 1]), TEXT)
    for examples, expected in ((declared, [1, 2, 1]), (plain, [0, 1, 0])):
        task = TEXT.prepare(TEXT.Options(), {"train": examples})
        restored = TEXT.restore(TEXT.Options(), SimpleNamespace(**task.config_changes()))
        assert encode_labels(plain, "label", restored.label_names, restored.are_codes).tolist() == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_codes_without_names_beside_declared_ones_are_positions_too(tmp_path: Path, split: str) -> None:
    declared = read(write_datasets(tmp_path / "saved", [0, 1, 2], datasets.ClassLabel(names=["2", "0", "1"])), TEXT)
    plain = read(write_jsonl(tmp_path / "a.jsonl", [0, 1, 2]), TEXT)
    splits = {"train": plain, "test": declared} if split == "train" else {"train": declared, "test": plain}
    task = TEXT.prepare(TEXT.Options(), splits)
    assert task.label_names == ("2", "0", "1")
    for examples in splits.values():
        assert encode_labels(examples, "label", task.label_names, task.are_codes).tolist() == [0, 1, 2]


def test_files_and_splits_that_number_their_classes_differently_are_read_by_their_names(tmp_path: Path) -> None:
    one = write_datasets(tmp_path / "one", [0, 1], datasets.ClassLabel(names=["no", "yes"]))
    other = write_datasets(tmp_path / "other", [0, 1], datasets.ClassLabel(names=["yes", "no"]))
    examples = open_files([one, other], TEXT.columns(TEXT.Options()), {})
    assert come_back(examples) == ["no", "yes", "yes", "no"]
    splits = {"train": read(one, TEXT), "test": read(other, TEXT)}
    task = TEXT.prepare(TEXT.Options(), splits)
    assert encode_labels(splits["test"], "label", task.label_names, task.are_codes).tolist() == [1, 0]


def test_text_that_may_be_names_or_positions_is_refused_with_remedies_that_work(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["0", "1", "2", "1"])
    examples = read(path, TEXT, label_names=["1", "0", "2"])
    (problem,) = [each for each in problems_of(examples, label_names=["1", "0", "2"]) if each.fatal]
    assert problem.what.startswith('the label "0" may be the class of this name')
    assert "label_names" in str(problem.remedy)
    assert come_back(read(path, TEXT)) == ["0", "1", "2", "1"]
    numbers = read(write_jsonl(tmp_path / "a.jsonl", [0, 1, 2, 1]), TEXT, label_names=["1", "0", "2"])
    assert come_back(numbers, label_names=["1", "0", "2"]) == ["1", "0", "2", "0"]
    ratings = read(write_csv(tmp_path / "b.csv", ["1", "3", "2", "1"]), TEXT, label_names=["3", "2", "1"])
    assert come_back(ratings, label_names=["3", "2", "1"]) == ["1", "3", "2", "1"]


@pytest.mark.parametrize("how", ["whole", "floats", "true and false", "text", "fixed size"])
@pytest.mark.parametrize("names", [None, ["red", "green", "blue"]])
def test_multi_hot_rows_are_a_place_for_each_label(tmp_path: Path, how: str, names: list[str] | None) -> None:
    rows = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    kinds: dict[str, Any] = {"floats": float, "true and false": bool, "text": str}
    if how == "fixed size":
        path = write_parquet(tmp_path / "a.parquet", pa.array(rows, pa.list_(pa.int8(), 3)))
    else:
        path = write_jsonl(tmp_path / "a.jsonl", [[kinds.get(how, int)(item) for item in row] for row in rows])
    options: dict[str, Any] = {} if names is None else {"label_names": names}
    examples = read(path, TEXT, **options)
    told = problems_of(examples, **options)
    assert not [problem for problem in told if problem.fatal]
    assert sum("read as a place for each of 3 labels" in problem.what for problem in told) == (names is None)
    shown = names or ["0", "1", "2"]
    assert come_back(examples, **options) == [[shown[n] for n in range(3) if row[n]] for row in rows]


@settings(deadline=None, max_examples=40)
@given(num_labels=st.integers(2, 5), data=st.data())
def test_multi_hot_rows_come_back_as_they_were_written(num_labels: int, data: Any) -> None:
    row = st.lists(st.integers(0, 1), min_size=num_labels, max_size=num_labels)
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        examples = read(write_jsonl(Path(folder) / "a.jsonl", rows), TEXT)
        found = [[int(str(place) in places) for place in range(num_labels)] for places in come_back(examples)]
    assert found == rows


def test_lists_of_codes_of_different_lengths_are_sets_of_labels(tmp_path: Path) -> None:
    rows = [[1, 0], [2], [], [0, 1, 3]]
    examples = read(write_jsonl(tmp_path / "a.jsonl", rows), TEXT)
    assert [sorted(row) for row in come_back(examples)] == [["0", "1"], ["2"], [], ["0", "1", "3"]]
    words = read(write_jsonl(tmp_path / "b.jsonl", [["0", "1"], ["1", "0"]]), TEXT)
    assert come_back(words) == [["0", "1"], ["0", "1"]]


def test_multi_hot_rows_with_another_number_of_names_are_refused(tmp_path: Path) -> None:
    examples = read(write_jsonl(tmp_path / "a.jsonl", [[1, 0, 0], [0, 1, 1]]), TEXT, label_names=["a", "b"])
    (problem,) = [each for each in problems_of(examples, label_names=["a", "b"]) if each.fatal]
    assert "lists of 3 numbers that are 0 or 1" in problem.what and "2 labels are named" in problem.what
    splits = {"train": read(write_jsonl(tmp_path / "b.jsonl", [[1, 0, 0]]), TEXT)}
    splits["test"] = read(write_jsonl(tmp_path / "c.jsonl", [[1, 0]]), TEXT)
    with pytest.raises(DataError, match="those of test are not"):
        TEXT.prepare(TEXT.Options(), splits)


FRACTIONS = [1.2, 4.8, 3.0]


@pytest.mark.parametrize(
    "stored",
    [
        lambda folder: write_csv(folder / "a.csv", FRACTIONS),
        lambda folder: write_csv(folder / "a.csv", ["+1.2", " 48e-1", "3"]),
        lambda folder: write_jsonl(folder / "a.jsonl", FRACTIONS),
        lambda folder: write_jsonl(folder / "a.jsonl", [str(number) for number in FRACTIONS]),
        lambda folder: write_jsonl(folder / "a.jsonl", [1.2, 4.8, 3]),
        lambda folder: write_parquet(folder / "a.parquet", pa.array(FRACTIONS, pa.float32())),
        lambda folder: write_pandas(folder / "a.parquet", FRACTIONS),
        lambda folder: write_csv(folder / "a.csv", [*FRACTIONS, "nan"]),
    ],
)
def test_numbers_of_which_some_have_a_fraction_are_amounts_however_they_are_stored(tmp_path: Path, stored: Any) -> None:
    examples = read(stored(tmp_path), TEXT)
    task = TEXT.prepare(TEXT.Options(), {"train": examples})
    assert task.problem_type == REGRESSION
    assert "problem_type to single_label_classification" in task.decision
    assert np.asarray(examples.table["label"].to_pylist()[:3], float) == pytest.approx(FRACTIONS)


@pytest.mark.parametrize("how", sorted(STORED))
def test_whole_numbers_are_classes_and_the_recipe_may_say_that_they_are_amounts(tmp_path: Path, how: str) -> None:
    path = STORED[how](tmp_path, [0, 1, 2, 1])
    task = TEXT.prepare(TEXT.Options(), {"train": read(path, TEXT)})
    assert task.problem_type == SINGLE
    assert "problem_type to regression" in task.decision
    examples = read(path, TEXT, problem_type=REGRESSION)
    assert not [problem for problem in problems_of(examples, problem_type=REGRESSION) if problem.fatal]
    assert TEXT.prepare(TEXT.Options(problem_type=REGRESSION), {"train": examples}).problem_type == REGRESSION


def test_codes_with_names_can_be_learned_as_amounts(tmp_path: Path) -> None:
    names = [f"{number} stars" for number in range(1, 6)]
    path = write_datasets(tmp_path / "saved", [0, 4, 2], datasets.ClassLabel(names=names))
    examples = read(path, TEXT, problem_type=REGRESSION)
    assert not [problem for problem in problems_of(examples, problem_type=REGRESSION) if problem.fatal]


@pytest.mark.parametrize(
    "labels", [["3.8", "3.9", "3.10", "3.1"], ["1.0", "1", "one"], ["007", "7", "07"], ["+1", "1e0"]]
)
def test_spellings_of_numbers_are_different_names_where_the_labels_are_names(tmp_path: Path, labels: list[str]) -> None:
    for path in (write_csv(tmp_path / "a.csv", labels), write_jsonl(tmp_path / "a.jsonl", labels)):
        examples = read(path, TEXT, problem_type=SINGLE)
        assert come_back(examples, problem_type=SINGLE) == labels


@pytest.mark.parametrize("labels", [[True, False], ["yes", "no"]])
@pytest.mark.parametrize("write", ["jsonl", "parquet"])
def test_two_valued_labels_are_classes(tmp_path: Path, labels: list[Any], write: str) -> None:
    path = (
        write_jsonl(tmp_path / "a.jsonl", labels) if write == "jsonl" else write_parquet(tmp_path / "a.parquet", labels)
    )
    expected = [str(label).lower() for label in labels]
    assert come_back(read(path, TEXT)) == expected


def test_numbers_that_may_be_either_are_warned_of_until_the_recipe_says_what_they_are(tmp_path: Path) -> None:
    prices = write_csv(tmp_path / "a.csv", list(range(100, 130)))
    ratings = write_csv(tmp_path / "b.csv", [f"{number % 4}.5" for number in range(80)])
    for path, taken_for in ((prices, "classes, since"), (ratings, "numbers to be predicted, since")):
        (doubt,) = [each for each in problems_of(read(path, TEXT)) if "different numbers" in each.what]
        assert taken_for in doubt.what and not doubt.fatal
        for said in (SINGLE, REGRESSION):
            told = problems_of(read(path, TEXT, problem_type=said), problem_type=said)
            assert not [each for each in told if "different numbers" in each.what]


def test_lists_that_are_written_as_text_are_warned_of(tmp_path: Path) -> None:
    told = problems_of(read(write_csv(tmp_path / "a.csv", ["[1, 0, 0]", "[0, 1, 1]", "[1, 0, 0]"]), TEXT))
    assert any("each different text is a class of its own" in problem.what and not problem.fatal for problem in told)


def test_names_of_lists_that_older_files_declare_are_found(tmp_path: Path) -> None:
    feature = {"names": ["no", "yes", "10"], "_type": "ClassLabel"}
    info = {"info": {"features": {"label": [feature], "text": {"dtype": "string", "_type": "Value"}}}}
    table = pa.table({"text": ["a", "b"], "label": [[2], [0, 1]]}).replace_schema_metadata(
        {"huggingface": json.dumps(info)}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert [sorted(row) for row in come_back(read(tmp_path / "a.parquet", TEXT))] == [["10"], ["no", "yes"]]


def test_a_number_spelled_otherwise_is_no_name_that_a_model_has(tmp_path: Path) -> None:
    known = TEXT.prepare(TEXT.Options(), {"train": read(write_csv(tmp_path / "a.csv", ["7", "v3.1", "8"]), TEXT)})
    for label in ("007", "3.10"):
        other = read(write_csv(tmp_path / "b.csv", [label, "7", "v3.1"]), TEXT)
        with pytest.raises(DataError, match=f'"{label}"'):
            encode_labels(other, "label", known.label_names, known.are_codes)
