"""Questions with a better and a worse answer, and a tiny GPT-2."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from task_sample import SPLITS, Sample, write_splits


def make(folder: Path, fixture: Callable[[str], Path]) -> Sample:
    rows = [
        {"prompt": f"is {number} a number?", "chosen": " yes" * (number % 3 + 1), "rejected": " no, never"}
        for number in range(sum(SPLITS.values()))
    ]
    language = importlib.util.spec_from_file_location("causal_lm_sample", Path(__file__).with_name("causal_lm.py"))
    assert language is not None and language.loader is not None
    module = importlib.util.module_from_spec(language)
    language.loader.exec_module(module)
    return Sample(
        model=fixture("tiny_gpt2"),
        data=write_splits(folder / "data", rows),
        options={"max_length": 48},
        bad=[
            (write_splits(folder / "blank", [{**row, "rejected": ""} for row in rows]), "rejected is blank"),
            (write_splits(folder / "one", [{"chosen": row["chosen"]} for row in rows]), "no column rejected"),
        ],
        shown="rejected: ",
        run_plain=module.run_plain,
    )
