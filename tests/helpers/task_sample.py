"""The sample on which the contract of tasks is checked, which each task's module in tests/tasks/samples provides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SPLITS = {"train": 24, "select": 10, "test": 10}
"""Examples of each split of a sample, as a rule: few, so that the whole contract takes seconds."""


def run_plain(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the outputs of a model that transformers has loaded, as the task's `predict` takes them."""
    return model(**inputs)


def compute_token_losses(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the loss of each target, and whether it is the most probable token, of a plain language model."""
    import torch
    from torch.nn import functional

    targets = inputs["target_ids"]
    given = {name: value for name, value in inputs.items() if name != "target_ids"}
    logits = model(**given, use_cache=False).logits.float()
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    hits = (logits.argmax(-1) == targets).float()
    return SimpleNamespace(token_losses=torch.stack([losses, hits], -1))


@dataclass(frozen=True)
class Sample:
    """Data of a few rows and a tiny model for one task."""

    model: Path
    """A folder with a tiny model of two layers or more, and its tokenizer or image processor."""
    data: Path
    """A folder with the splits train, select and test."""
    bad: Sequence[tuple[Path, str]]
    """Folders of data that are to be refused, each with words of the message."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's `target.options`."""
    freeze: int = 1
    """The freeze depth of the runs; at least one layer must be left to train."""
    shown: str = ""
    """Words that the preview of the first example shows."""
    run_plain: Callable[[Any, dict[str, Any]], Any] = run_plain
    """Calls an exported model without this package."""


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_splits(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write different rows as the three splits of `SPLITS`; returns the folder."""
    assert len(rows) >= sum(SPLITS.values())
    start = 0
    for split, size in SPLITS.items():
        write_rows(folder / f"{split}.jsonl", rows[start : start + size])
        start += size
    return folder
