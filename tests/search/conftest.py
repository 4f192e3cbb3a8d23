"""What the tests of the search share: the toy problem, read and encoded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import load_recipe
from orchestrator.training.prepare import Prepared, prepare


@pytest.fixture(scope="session")
def prepared_toy(
    tmp_path_factory: pytest.TempPathFactory, write_toy: Callable[..., Path], tiny_bert: Path, small_data: Path
) -> Prepared:
    """The data of `write_recipe`, for plans of recipes that differ in `search`, `train` or `transfer`."""
    return prepare(load_recipe(write_toy(tmp_path_factory.mktemp("toy") / "recipe.yaml", tiny_bert, small_data)))
