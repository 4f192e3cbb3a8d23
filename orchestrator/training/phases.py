"""The phases of a run: trainings one after the other, each as its own recipe has it, over one sequence of steps.

A recipe without phases has one, which is the recipe itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.recipe import Origin, Phase, Recipe
from orchestrator.training.assembling import assemble, assemble_outline
from orchestrator.training.hooks import PHASE
from orchestrator.training.loop import count_steps
from orchestrator.training.prepare import Prepared
from orchestrator.transfer import methods_of

_OF_TRANSFER, _OF_TRAIN = ("freeze",), ("learning_rate", "schedule", "warmup_ratio")


@dataclass(frozen=True)
class TrainingPhase:
    """A stretch of training with one set of trained parameters and one schedule."""

    name: str
    recipe: Recipe
    """The run's, with the phase's values under `transfer` and `train`."""


def find_phases(prepared: Prepared, num_layers: int | None = None) -> list[TrainingPhase]:
    """Return the phases that the recipe or one of its methods asks for, in their order.

    Args:
        num_layers: of the source model; None to count them where a method asks.

    Raises:
        ModelError: the source model cannot be used as the recipe asks.
    """
    recipe = prepared.recipe
    written, place = recipe.transfer.phases, "transfer.phases"
    if written is None:
        for method in methods_of(recipe):
            if method.decides_phases():
                written, place = method.phases(recipe, num_layers or count_layers(prepared)), method.place
    if written is None:
        return [TrainingPhase(PHASE, recipe)]
    return [TrainingPhase(phase.name, recipe_of(recipe, phase, f"{place}.{i}")) for i, phase in enumerate(written)]


def recipe_of(recipe: Recipe, phase: Phase, place: str) -> Recipe:
    """Return the recipe of one phase.

    Args:
        place: of the phase in the whole recipe, for messages.
    """

    def given(names: tuple[str, ...]) -> dict[str, object]:
        return {name: getattr(phase, name) for name in names if getattr(phase, name) is not None}

    has_length = phase.epochs is not None or phase.steps is not None
    length = {"epochs": phase.epochs, "steps": phase.steps} if has_length else {}
    found = recipe.model_copy(
        update={
            "transfer": recipe.transfer.model_copy(update={"phases": None, **given(_OF_TRANSFER)}),
            "train": recipe.train.model_copy(update={**length, **given(_OF_TRAIN)}),
        }
    )
    lines = {f"transfer.{name}": recipe.origin.lines.get(f"{place}.{name}") for name in given(_OF_TRANSFER)}
    known = {path: line for path, line in lines.items() if line is not None}
    found._origin = Origin(recipe.origin.file, {**recipe.origin.lines, **known}, recipe.origin.overrides)
    return found


def steps_of(phase: TrainingPhase, num_examples: int) -> int:
    """Return the optimizer steps of a phase."""
    train = phase.recipe.train
    return count_steps(train, -(-num_examples // train.global_batch_size))


def count_layers(prepared: Prepared) -> int:
    """Return the number of the source model's layers."""
    recipe = prepared.recipe
    transfer = recipe.transfer.model_copy(update={"freeze": 0, "adapter": None, "methods": []})
    plain = replace(prepared, recipe=recipe.model_copy(update={"transfer": transfer}))
    return len((assemble_outline(plain) or assemble(plain)).blocks.layers)
