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

from orchestrator.process import set_process_defaults
from orchestrator.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from orchestrator.jobs.submit import Submitted
    from orchestrator.launch.train import Run
    from orchestrator.planning.plan import TrainingPlan
    from orchestrator.search.run import SearchRun

set_process_defaults()
__version__ = "0.1.0"
__all__ = ["Recipe", "load_recipe", "plan", "search", "submit", "train"]


def train(
    recipe: Recipe,
    output: Path | str | None = None,
    fresh: bool = False,
    strict: bool = False,
    screen: TextIO | None = None,
) -> Run:
    """Train a recipe; see `orchestrator.launch.train.train`."""
    # torch and Ray take seconds to import; reading recipes does not need them.
    from orchestrator.launch.train import train as run_training

    return run_training(recipe, output, fresh, strict, screen)


def search(
    recipe: Recipe, output: Path | None = None, fresh: bool = False, strict: bool = False, screen: TextIO | None = None
) -> SearchRun:
    """Run a search; see `orchestrator.search.run.search`."""
    from orchestrator.search.run import search as run_search

    return run_search(recipe, output, fresh, strict, screen)


def plan(recipe: Recipe, on: str | None = None, examples: int | None = None, like: Path | None = None) -> TrainingPlan:
    """Estimate memory, time and disk of a training; see `orchestrator.planning.plan.plan`.

    Args:
        on: machines such as `4x8xH100-80GB`; None for this one.
        examples: of *train*, where the data are not on this machine.
        like: the directory of a run on the same kind of machine, whose pace is taken.
    """
    from orchestrator.planning import parse_machine
    from orchestrator.planning.plan import plan as plan_training

    return plan_training(recipe, parse_machine(on) if on else None, examples, like)


def submit(
    recipe: Recipe,
    address: str | None = None,
    verb: str = "train",
    *,
    shared: Sequence[Path] = (),
    variables: Sequence[str] = (),
    insecure: bool = False,
) -> Submitted:
    """Submit a recipe to a Ray cluster; see `orchestrator.jobs.submit.submit` and `.client.connect`."""
    from orchestrator.jobs import connect
    from orchestrator.jobs import submit as submit_recipe
    from orchestrator.training.pictures import find_named_pictures

    cluster, pictures = connect(address, insecure), find_named_pictures(recipe)
    return submit_recipe(recipe, cluster, verb, __version__, shared=shared, variables=variables, pictures=pictures)
