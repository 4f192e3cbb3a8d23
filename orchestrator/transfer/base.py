"""The base class of methods: one way to move knowledge from source to target, with options and places to act.

Each place has a default that does nothing. The loop calls a method where the places say; the method knows neither the
loop, nor the engine, nor the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from orchestrator.errors import Problem
from orchestrator.recipe import Phase, Recipe, Transfer
from orchestrator.recipe.sections import Section
from orchestrator.tasks.base import Batch, Totals

if TYPE_CHECKING:  # Options are checked before torch is imported.
    from torch import Tensor, nn

    from orchestrator.models import Blocks


class Model(Protocol):
    """The model of a phase, as a method sees it."""

    @property
    def module(self) -> nn.Module:
        """The model with its head and adapter; what is trained has `requires_grad`."""

    @property
    def blocks(self) -> Blocks: ...

    @property
    def new_parameters(self) -> frozenset[str]:
        """Names of the parameters that the source did not have."""


@dataclass(frozen=True)
class TrainedPart:
    """This worker's part of a trained parameter, just before the optimizer's step.

    Without ZeRO it is the whole parameter, the same on all workers; with ZeRO each worker has another part of it.
    """

    name: str
    """As in `named_parameters()`."""
    value: Tensor
    """In fp32."""
    gradient: Tensor
    """The gradient of the loss of the global batch, before clipping. A method adds to it in place."""
    start: int = 0
    """Index of the part's first number in the flattened parameter."""

    def of(self, whole: Tensor) -> Tensor:
        """Return the same part of a tensor of the parameter's shape, in the shape of `value`."""
        if whole.shape == self.value.shape:
            return whole
        return whole.flatten()[self.start : self.start + self.value.numel()].view_as(self.value)


@dataclass(frozen=True)
class LossContext:
    """One forward pass of this worker in a step."""

    outputs: Any
    """The output of the model."""
    batch: Batch
    totals: Totals
    """Sums of the declared counts over the global batch, which a term is divided by."""
    step: int
    """Counted from 0."""


@dataclass(frozen=True)
class Added:
    """The cost of a method on each worker."""

    bytes_per_number: float = 0.0
    """Memory for each trained number that the worker holds an optimizer state of."""
    operations_per_number: float = 0.0
    """Floating-point operations for each of these in a step."""


class Method:
    """A method with its options. A subclass is found by the name of its file: `l2-sp` is `METHOD` in `l2_sp.py`.

    Attributes:
        options: as the recipe has them, checked.
        place: where the recipe has them, such as `transfer.methods.0`, for messages.
    """

    name: ClassVar[str]
    """As recipes name it; also the name of its term's column in metrics.jsonl."""
    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Any, place: str) -> None:
        self.options = options
        self.place = place

    @classmethod
    def implied(cls, transfer: Transfer) -> Section | None:
        """Return the options that keys of `transfer` besides `methods` ask for; None where they do not ask for it."""
        return None

    def check(self, recipe: Recipe) -> list[Problem]:
        """Return what the method cannot be combined with, each with the place in the recipe and a remedy."""
        return []

    def phases(self, recipe: Recipe, num_layers: int) -> list[Phase] | None:
        """Return the phases of the run; None where the method does not decide about them.

        Args:
            num_layers: of the source model, between its stem and its head.
        """
        return None

    def build(self, model: Model) -> None:
        """Prepare for a phase: the model has the source's weights, also of what earlier phases have changed."""

    def multipliers(self, model: Model) -> dict[str, float]:
        """Return the multiples of the learning rate, by the names of parameters; 1 for those that it leaves out."""
        return {}

    def loss(self, context: LossContext) -> Tensor | None:
        """Return this pass's share of a term that is added to the task's loss over the global batch; None for none.

        As the task's loss it must not depend on how the batch is cut: a sum over examples or targets, divided by one of
        the totals.
        """
        return None

    def gradient(self, part: TrainedPart, step: int) -> Tensor | None:
        """Add to a part's gradient in place, once a step.

        Args:
            step: counted from 0.

        Returns:
            The value on this part of the term that the addition is the gradient of; None where nothing is added.
        """
        return None

    def plan(self) -> Added:
        """Return what the method adds to memory and time."""
        return Added()

    @classmethod
    def changes_gradients(cls) -> bool:
        """Whether the method adds to gradients."""
        return cls.gradient is not Method.gradient

    @classmethod
    def decides_phases(cls) -> bool:
        """Whether the method says which phases there are."""
        return cls.phases is not Method.phases
