"""What a training will take: memory by part, time, disk and network, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator import models
from orchestrator.planning import ComputeCost, Machine, loading_bytes
from orchestrator.planning.measuring import Measured, positions
from orchestrator.planning.plan_input import open_plan_input
from orchestrator.planning.sharding_options import (
    SPARE,
    Option,
    Planner,
    advise,
    machine_here,
    possible,
    precision_on,
    with_scale,
)
from orchestrator.planning.throughput import balance_of, caches, compute_cost_of
from orchestrator.recipe import Recipe
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.engine.sizes import BF16, BYTES_IN_CHECKPOINT, FP32
from orchestrator.training.engine.weight_formats import may_load_as_stored
from orchestrator.training.features.build import CACHED_SPLITS
from orchestrator.training.phases import find_phases


@dataclass
class TrainingPlan:
    """What the recipe takes as it stands, and what else could be."""

    recipe: Recipe
    machine: Machine
    precision: Precision
    trained: int
    """Numbers."""
    total: int
    micro_batch: int
    passes: int
    longest: int
    """Positions of the largest pass."""
    room: float
    """Bytes that a worker may take."""
    chosen: Option
    options: list[Option]
    steps: int | None
    effort: ComputeCost
    checkpoint_bytes: int
    """Of each one that is kept."""
    model_bytes: int
    """Of the model that is left, on the disk, and in the main memory of the first machine while it is written."""
    loading_bytes: int
    """Of each machine's main memory while the source is loaded."""
    cache_bytes: int | None
    """Of stored features of the frozen blocks; None where there will be none."""
    concurrent: int
    """Trainings such as this one that the machines hold at a time."""
    advice: dict[str, Any]
    """Places of the recipe, and what would suit this machine better."""
    notes: list[str] = field(default_factory=list)


def plan(
    recipe: Recipe, machine: Machine | None = None, num_examples: int | None = None, calibration: Path | None = None
) -> TrainingPlan:
    """Plan a training.

    Args:
        machine: what it is to run on; None for this one.
        num_examples: of *train*, where the data are not at hand.
        calibration: the directory of a run on the same kind of machine, from which the pace is taken.

    Raises:
        InputError: recipe, data or source are wrong; no such run.
    """
    machine = machine or machine_here(recipe)
    plan_input = open_plan_input(recipe, num_examples)
    # A guess of the pace has its share of what is no product in it; one that was measured tells them apart.
    balance = 0.0 if calibration is None else balance_of(machine, precision_on(machine, recipe))
    planner = Planner(plan_input, machine, balance)
    notes = list(plan_input.notes)
    if recipe.train.precision == "bf16" and not machine.has_bf16:
        notes.append(f"a {machine.name} does not compute bf16 in hardware, so the run would be refused")
    phases = find_phases(plan_input.prepared)
    return combine([plan_phase(planner, phase.recipe, notes, calibration) for phase in phases], recipe)


def combine(phases: Sequence[TrainingPlan], recipe: Recipe) -> TrainingPlan:
    """Return the plan of a training in phases: the memory and disk of the largest, the time of all together.

    Args:
        recipe: of the whole training.
    """
    largest = max(phases, key=lambda phase: phase.chosen.memory.total)
    if len(phases) == 1:
        return largest
    seconds = [phase.effort.seconds for phase in phases if phase.effort.seconds is not None]
    steps = [phase.steps for phase in phases if phase.steps is not None]
    cached = [phase.cache_bytes for phase in phases if phase.cache_bytes is not None]
    is_known = len(steps) == len(phases)
    options = zip(*(phase.options for phase in phases), strict=True)
    return replace(
        largest,
        recipe=recipe,
        options=[max(each, key=lambda option: option.memory.total) for each in options],
        steps=sum(steps) if is_known else None,
        effort=replace(largest.effort, seconds=sum(seconds) if is_known else None),
        checkpoint_bytes=max(phase.checkpoint_bytes for phase in phases),
        cache_bytes=sum(cached) if cached else None,
        concurrent=min(phase.concurrent for phase in phases),
    )


def plan_phase(planner: Planner, recipe: Recipe, notes: Sequence[str], calibration: Path | None) -> TrainingPlan:
    """Return the plan of one phase, as a training of its own.

    Args:
        recipe: of the phase.
        notes: for the user.
        calibration: as `plan`.
    """
    machine, plan_input = planner.machine, planner.plan_input
    micro_batch = micro_batch_size(recipe)
    load, found = planner.measure(recipe, micro_batch)
    chosen = planner.option(recipe, micro_batch)
    steps = steps_of(recipe, plan_input.num_examples)
    options = [planner.option(with_scale(recipe, *each), micro_batch) for each in possible(recipe)]
    cached = caches(planner, recipe, found, load, steps)
    return TrainingPlan(
        recipe=recipe,
        machine=machine,
        precision=planner.precision(recipe),
        trained=found.size.trained,
        total=found.size.trained + found.size.frozen,
        micro_batch=micro_batch,
        passes=load.passes,
        longest=int(positions(planner.encoded, load.first, planner.packs)[0]),
        room=planner.room(recipe),
        chosen=chosen,
        options=options,
        steps=steps,
        effort=compute_cost_of(planner, recipe, micro_batch, steps, cached, calibration),
        checkpoint_bytes=BYTES_IN_CHECKPOINT * found.size.trained,
        model_bytes=model_bytes(planner, recipe, found),
        loading_bytes=main_memory_to_load(planner, recipe, found),
        cache_bytes=cache_bytes(planner, recipe, found) if cached else None,
        concurrent=concurrent(planner, recipe, chosen),
        advice={} if chosen.fits else advise(planner, recipe),
        notes=list(notes),
    )


def concurrent(planner: Planner, recipe: Recipe, option: Option) -> int:
    """Trainings that the machines hold at a time, by their devices, or by cores and main memory."""
    machine, workers = planner.machine, recipe.scale.workers
    by_places = machine.places // workers
    if machine.is_gpu:
        return by_places if option.fits else 0
    room = machine.nodes * machine.memory * (1 - SPARE)
    return min(by_places, int(room // (workers * option.memory.total)))


def steps_of(recipe: Recipe, num_examples: int | None) -> int | None:
    if recipe.train.steps is not None:
        return recipe.train.steps
    if num_examples is None:
        return None
    return math.ceil((recipe.train.epochs or 0) * -(-num_examples // recipe.train.global_batch_size))


def format_of_source(planner: Planner) -> Any:
    """Return the number format of the source's files, by its config."""
    return models.load_config(planner.plan_input.prepared.source).get_text_config().dtype


def model_bytes(planner: Planner, recipe: Recipe, found: Measured) -> int:
    if recipe.transfer.adapter is not None:
        return FP32 * found.size.trained
    is_narrow = format_of_source(planner) in (torch.bfloat16, torch.float16)
    return (BF16 if is_narrow else FP32) * (found.size.trained + found.size.frozen)


def main_memory_to_load(planner: Planner, recipe: Recipe, found: Measured) -> int:
    """Return the bytes of a machine's main memory that its workers take to load the source."""
    dtype, scale, adapter = format_of_source(planner), recipe.scale, recipe.transfer.adapter
    stored = BF16 if dtype in (torch.bfloat16, torch.float16) else FP32
    is_held_so = dtype == torch.bfloat16 and may_load_as_stored(recipe, planner.precision(recipe))
    # What is quantized goes to the device weight by weight.
    is_quantized = adapter is not None and adapter.quantize is not None
    is_spread = scale.zero_stage == 3 and scale.workers > 1
    copies = 1 if is_spread else min(-(-scale.workers // planner.machine.nodes), planner.machine.devices)
    numbers = found.size.trained + found.size.frozen
    return loading_bytes(numbers, stored, stored if is_held_so or is_quantized else FP32, copies)


def cache_bytes(planner: Planner, recipe: Recipe, found: Measured) -> int:
    tables = planner.plan_input.prepared.tables
    lengths = sum(
        int(planner.plan_input.prepared.encoded(name).lengths.sum()) for name in CACHED_SPLITS if name in tables
    )
    return int(found.boundary_numbers * lengths * (BF16 if planner.precision(recipe) == "bf16" else FP32))


def as_record(found: TrainingPlan) -> dict[str, Any]:
    """The plan as JSON has it."""

    def option(each: Option) -> dict[str, Any]:
        memory = each.memory
        return {**vars(each), "memory": {"total": memory.total, "main": memory.main, "parts": memory.parts}}

    record = {**vars(found), "recipe": found.recipe.name, "machine": vars(found.machine), "effort": vars(found.effort)}
    return {**record, "chosen": option(found.chosen), "options": [option(each) for each in found.options]}
