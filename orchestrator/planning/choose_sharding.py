"""`scale.zero_stage: auto`: a plan for the machines that are there chooses how the training is distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import ClusterError
from orchestrator.formatting import format_bytes
from orchestrator.planning import machine_from_nodes
from orchestrator.planning.plan_input import PlanInput
from orchestrator.planning.sharding_options import Planner, advise, local_machine
from orchestrator.recipe import Recipe
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.phases import find_phases
from orchestrator.training.prepare import Prepared


def choose_scale(prepared: Prepared, nodes: Sequence[Mapping[str, float]] | None) -> dict[str, Any]:
    """Return keys of the recipe with values that make the training fit at the least cost; empty where it fits.

    Args:
        nodes: the resources of a cluster's nodes, as Ray names them; None for this machine.

    Raises:
        ClusterError: no values make it fit.
        InputError: the kind of the cluster's GPUs is not known.
    """
    recipe = prepared.recipe
    if nodes is not None and recipe.scale.gpus_per_worker == 0:
        nodes = [{kind: number for kind, number in node.items() if kind != "GPU"} for node in nodes]
    machine = local_machine(recipe) if nodes is None else machine_from_nodes(nodes)
    planner = Planner(PlanInput(prepared, len(prepared.encoded("train"))), machine)
    # What the phase that takes most memory needs is enough for all.
    recipes = [phase.recipe for phase in find_phases(prepared)]
    found = [(planner.option(each, micro_batch_size(each)), each) for each in recipes]
    option, recipe = max(found, key=lambda each: each[0].memory.total)
    if option.fits:
        return {}
    chosen = advise(planner, recipe)
    if not chosen:
        needs, has = (format_bytes(number) for number in (option.memory.total, planner.room(recipe)))
        raise ClusterError(
            f"a worker needs {needs} and has {has} of memory on {machine.name}; neither ZeRO nor smaller passes help\n"
            "    -> use more workers or larger machines, or train fewer weights (transfer.freeze, an adapter); "
            "see: orchestrator plan"
        )
    return chosen


def with_choice(prepared: Prepared, chosen: Mapping[str, Any]) -> Prepared:
    """Return the same with these values at these keys of the recipe."""
    recipe: Recipe = prepared.recipe
    for path, value in chosen.items():
        section, _, key = path.partition(".")
        changed = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: changed})
    return replace(prepared, recipe=recipe)
