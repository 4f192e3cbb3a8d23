"""Fine-tune pre-trained models from recipes, from a laptop to a GPU cluster.

import orchestrator

recipe = orchestrator.load_recipe("text-classification/minilm-to-support-intent", ["train.epochs=2"])
run = orchestrator.train(recipe)
print(run.result["metrics"]["test"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from orchestrator.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from orchestrator.jobs.submit import Submitted
    from orchestrator.search.run import SearchRun
    from orchestrator.training.run import Run

__version__ = "0.1.0"
__all__ = ["Recipe", "load_recipe", "search", "submit", "train"]


def train(
    recipe: Recipe, output: Path | None = None, fresh: bool = False, strict: bool = False, screen: TextIO | None = None
) -> Run:
    """Train as the recipe says; see `orchestrator.training.run.train`."""
    # torch and Ray take seconds to import; reading recipes does not need them.
    from orchestrator.training.run import train as run_training

    return run_training(recipe, output, fresh, strict, screen)


def search(
    recipe: Recipe, output: Path | None = None, fresh: bool = False, strict: bool = False, screen: TextIO | None = None
) -> SearchRun:
    """Search as the recipe says; see `orchestrator.search.run.search`."""
    from orchestrator.search.run import search as run_search

    return run_search(recipe, output, fresh, strict, screen)


def submit(
    recipe: Recipe,
    address: str | None = None,
    verb: str = "train",
    *,
    shared: Sequence[Path] = (),
    variables: Sequence[str] = (),
    insecure: bool = False,
) -> Submitted:
    """Send a recipe to a Ray cluster; see `orchestrator.jobs.submit.submit` and `orchestrator.jobs.client.connect`."""
    from orchestrator.jobs import connect
    from orchestrator.jobs import submit as submit_recipe

    return submit_recipe(recipe, connect(address, insecure), verb, __version__, shared=shared, variables=variables)
