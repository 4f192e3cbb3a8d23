"""What the contract of methods needs of each method, and what it runs it on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

# 21 examples: the last of each epoch's 3 batches holds 5 of them, which do not divide evenly.
CURVE = {
    "target": {"limit": {"train": 21}},
    "train": {"epochs": 2, "global_batch_size": 8, "log_every": 1, "learning_rate": 3.0e-4},
}


@dataclass(frozen=True)
class MethodSample:
    """A method as a recipe uses it. The module `test_NAME.py` of a method has one, named SAMPLE."""

    transfer: dict[str, Any]
    """The section `transfer` of a recipe with the method."""
    off: dict[str, Any] | None = None
    """The same with weight 0; None for methods that have no weight."""
    terms: tuple[str, ...] = ()
    """Columns that it adds to the train rows."""
    steps: int = 6
    """Of the sample in all of its phases, where `train.epochs` is 2 epochs of 3 steps."""
    frozen: dict[str, Any] = field(default_factory=lambda: {"freeze": 1})
    """What freezes the stem and the first layer in all phases."""


def rows_of(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if row["split"] == split]


def weights_of(run: Path) -> dict[str, Any]:
    """The weights of the exported model."""
    return dict(load_file(run / "model" / "model.safetensors"))
