"""How fast each part of the model learns: the head at its own rate, each block a little slower than the one above it.

Discriminative rates are from Howard & Ruder (2018), "Universal Language Model Fine-tuning for Text Classification",
section 3.2.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.recipe import Transfer
from orchestrator.recipe.sections import Positive, Section
from orchestrator.transfer.base import Method, Model


class LayerRatesOptions(Section):
    """Options of `layer-rates`, which `transfer.layer_decay` and `transfer.head.learning_rate_multiplier` imply."""

    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each block learns at this multiple of the rate of the block above it; the last layer has it once."""
    head: Positive = 1.0
    """The head learns at this multiple of the peak rate."""


class LayerRates(Method):
    """Learning rates that fall from the head to the stem."""

    name = "layer-rates"
    Options = LayerRatesOptions
    options: LayerRatesOptions

    @classmethod
    def implied(cls, transfer: Transfer) -> LayerRatesOptions | None:
        decay = 1.0 if transfer.layer_decay is None else transfer.layer_decay
        options = LayerRatesOptions(decay=decay, head=transfer.head.learning_rate_multiplier)
        return None if options == LayerRatesOptions() else options

    def multipliers(self, model: Model) -> dict[str, float]:
        """Return the head's multiple, and for each block below it the decay to the power of its distance.

        The last layer (and the tail, which follows it) has the decay once, the stem below n layers n + 1 times.
        """
        blocks = model.blocks
        ladder = [blocks.tail, *reversed(blocks.layers), blocks.stem]
        multipliers = dict.fromkeys(blocks.head.parameters, self.options.head)
        for depth, block in enumerate(ladder):
            multipliers.update(dict.fromkeys(block.parameters, self.options.decay ** max(1, depth)))
        return multipliers


METHOD = LayerRates
