"""Sentences of three classes, and a tiny BERT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from task_sample import Sample, write_splits

THINGS = {"animal": ("cat", "dog", "cow"), "fruit": ("pear", "plum", "peach"), "vehicle": ("car", "tram", "bus")}
PLACES = ("garden", "house", "morning", "old house today", "garden again")


def make(folder: Path, fixture: Callable[[str], Path]) -> Sample:
    rows = [
        {"text": f"{start} {word} in the {place}", "label": label}
        for start in ("there is a", "we had one")
        for place in PLACES
        for label, words in THINGS.items()
        for word in words
    ]
    rows = [rows[number * 7 % len(rows)] for number in range(len(rows))]
    fractions = [{"text": row["text"], "label": ["a", 1][number % 2]} for number, row in enumerate(rows)]
    return Sample(
        model=fixture("tiny_bert"),
        data=write_splits(folder / "data", rows),
        options={"max_length": 16},
        bad=[
            (write_splits(folder / "blank", [{**row, "text": " "} for row in rows]), "text is blank"),
            (write_splits(folder / "one", [{**row, "label": "x"} for row in rows]), "have the same label"),
            (write_splits(folder / "nothing", [{"label": row["label"]} for row in rows]), "no column text"),
            (write_splits(folder / "types", fractions), "label"),
        ],
        shown="there is",
    )
