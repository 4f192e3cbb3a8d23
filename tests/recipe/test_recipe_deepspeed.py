"""`scale.deepspeed`: what DeepSpeed reads is handed on, what the recipe says elsewhere is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import load_recipe
from orchestrator.errors import RecipeError
from orchestrator.training.engine.deepspeed_config import check_deepspeed, deepspeed_config

WriteRecipe = Callable[..., Path]


def scale(given: Any, **more: Any) -> dict[str, Any]:
    return {"zero_stage": 2, **more, "deepspeed": given}


def test_what_is_given_is_handed_on_beside_what_the_recipe_says(write_recipe: WriteRecipe) -> None:
    given = {
        "zero_optimization": {"stage": "auto", "overlap_comm": False, "reduce_bucket_size": 1000},
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
    }
    recipe = load_recipe(write_recipe(scale=scale(given), train={"global_batch_size": 8}))
    check_deepspeed(recipe)
    config = deepspeed_config(recipe, "fp32", 8, 1000)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000}
    assert config["train_batch_size"] == 8
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("given", "more", "words"),
    [
        ({"train_batch_size": 32}, {}, "says again what `train.global_batch_size` says"),
        ({"bf16": {"enabled": True}}, {}, "says again what `train.precision` says"),
        ({"optimizer": {"type": "Adam"}}, {}, "says again what `train.learning_rate` says"),
        ({"zero_optimization": {"stage": 3}}, {}, "says again what `scale.zero_stage` says \\(2\\)"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            {"offload": "optimizer"},
            "says again what `scale.offload` says",
        ),
        (
            {"zero_optimisation": {}},
            {},
            "nothing that DeepSpeed is known to read[\\s\\S]*did you mean zero_optimization",
        ),
        ({"zero_optimization": [1]}, {}, "give a mapping"),
        ({"wall_clock_breakdown": True}, {"zero_stage": 0}, "does not run with DeepSpeed"),
    ],
)
def test_contradictions_are_refused_at_their_place(
    given: dict[str, Any], more: dict[str, Any], words: str, write_recipe: WriteRecipe
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(scale=scale(given, **more), train={"global_batch_size": 8}))


@pytest.mark.parametrize("zero", [{"overlap_com": True}, {"reduce_bucket_size": -1}])
def test_what_deepspeed_refuses_is_refused_before_anything_starts(
    zero: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(scale=scale({"zero_optimization": zero}), train={"global_batch_size": 8}))
    with pytest.raises(RecipeError, match=f"DeepSpeed rejects zero_optimization.{next(iter(zero))}"):
        check_deepspeed(recipe)
