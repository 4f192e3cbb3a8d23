"""Memory by part, time, disk and network of a training, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator import models
from orchestrator.planning import ComputeCost, Machine, loading_bytes
from orchestrator.planning.measuring import Measurement
from orchestrator.planning.plan_input import PlanInput, open_plan_input
from orchestrator.planning.sharding_options import (
    SPARE,
    Planner,
    ShardingOption,
    advise,
    local_machine,
    valid_options,
    with_sharding,
)
from orchestrator.planning.throughput import estimate_compute_cost, measure_balance
from orchestrator.planning.workload import Workload, positions_of
from orchestrator.recipe import Recipe
from orchestrator.training.engine.precision import Precision, resolve_precision
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.engine.sizes import BF16, BYTES_IN_CHECKPOINT, FP32
from orchestrator.training.engine.weight_formats import may_load_as_stored
from orchestrator.training.features.build import CACHED_SPLITS
from orchestrator.training.phases import find_phases


@dataclass
class TrainingPlan:
    """The resources that a recipe takes as it is, and alternatives to it."""

    recipe: Recipe
    machine: Machine
    precision: Precision
    trained: int
    """Parameters."""
    total: int
    """Parameters."""
    micro_batch: int
    passes: int
    """The most that a step has."""
    longest: int
    """Positions of the largest pass."""
    room: float
    """Bytes that a worker may take."""
    chosen: ShardingOption
    options: list[ShardingOption]
    steps: int | None
    compute_cost: ComputeCost
    checkpoint_bytes: int
    """Size of each checkpoint that is kept."""
    model_bytes: int
    """Size of the exported model on the disk, and in the main memory of the first machine while it is written."""
    loading_bytes: int
    """Main memory of each machine while the source is loaded."""
    cache_bytes: int | None
    """Size of the stored features of the frozen blocks; None where none are stored."""
    concurrent: int
    """Trainings like this one that the machines hold at a time."""
    advice: dict[str, Any]
    """Keys of the recipe with values that make it fit; empty where it fits, or nothing helps."""
    notes: list[str] = field(default_factory=list)


def plan(
    recipe: Recipe, machine: Machine | None = None, num_examples: int | None = None, calibration: Path | None = None
) -> TrainingPlan:
    """Plan a training.

    Args:
        machine: to train on; None for this one.
        num_examples: of *train*, where the data are not on this machine.
        calibration: the directory of a run on the same kind of machine, from which the throughput is taken.

    Raises:
        InputError: recipe, data or source are wrong; there is no such run.
    """
    machine = machine or local_machine(recipe)
    plan_input = open_plan_input(recipe, num_examples)
    # The share of the peak rate that is assumed includes operators that only move numbers; a measured rate does not.
    balance = 0.0
    if calibration is not None:
        balance = measure_balance(machine, resolve_precision(recipe, machine.has_bf16))
    planner = Planner(plan_input, machine, balance)
    phases = find_phases(plan_input.prepared)
    return combine([plan_phase(planner, phase.recipe, calibration) for phase in phases], recipe)


def combine(phases: Sequence[TrainingPlan], recipe: Recipe) -> TrainingPlan:
    """Return the plan of a training in phases: memory and disk of the largest, the time of all together.

    Args:
        recipe: of the whole training.
    """
    largest = max(phases, key=lambda phase: phase.chosen.memory.total)
    if len(phases) == 1:
        return largest
    seconds = [phase.compute_cost.seconds for phase in phases if phase.compute_cost.seconds is not None]
    steps = [phase.steps for phase in phases if phase.steps is not None]
    cached = [phase.cache_bytes for phase in phases if phase.cache_bytes is not None]
    is_known = len(steps) == len(phases)
    options = zip(*(phase.options for phase in phases), strict=True)
    return replace(
        largest,
        recipe=recipe,
        options=[max(each, key=lambda option: option.memory.total) for each in options],
        steps=sum(steps) if is_known else None,
        compute_cost=replace(largest.compute_cost, seconds=sum(seconds) if is_known else None),
        checkpoint_bytes=max(phase.checkpoint_bytes for phase in phases),
        cache_bytes=sum(cached) if cached else None,
        concurrent=min(phase.concurrent for phase in phases),
    )


def plan_phase(planner: Planner, recipe: Recipe, calibration: Path | None) -> TrainingPlan:
    """Return the plan of one phase, as a training of its own.

    Args:
        recipe: of the phase.
        calibration: as `plan`.
    """
    machine, plan_input = planner.machine, planner.plan_input
    micro_batch = micro_batch_size(recipe)
    workload, found = planner.measure(recipe, micro_batch)
    chosen = planner.option(recipe, micro_batch)
    steps = count_steps(plan_input, recipe, workload)
    return TrainingPlan(
        recipe=recipe,
        machine=machine,
        precision=planner.precision(recipe),
        trained=found.size.trained,
        total=found.size.trained + found.size.frozen,
        micro_batch=micro_batch,
        passes=workload.passes,
        longest=int(positions_of(planner.encoded, workload.first, planner.packs).linear),
        room=planner.room(recipe),
        chosen=chosen,
        options=[planner.option(with_sharding(recipe, *each), micro_batch) for each in valid_options(recipe)],
        steps=steps,
        compute_cost=estimate_compute_cost(planner, recipe, steps, calibration),
        checkpoint_bytes=BYTES_IN_CHECKPOINT * found.size.trained,
        model_bytes=model_bytes(planner, recipe, found),
        loading_bytes=bytes_while_loading(planner, recipe, found),
        cache_bytes=cache_bytes(planner, recipe, found) if found.stores_features else None,
        concurrent=num_concurrent(planner, recipe, chosen),
        advice={} if chosen.fits else advise(planner, recipe),
        notes=[*plan_input.notes, *notes_on_precision(recipe, machine)],
    )


def notes_on_precision(recipe: Recipe, machine: Machine) -> list[str]:
    if recipe.train.precision != "bf16" or machine.has_bf16:
        return []
    return [f"a {machine.name} does not compute bf16 in hardware, so the run would be refused"]


def count_steps(plan_input: PlanInput, recipe: Recipe, workload: Workload) -> int | None:
    """Return the steps of the training; None where they depend on an unknown number of examples."""
    is_known = plan_input.num_examples is not None or recipe.train.steps is not None
    return workload.schedule.num_steps if is_known else None


def num_concurrent(planner: Planner, recipe: Recipe, option: ShardingOption) -> int:
    """Return the trainings that the machines hold at a time, by their devices, or by cores and main memory."""
    machine, workers = planner.machine, recipe.scale.workers
    by_places = machine.places // workers
    if machine.is_gpu:
        return by_places if option.fits else 0
    room = machine.nodes * machine.memory * (1 - SPARE)
    return min(by_places, int(room // (workers * option.memory.total)))


def source_dtype(planner: Planner) -> Any:
    """Return the number format of the source's files, by its config."""
    return models.load_config(planner.plan_input.prepared.source).get_text_config().dtype


def model_bytes(planner: Planner, recipe: Recipe, found: Measurement) -> int:
    """Return the bytes of the exported model, which has the format of its source; an adapter is in fp32."""
    if recipe.transfer.adapter is not None:
        return FP32 * found.size.trained
    is_half = source_dtype(planner) in (torch.bfloat16, torch.float16)
    return (BF16 if is_half else FP32) * (found.size.trained + found.size.frozen)


def bytes_while_loading(planner: Planner, recipe: Recipe, found: Measurement) -> int:
    """Return the bytes of a machine's main memory that its workers take to load the source."""
    dtype, scale, adapter = source_dtype(planner), recipe.scale, recipe.transfer.adapter
    stored = BF16 if dtype in (torch.bfloat16, torch.float16) else FP32
    is_held_so = dtype == torch.bfloat16 and may_load_as_stored(recipe, planner.precision(recipe))
    # Quantized weights go to the device one by one.
    is_quantized = adapter is not None and adapter.quantize is not None
    is_sharded = scale.zero_stage == 3 and scale.workers > 1
    copies = 1 if is_sharded else min(-(-scale.workers // planner.machine.nodes), planner.machine.devices)
    numbers = found.size.trained + found.size.frozen
    return loading_bytes(numbers, stored, stored if is_held_so or is_quantized else FP32, copies)


def cache_bytes(planner: Planner, recipe: Recipe, found: Measurement) -> int:
    """Return the bytes of the features that a run stores."""
    prepared = planner.plan_input.prepared
    lengths = {name: prepared.encoded(name).lengths for name in CACHED_SPLITS if name in prepared.tables}
    positions = sum(int(each.sum()) for each in {**lengths, "train": planner.plan_input.lengths}.values())
    return int(found.boundary_numbers * positions * (BF16 if planner.precision(recipe) == "bf16" else FP32))


def as_record(found: TrainingPlan) -> dict[str, Any]:
    """Return the plan as JSON values."""

    def option(each: ShardingOption) -> dict[str, Any]:
        memory = each.memory
        return {**vars(each), "memory": {"total": memory.total, "main": memory.main, "parts": memory.parts}}

    record = {**vars(found), "recipe": found.recipe.name, "machine": vars(found.machine)}
    record["effort"] = vars(record.pop("compute_cost"))
    return {**record, "chosen": option(found.chosen), "options": [option(each) for each in found.options]}
