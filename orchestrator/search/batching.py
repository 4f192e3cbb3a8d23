"""Which trials train only the head, and which of those can be trained as one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Train
from orchestrator.search.outcome import Spec
from orchestrator.search.space import trial_recipe

# Heads in one pack may differ in these parts of `train`, which say how fast they learn.
MAY_DIFFER = {"learning_rate", "weight_decay", "schedule", "warmup_ratio"}
SMALLEST = 2


def pack_trials(recipe: Recipe, specs: Iterable[Spec], num_packs: int) -> tuple[list[list[Spec]], list[Spec]]:
    """Which trials can be trained together, and the others.

    Args:
        num_packs: how many packs each group of like trials becomes, at most: as many as run at a time.
    """
    groups: dict[str, list[Spec]] = {}
    others = []
    for spec in specs:
        trial = trial_recipe(recipe, spec.parameters)
        if trains_only_the_head(trial):
            groups.setdefault(likeness(trial), []).append(spec)
        else:
            others.append(spec)
    packs = []
    for group in groups.values():
        count = max(1, min(num_packs, len(group) // SMALLEST))
        packs += [group[start::count] for start in range(count)]
    others += [spec for pack in packs if len(pack) < SMALLEST for spec in pack]
    return [pack for pack in packs if len(pack) >= SMALLEST], others


def trains_only_the_head(recipe: Recipe) -> bool:
    """Whether a trial may be one of batched heads, which know neither phases nor methods other than rates."""
    if recipe.transfer.phases is not None or recipe.transfer.methods:
        return False
    one_process = recipe.scale.workers == 1 and recipe.scale.zero_stage == 0 and recipe.scale.engine != "deepspeed"
    frozen = recipe.transfer.freeze == "all" and recipe.transfer.adapter is None
    return one_process and frozen and recipe.train.cache_prefix is not False


def likeness(recipe: Recipe) -> str:
    """Equal for trials that differ only in how fast they learn."""
    plain: dict[str, Any] = recipe.model_dump(mode="json", exclude={"name": True, "train": MAY_DIFFER, "search": True})
    assert Train.model_fields.keys() >= MAY_DIFFER
    return json.dumps(plain, sort_keys=True)
