"""What is searched when a recipe names no space: freeze depth and learning rate, in ranges that suit the model.

Full tuning of encoders as Devlin et al. 2019 (smaller ones want higher rates); LoRA's best rate is about ten times that
of full tuning (Schulman et al. 2025); a head on frozen blocks takes rates a hundred times as high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.recipe.schema import Case, Recipe, Search
from orchestrator.tasks import find_task

SMALL = 50_000_000
LARGE = 1_000_000_000
MAX_DEPTHS = 6


@dataclass(frozen=True)
class Rates:
    """Lowest and highest learning rate worth a trial."""

    full: tuple[float, float]
    """When the blocks themselves are tuned."""
    adapter: tuple[float, float]
    probe: tuple[float, float] = (3e-3, 1.0)
    """When only the head is trained."""


_IMAGE = Rates((1e-5, 1e-3), (1e-4, 1e-2))
_SPEECH = Rates((1e-5, 1e-4), (1e-4, 1e-3))
_SMALL_TEXT = Rates((5e-5, 5e-4), (3e-4, 3e-3))
_TEXT = Rates((1e-5, 5e-5), (1e-4, 1e-3))
_LARGE_TEXT = Rates((3e-6, 3e-5), (5e-5, 5e-4))


def default_space(recipe: Recipe, num_parameters: int | None = None) -> dict[str, tuple[Case, ...]]:
    """The space of a recipe that names none.

    Rates are never on one axis for full tuning, adapters and probes: each has a case of its own. Depths are shares of
    the model, so that they fit any.

    Args:
        num_parameters: of the source model; None for the size of BERT.
    """
    rates = rates_of(recipe.target.task, num_parameters)
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


def rates_of(task: str, num_parameters: int | None = None) -> Rates:
    """Rates for a task, by the first word of its name (`image-classification`), and for the size of the model."""
    kind = task.partition("-")[0]
    if kind == "image":
        return _IMAGE
    if kind in ("audio", "speech"):
        return _SPEECH
    if num_parameters is None or SMALL <= num_parameters < LARGE:
        return _TEXT
    return _SMALL_TEXT if num_parameters < SMALL else _LARGE_TEXT


def default_depths(recipe: Recipe) -> list[int | str]:
    """Freeze depths from nothing to all, evenly spread; none where the recipe leaves no choice.

    A grid has about as many depths as rates. Other algorithms draw from six.
    """
    search, transfer = recipe.search or Search(), recipe.transfer
    if transfer.from_scratch or search.scheduler == "pbt":
        return []
    grid = search.algorithm == "grid"
    count = min(MAX_DEPTHS, round(math.sqrt(search.trials))) if grid else MAX_DEPTHS
    # With an adapter, or rates that fall with the depth, some blocks must be left to train; so they must where the head
    # is the source's own, which may even be its embeddings.
    has_new_head = find_task(recipe.target.task).has_new_head
    whole = transfer.adapter is None and transfer.layer_decay is None and has_new_head
    parts = max(count - 1, 1) if whole else count
    shares: list[int | str] = [f"{100 * index // parts}%" for index in range(1, count - 1 if whole else count)]
    lowest: int | str = "stem" if recipe.target.task.partition("-")[0] in ("audio", "speech") else 0
    return [lowest, *shares, *(["all"] if whole and count > 1 else [])]
