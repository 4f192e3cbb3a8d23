"""The search space of a recipe that names none: freeze depth, and learning rate in the ranges of the task."""

from __future__ import annotations

import math

from orchestrator.recipe.schema import Case, Recipe, Search
from orchestrator.tasks import find_task

MAX_DEPTHS = 6


def default_space(recipe: Recipe, num_parameters: int | None = None) -> dict[str, tuple[Case, ...]]:
    """Return the space of a recipe that names none.

    Rates are never on one axis for full tuning, adapters and probes: each has a case of its own. Depths are shares of
    the model, so that they fit any.

    Args:
        num_parameters: of the source model; None for the size of BERT.
    """
    rates = find_task(recipe.target.task).rates(num_parameters)
    space: dict[str, tuple[Case, ...]] = {}
    depths = default_depths(recipe)
    if len(depths) > 1:
        space["transfer.freeze"] = (Case(choice=list(depths)),)
    space["train.learning_rate"] = (
        Case(when={"transfer.freeze": "all"}, loguniform=list(rates.probe)),
        Case(when={"transfer.adapter.type": "lora"}, loguniform=list(rates.adapter)),
        Case(loguniform=list(rates.full)),
    )
    return space


def default_depths(recipe: Recipe) -> list[int | str]:
    """Return freeze depths from nothing to all, evenly spread; none where the recipe leaves no choice.

    A grid has about as many depths as rates. Other algorithms draw from six.
    """
    search, transfer = recipe.search or Search(), recipe.transfer
    if transfer.from_scratch or search.scheduler == "pbt":
        return []
    grid = search.algorithm == "grid"
    count = min(MAX_DEPTHS, round(math.sqrt(search.trials))) if grid else MAX_DEPTHS
    # With an adapter, or rates that fall with the depth, some blocks must be left to train; so they must where the head
    # is the source's own, which may even be its embeddings.
    task = find_task(recipe.target.task)
    whole = transfer.adapter is None and transfer.layer_decay is None and task.head != "kept"
    parts = max(count - 1, 1) if whole else count
    shares: list[int | str] = [f"{100 * index // parts}%" for index in range(1, count - 1 if whole else count)]
    return [task.shallowest_freeze, *shares, *(["all"] if whole and count > 1 else [])]
