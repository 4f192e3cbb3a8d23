"""Finds the trials that train only the head, and groups those that can be trained as one batch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Train
from orchestrator.search.outcome import Spec
from orchestrator.search.space import trial_recipe

MAY_DIFFER = {"learning_rate", "weight_decay", "schedule", "warmup_ratio"}
"""Keys of `train`, all about how fast the head learns, that may differ within a batch."""
MIN_BATCH_SIZE = 2


def batch_trials(recipe: Recipe, specs: Iterable[Spec], max_batches: int) -> tuple[list[list[Spec]], list[Spec]]:
    """Return the batches of trials that can be trained together, and the other trials.

    Args:
        max_batches: most batches that a group of alike trials is divided into: as many as run at a time.
    """
    groups: dict[str, list[Spec]] = {}
    others = []
    for spec in specs:
        trial = trial_recipe(recipe, spec.parameters)
        if trains_only_the_head(trial):
            groups.setdefault(group_key(trial), []).append(spec)
        else:
            others.append(spec)
    batches = []
    for group in groups.values():
        count = max(1, min(max_batches, len(group) // MIN_BATCH_SIZE))
        batches += [group[start::count] for start in range(count)]
    others += [spec for batch in batches if len(batch) < MIN_BATCH_SIZE for spec in batch]
    return [batch for batch in batches if len(batch) >= MIN_BATCH_SIZE], others


def trains_only_the_head(recipe: Recipe) -> bool:
    """Whether the run trains only the head, on stored features, in one process.

    Batched heads know neither phases nor methods other than rates.
    """
    if recipe.transfer.phases is not None or recipe.transfer.methods:
        return False
    one_process = recipe.scale.workers == 1 and recipe.scale.zero_stage == 0 and recipe.scale.engine != "deepspeed"
    frozen = recipe.transfer.depth.freezes_body and recipe.transfer.adapter is None
    return one_process and frozen and recipe.train.cache_prefix is not False


def group_key(recipe: Recipe) -> str:
    """Return a text that is equal for trials that differ only in how fast they learn."""
    plain: dict[str, Any] = recipe.model_dump(mode="json", exclude={"name": True, "train": MAY_DIFFER, "search": True})
    assert Train.model_fields.keys() >= MAY_DIFFER
    return json.dumps(plain, sort_keys=True)
