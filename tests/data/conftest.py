"""Small data made in the test's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import Column, Examples, open_files
from orchestrator.data.fields.label import LabelField
from orchestrator.data.fields.text import TextField
from orchestrator.recipe import Recipe

COLUMNS = (
    Column("text", TextField(), aliases=("sentence", "content")),
    Column("text_pair", TextField(), required=False, aliases=("sentence2",)),
    Column("label", LabelField(), aliases=("intent",)),
)


@pytest.fixture
def columns() -> tuple[Column, ...]:
    return COLUMNS


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """A recipe on these data; `train` and others override whole sections."""

    def make(data: Any, **target: Any) -> Recipe:
        given = {"task": "text-classification", "data": data if isinstance(data, dict) else str(data), **target}
        return Recipe.model_validate({"name": "test", "source": {"model": "some/model"}, "target": given})

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows into a JSON Lines file of the test's folder."""

    def write(rows: Sequence[dict[str, Any]], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_examples(write_jsonl: Callable[..., Path]) -> Callable[..., Examples]:
    """Examples of (text, label) pairs, as if read from a file of that name."""

    def make(pairs: Sequence[tuple[Any, Any]], name: str = "train.jsonl") -> Examples:
        return open_files([write_jsonl([{"text": text, "label": label} for text, label in pairs], name)], COLUMNS, {})

    return make
