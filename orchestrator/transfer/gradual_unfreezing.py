"""Train the head first, then one block more in each phase, from the last one down.

Howard & Ruder (2018), "Universal Language Model Fine-tuning for Text Classification", section 3.3.
"""

from __future__ import annotations

from orchestrator.errors import Problem
from orchestrator.recipe import Phase, Recipe
from orchestrator.recipe.freeze_depth import WrittenDepth
from orchestrator.recipe.sections import Positive, Section
from orchestrator.transfer.base import Method


class GradualUnfreezingOptions(Section):
    """Options of `gradual-unfreezing`."""

    epochs: Positive = 1.0
    """Passes over the training data in each phase but the last, which has `train.epochs` or `train.steps`."""


class GradualUnfreezing(Method):
    """Phases in which ever more blocks are trained: down to `transfer.freeze`, which stays frozen throughout."""

    name = "gradual-unfreezing"
    Options = GradualUnfreezingOptions
    options: GradualUnfreezingOptions

    def check(self, recipe: Recipe) -> list[Problem]:
        transfer = recipe.transfer
        clashes = {
            "transfer.freeze": (transfer.freeze == "all", "is `all`, which leaves no block to unfreeze"),
            "transfer.from_scratch": (transfer.from_scratch, "would freeze random weights"),
            "transfer.adapter": (transfer.adapter is not None, "lies above one freeze depth in all phases"),
        }
        remedy = "remove one of the two"
        return [
            Problem(
                f"`gradual-unfreezing` unfreezes block by block, but `{key}` {why}", recipe.origin.where(key), remedy
            )
            for key, (holds, why) in clashes.items()
            if holds
        ]

    def phases(self, recipe: Recipe, num_layers: int) -> list[Phase]:
        from orchestrator.models import resolve_depth  # Which imports torch.

        where = recipe.origin.where("transfer.freeze")

        def num_frozen(depth: WrittenDepth) -> tuple[bool, int, bool]:
            found = resolve_depth(depth, num_layers, where)
            return found.stem, found.num_layers, found.tail

        last = num_frozen(recipe.transfer.freeze)
        depths: list[WrittenDepth] = ["all", *range(num_layers - 1, 0, -1), "stem"]
        deeper = [depth for depth in depths if num_frozen(depth) > last]
        epochs = self.options.epochs
        return [
            *(Phase(name=f"unfreeze-{number}", freeze=depth, epochs=epochs) for number, depth in enumerate(deeper)),
            Phase(name="tune", freeze=recipe.transfer.freeze),
        ]


METHOD = GradualUnfreezing
