"""Hold the weights near those of the source: L2-SP.

Li, Grandvalet & Davoine (2018), "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", section
3.2, adds to the loss

    weight / 2 * |w - w0|^2 + new_weight / 2 * |v|^2

where w are the weights that the source has, w0 their values there, and v those that it does not have. AdamW's own
weight decay draws all of them to zero: `train.weight_decay: 0` leaves that to this method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.sections import NotNegative, Section
from orchestrator.transfer.base import Added, Method, Model, TrainedPart

if TYPE_CHECKING:
    from torch import Tensor

BYTES_OF_FP32 = 4


class L2SPOptions(Section):
    """Options of `l2-sp`."""

    weight: NotNegative = 0.01
    """How strongly weights are held at those of the source; 0 turns the method off, unless `new_weight` is given."""
    new_weight: NotNegative | None = None
    """How strongly weights that the source does not have are drawn to 0; null for `weight`."""


class L2SP(Method):
    """A penalty on the distance from the source's weights."""

    name = "l2-sp"
    Options = L2SPOptions
    options: L2SPOptions

    def check(self, recipe: Recipe) -> list[Problem]:
        transfer = recipe.transfer
        clashes = {
            "transfer.from_scratch": (transfer.from_scratch, "has no source to stay near"),
            "transfer.adapter": (transfer.adapter is not None, "trains new weights beside those of the source"),
        }
        remedy = "remove one of the two"
        return [
            Problem(f"`l2-sp` holds weights near the source's, but `{key}` {why}", recipe.origin.where(key), remedy)
            for key, (holds, why) in clashes.items()
            if holds
        ]

    def build(self, model: Model) -> None:
        """Keep the source's values of what is trained."""
        kept = {name: value for name, value in model.module.named_parameters() if value.requires_grad}
        self._whole = {
            name: value.detach().float().clone() for name, value in kept.items() if name not in model.new_parameters
        }
        self._parts: dict[str, Tensor] = {}

    def gradient(self, part: TrainedPart, step: int) -> Tensor | None:
        is_new = part.name not in self._whole and part.name not in self._parts
        new_weight = self.options.weight if self.options.new_weight is None else self.options.new_weight
        weight = new_weight if is_new else self.options.weight
        if weight == 0.0:
            return None
        difference = part.value if is_new else part.value - self._source(part)
        part.gradient.add_(difference, alpha=weight)
        return weight / 2 * difference.square().sum()

    def _source(self, part: TrainedPart) -> Tensor:
        """Return the source's values of this worker's part; the rest of them is not kept."""
        if part.name not in self._parts:
            whole = self._whole.pop(part.name)
            self._parts[part.name] = part.of(whole).to(part.value.device, copy=True)
        return self._parts[part.name]

    def plan(self) -> Added:
        # The source's values; a difference, a square, a sum and an addition to the gradient.
        return Added(bytes_per_number=BYTES_OF_FP32, operations_per_number=5)


METHOD = L2SP
