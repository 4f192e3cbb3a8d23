"""`scale.zero_stage: auto`: a plan of the training on the machines at hand says how it is spread, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import ClusterError
from orchestrator.planning import machine_of
from orchestrator.planning.plan_input import PlanInput
from orchestrator.planning.sharding_options import Planner, advise, machine_here
from orchestrator.recipe import Recipe
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.phases import find_phases
from orchestrator.training.prepare import Prepared


def choose_scale(prepared: Prepared, nodes: Sequence[Mapping[str, float]] | None) -> dict[str, Any]:
    """Places of the recipe, and the values that make the training fit at the least cost.

    Args:
        nodes: the resources of a cluster's nodes, as Ray names them; None for this machine.

    Raises:
        ClusterError: nothing makes it fit.
        InputError: the cluster's GPUs are of a kind that is not known.
    """
    recipe = prepared.recipe
    if nodes is not None and recipe.scale.gpus_per_worker == 0:
        nodes = [{kind: number for kind, number in node.items() if kind != "GPU"} for node in nodes]
    machine = machine_here(recipe) if nodes is None else machine_of(nodes)
    planner = Planner(PlanInput(prepared, len(prepared.encoded("train"))), machine)
    # What the phase that takes most memory needs is enough for all.
    recipes = [phase.recipe for phase in find_phases(prepared)]
    found = [(planner.option(each, micro_batch_size(each)), each) for each in recipes]
    option, recipe = max(found, key=lambda each: each[0].memory.total)
    if option.fits:
        return {}
    chosen = advise(planner, recipe)
    if not chosen:
        needs, has = (f"{number / 2**30:.1f} GiB" for number in (option.memory.total, planner.room(recipe)))
        raise ClusterError(
            f"a worker needs {needs} and has {has} on {machine.name}; neither ZeRO nor smaller passes make it fit\n"
            "    -> give it more workers or larger machines, or train less of it (transfer.freeze, an adapter); "
            "see: orchestrator plan"
        )
    return chosen


def with_choice(prepared: Prepared, chosen: Mapping[str, Any]) -> Prepared:
    """The same with these values at these places of the recipe."""
    recipe: Recipe = prepared.recipe
    for place, value in chosen.items():
        section, _, key = place.partition(".")
        changed = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: changed})
    return replace(prepared, recipe=recipe)
