"""Sentences with animals and places in them, and a tiny BERT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from task_sample import Sample, write_splits

PLACES = (["garden"], ["old", "house"], ["morning", "garden"], ["house"])
ANIMALS = ("cat", "dog", "cow", "horse", "bird", "fish")


def make(folder: Path, fixture: Callable[[str], Path]) -> Sample:
    rows = [
        {
            "tokens": [*start, animal, "in", "the", *place],
            "ner_tags": [*("O" for _ in start), "B-animal", "O", "O", "B-place", *("I-place" for _ in place[1:])],
        }
        for start in (["there", "is", "a"], ["we", "had", "one"])
        for place in PLACES
        for animal in ANIMALS
    ]
    rows = [rows[number * 7 % len(rows)] for number in range(len(rows))]
    names = ["O", "B-animal", "B-place", "I-place"]
    short = [{**row, "ner_tags": row["ner_tags"][1:]} for row in rows]
    blank = [{**row, "tokens": [" ", *row["tokens"][1:]]} for row in rows]
    text = [{**row, "tokens": " ".join(row["tokens"])} for row in rows]
    numbers = [{**row, "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in rows]
    return Sample(
        model=fixture("tiny_bert"),
        data=write_splits(folder / "data", rows),
        options={"max_length": 24},
        bad=[
            (write_splits(folder / "short", short), "another number of tags"),
            (write_splits(folder / "blank", blank), "blank words"),
            (write_splits(folder / "text", text), "lists of text"),
            (write_splits(folder / "numbers", numbers), "nothing names them"),
        ],
        shown="B-animal",
    )
