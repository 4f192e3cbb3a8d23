"""Questions with a better and a worse answer, and a tiny GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from task_sample import SPLITS, Sample, compute_token_losses, write_splits


def make(folder: Path, fixture: Callable[[str], Path]) -> Sample:
    rows = [
        {"prompt": f"is {number} a number?", "chosen": " yes" * (number % 3 + 1), "rejected": " no, never"}
        for number in range(sum(SPLITS.values()))
    ]
    return Sample(
        model=fixture("tiny_gpt2"),
        data=write_splits(folder / "data", rows),
        options={"max_length": 48},
        bad=[
            (write_splits(folder / "blank", [{**row, "rejected": ""} for row in rows]), "rejected is blank"),
            (write_splits(folder / "one", [{"chosen": row["chosen"]} for row in rows]), "no column rejected"),
        ],
        shown="rejected: ",
        run_plain=compute_token_losses,
    )
