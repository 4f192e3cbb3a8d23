"""Several files in one split: so many examples of each, or such a share of an epoch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from orchestrator.data.examples import Examples
from orchestrator.errors import InputError
from orchestrator.training.prepare import read_inputs

WriteRecipe = Callable[..., Path]
SIZES = {"a": 40, "b": 20, "c": 10}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        rows = [{"text": f"{name} number {number} {'x' * number}", "label": f"{number % 2}"} for number in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def read(write_recipe: WriteRecipe, tiny_bert: Path, data: object, *overrides: str) -> dict[str, Examples]:
    path = write_recipe(
        source={"model": str(tiny_bert)},
        target={"task": "text-classification", "data": data, "options": {"max_length": 64}},
        train={"global_batch_size": 4},
    )
    return read_inputs(orchestrator.load_recipe(path, overrides)).examples


def counts(examples: Examples) -> Counter[str]:
    return Counter(text[0] for text in examples.table["text"].to_pylist())


def written_out(files: Path, train: list[str], **more: object) -> dict[str, object]:
    test = {"select": str(files / "c.jsonl"), "test": str(files / "c.jsonl")}
    return {"train": [str(files / name) for name in train], **test, **more}


def test_so_many_examples_are_drawn_from_a_file(write_recipe: WriteRecipe, tiny_bert: Path, files: Path) -> None:
    found = read(write_recipe, tiny_bert, written_out(files, ["a.jsonl#10", "b.jsonl"]))["train"]
    assert counts(found) == {"a": 10, "b": 20}
    more = read(write_recipe, tiny_bert, written_out(files, ["a.jsonl#15", "b.jsonl#99"]))["train"]
    assert counts(more) == {"a": 15, "b": 20}
    first, second = (set(each.table["text"].to_pylist()) for each in (found, more))
    assert {text for text in first if text[0] == "a"} < second
    assert "a number 0 " not in first or "a number 9 xxxxxxxxx" not in first  # Drawn, not the beginning.
    texts = found.table["text"].to_pylist()
    assert [found.where(row).rpartition(":")[2] for row in range(10)] == [
        str(int(text.split()[2]) + 1) for text in texts[:10]
    ]


def test_another_seed_of_the_split_draws_others(write_recipe: WriteRecipe, tiny_bert: Path, files: Path) -> None:
    draws = {
        tuple(
            read(write_recipe, tiny_bert, written_out(files, ["a.jsonl#10"]), f"target.split.seed={seed}")["train"]
            .table["text"]
            .to_pylist()
        )
        for seed in (0, 0, 1)
    }
    assert len(draws) == 2


def test_a_count_goes_with_a_single_file_too(write_recipe: WriteRecipe, tiny_bert: Path, files: Path) -> None:
    found = read(write_recipe, tiny_bert, f"{files}/a.jsonl#30")
    assert sum(len(split) for split in found.values()) == 30


def test_a_file_that_is_called_so_is_taken_as_it_is(write_recipe: WriteRecipe, tiny_bert: Path, files: Path) -> None:
    (files / "b.jsonl").rename(files / "b#5")
    (files / "d#5.jsonl").write_bytes((files / "a.jsonl").read_bytes())
    found = read(write_recipe, tiny_bert, written_out(files, ["d#5.jsonl#7"]))["train"]
    assert counts(found) == {"a": 7}


def test_weights_are_shares_of_an_epoch(write_recipe: WriteRecipe, tiny_bert: Path, files: Path) -> None:
    found = read(write_recipe, tiny_bert, written_out(files, ["a.jsonl", "b.jsonl"], weights=[1.0, 3.0]))["train"]
    assert counts(found) == {"a": 15, "b": 45}
    repeats = Counter(text for text in found.table["text"].to_pylist() if text[0] == "b")
    assert set(repeats.values()) == {2, 3}
    assert len(repeats) == 20


def test_what_is_repeated_stays_out_of_the_cut_splits(write_recipe: WriteRecipe, tiny_bert: Path, files: Path) -> None:
    data = {"train": [str(files / "a.jsonl"), str(files / "b.jsonl")], "weights": [1.0, 5.0]}
    found = read(write_recipe, tiny_bert, data)
    texts = {name: split.table["text"].to_pylist() for name, split in found.items()}
    assert not set(texts["train"]) & {*texts["select"], *texts["test"]}
    for name in ("select", "test"):
        assert len(set(texts[name])) == len(texts[name])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"weights": [1.0]}, "1 numbers for 2 entries"),
        ({"weights": [1.0, 0.0]}, "weights.1"),
        ({"weights": [1.0, 1.0], "path": "folder"}, "weighs files"),
    ],
)
def test_weights_that_fit_nothing_are_refused(
    write_recipe: WriteRecipe, tiny_bert: Path, files: Path, data: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read(write_recipe, tiny_bert, written_out(files, ["a.jsonl", "b.jsonl"], **data))


def test_a_missing_file_with_a_count_is_named_without_it(
    write_recipe: WriteRecipe, tiny_bert: Path, files: Path
) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        read(write_recipe, tiny_bert, f"{files}/nothing.jsonl#5")
