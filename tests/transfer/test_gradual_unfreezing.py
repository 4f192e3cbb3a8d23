"""Gradual unfreezing: the head first, then one block more in each phase, from the last one down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from method_samples import MethodSample

from orchestrator import load_recipe
from orchestrator.errors import RecipeError
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.training.phases import find_phases
from orchestrator.training.prepare import prepare
from orchestrator.transfer import read_methods
from orchestrator.transfer.gradual_unfreezing import GradualUnfreezing, GradualUnfreezingOptions

# The head; the last layer; the first one: 3 steps each. Then the whole model for 6.
SAMPLE = MethodSample({"methods": [{"name": "gradual-unfreezing"}]}, steps=15)
Write = Callable[..., Recipe]


def depths(freeze: int | str, num_layers: int = 4, **options: Any) -> list[tuple[int | str | None, float | None]]:
    text = "name: x\nsource: {model: a/b}\ntarget: {task: text-classification, data: x.jsonl}\n"
    recipe = parse_recipe(f"{text}transfer: {{freeze: {freeze}}}")
    method = GradualUnfreezing(GradualUnfreezingOptions(**options), "transfer.methods.0")
    return [(phase.freeze, phase.epochs) for phase in method.phases(recipe, num_layers)]


def test_each_phase_has_one_block_more() -> None:
    assert depths(0) == [("all", 1.0), (3, 1.0), (2, 1.0), (1, 1.0), ("stem", 1.0), (0, None)]


def test_it_ends_at_the_freeze_depth_of_the_recipe() -> None:
    assert depths(2, epochs=0.5) == [("all", 0.5), (3, 0.5), (2, None)]
    assert depths("stem") == [("all", 1.0), (3, 1.0), (2, 1.0), (1, 1.0), ("stem", None)]
    assert depths("50%") == [("all", 1.0), (3, 1.0), ("50%", None)]


def test_the_last_phase_is_as_long_as_the_recipe_says(curve_recipe: Write) -> None:
    recipe = curve_recipe(SAMPLE.transfer, "transfer.methods.0.epochs=0.5", "train.epochs=null", "train.steps=9")
    phases = find_phases(prepare(recipe))
    assert [(phase.recipe.train.epochs, phase.recipe.train.steps) for phase in phases] == [(0.5, None)] * 3 + [
        (None, 9)
    ]
    assert [phase.name for phase in phases] == ["unfreeze-0", "unfreeze-1", "unfreeze-2", "tune"]


@pytest.mark.parametrize(
    ("transfer", "key"),
    [
        ({"freeze": "all"}, "transfer.freeze"),
        ({"from_scratch": True}, "transfer.from_scratch"),
        ({"adapter": {"type": "lora"}}, "transfer.adapter"),
    ],
)
def test_what_it_cannot_go_with_is_refused_at_its_line(
    transfer: dict[str, Any], key: str, write_recipe: Callable[..., Path]
) -> None:
    recipe = load_recipe(write_recipe(transfer={**SAMPLE.transfer, **transfer}))
    with pytest.raises(RecipeError, match=rf"recipe.yaml:\d+ \({key}\): `gradual-unfreezing`"):
        read_methods(recipe)


def test_phases_are_said_in_one_place(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(transfer={**SAMPLE.transfer, "phases": [{"name": "tune"}]}))
    with pytest.raises(RecipeError, match=r"`gradual-unfreezing` and `transfer.phases` each say which phases"):
        read_methods(recipe)
