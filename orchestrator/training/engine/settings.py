"""The engine and the micro batch size that a recipe implies."""

from __future__ import annotations

from orchestrator.recipe import Recipe


def micro_batch_size(recipe: Recipe) -> int:
    """Return the number of examples per pass: the recipe's, or a worker's share of the global batch, at most 32."""
    if recipe.train.micro_batch_size != "auto":
        return recipe.train.micro_batch_size
    share = recipe.train.global_batch_size // recipe.scale.workers
    passes = -(-share // 32)
    return -(-share // passes)


def uses_deepspeed(recipe: Recipe) -> bool:
    """Whether a recipe is trained with DeepSpeed rather than plain PyTorch."""
    if recipe.scale.engine == "auto":
        return recipe.scale.zero_stage > 0
    return recipe.scale.engine == "deepspeed"


def autocasts(recipe: Recipe, precision: str) -> bool:
    """Whether passes compute in bf16 with fp32 weights. ZeRO's stages hold the weights themselves in bf16."""
    return precision == "bf16" and recipe.scale.zero_stage == 0
