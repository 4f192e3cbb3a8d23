"""What the tests of methods share: a model without dropout, and runs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from method_samples import CURVE

from orchestrator import load_recipe
from orchestrator.recipe import Recipe


@pytest.fixture(scope="session")
def still_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without dropout, so that the cut of a batch does not matter."""
    folder = tmp_path_factory.mktemp("still") / "bert"
    folder.mkdir()
    for file in tiny_bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def curve_recipe(still_bert: Path, small_data: Path, write_toy: Callable[..., Path], tmp_path: Path) -> Any:
    """Return the recipe of a few steps without dropout, with a section `transfer`, and overrides on top."""

    def write(transfer: dict[str, Any], *overrides: str) -> Recipe:
        sections = {"limit": CURVE["target"]["limit"], "options": {"max_length": 32}}
        path = tmp_path / "recipe.yaml"
        transfer = {**transfer, "head": {"dropout": 0.0, **transfer.get("head", {})}}
        write_toy(path, still_bert, small_data, target=sections, train=CURVE["train"], transfer=transfer)
        return load_recipe(path, overrides)

    return write
