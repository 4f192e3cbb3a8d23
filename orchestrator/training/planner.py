"""What a training will take: memory by part, time, disk and network, before anything is started."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.errors import InputError, Problem
from orchestrator.planning import (
    EFFICIENCY,
    Effort,
    Machine,
    Memory,
    ModelSize,
    PassSize,
    Setting,
    memory_of,
    network_bytes,
    processors,
    step_seconds,
)
from orchestrator.planning.memory import BF16, FP32
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.training.engine import micro_batch_size, uses_deepspeed
from orchestrator.training.features import CACHED_SPLITS
from orchestrator.training.measuring import Load, Measured, measure, measure_load, positions, whether_packed
from orchestrator.training.precision import Precision, has_bf16
from orchestrator.training.subject import Subject, open_subject

SPARE = 0.05
"""Of a device's memory, left for what no plan knows: pieces that fit nowhere."""
ALTERNATIVES = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all"))
STATES = 3
"""fp32 numbers in a checkpoint for each trained one: its weight and Adam's moments."""


@dataclass(frozen=True)
class Option:
    """One way to spread a training."""

    zero_stage: int
    offload: str
    memory: Memory
    fits: bool
    network: int
    """Bytes that a worker sends in a step."""
    at_least: bool = False
    """Whether the memory is that without activations, which was too much already."""


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
    effort: Effort
    checkpoint_bytes: int
    """Of each one that is kept."""
    model_bytes: int
    cache_bytes: int | None
    """Of stored features of the frozen blocks; None where there will be none."""
    concurrent: int
    """Trainings such as this one that the machines hold at a time."""
    advice: dict[str, Any]
    """Places of the recipe, and what would suit this machine better."""
    notes: list[str] = field(default_factory=list)


class Planner:
    """Measures one recipe on one machine; what was measured once is kept."""

    def __init__(self, subject: Subject, machine: Machine) -> None:
        self.subject = subject
        self.machine = machine
        self.encoded = subject.prepared.encoded("train")
        self.process = int(psutil.Process().memory_info().rss)
        """Bytes of a process of this package before it has a model: as much as this one."""
        self.packs = whether_packed(subject, subject.prepared.recipe)
        self._found: dict[Any, tuple[Load, Measured]] = {}

    def measure(self, recipe: Recipe, micro_batch: int) -> tuple[Load, Measured]:
        key = self._key(recipe, micro_batch)
        if key not in self._found:
            precision, autocasts = self.precision(recipe), self.autocasts(recipe)
            device = "cuda" if self.machine.is_gpu else "cpu"
            load = measure_load(self.encoded, recipe, micro_batch, self.packs, device, autocasts)
            self._found[key] = load, measure(self.subject, recipe, load, self.packs, precision, autocasts)
        return self._found[key]

    def _key(self, recipe: Recipe, micro_batch: int) -> Any:
        transfer = recipe.transfer.model_dump_json()
        checkpointing, is_third = recipe.train.gradient_checkpointing, recipe.scale.zero_stage == 3
        return micro_batch, recipe.scale.workers, self.autocasts(recipe), checkpointing, is_third, transfer

    def precision(self, recipe: Recipe) -> Precision:
        wanted = recipe.train.precision
        return wanted if wanted != "auto" else ("bf16" if self.machine.has_bf16 else "fp32")

    def autocasts(self, recipe: Recipe) -> bool:
        """ZeRO holds the weights themselves in bf16."""
        return self.precision(recipe) == "bf16" and recipe.scale.zero_stage == 0

    def option(self, recipe: Recipe, micro_batch: int) -> Option:
        at_least = self._without_passes(recipe, micro_batch)
        if at_least is not None:
            return at_least
        load, found = self.measure(recipe, micro_batch)
        first = found.first
        size = PassSize(first.activations, first.logits, first.with_gradients, first.gradients, found.later)
        return self._option(recipe, load, found.size, size)

    def _without_passes(self, recipe: Recipe, micro_batch: int) -> Option | None:
        """What is too large already without activations, which then need not be measured."""
        if not self._found or self._key(recipe, micro_batch) in self._found:
            return None
        load, known = next(iter(self._found.values()))
        adapter = recipe.transfer.adapter
        frozen = 0 if adapter is not None and adapter.quantize is not None else known.size.frozen
        size = replace(known.size, held=FP32 * known.size.trained + BF16 * frozen)
        option = self._option(recipe, load, size, PassSize(0, 0, 0, 0))
        return None if option.memory.total <= self.room(recipe) else replace(option, at_least=True)

    def room(self, recipe: Recipe) -> float:
        """Bytes that may be planned with for each worker: those of a device, or its share of a node's main memory."""
        workers = 1 if self.machine.is_gpu else -(-recipe.scale.workers // self.machine.nodes)
        return self.machine.memory * (1 - SPARE) / workers

    def _option(self, recipe: Recipe, load: Load, model: ModelSize, size: PassSize) -> Option:
        setting = self.setting(recipe, load)
        memory = memory_of(model, size, setting)
        fits = memory.total <= self.room(recipe) and recipe.scale.workers <= self.machine.places
        scale = recipe.scale
        return Option(scale.zero_stage, scale.offload, memory, fits, network_bytes(model, setting))

    def setting(self, recipe: Recipe, load: Load) -> Setting:
        return Setting(
            workers=recipe.scale.workers,
            deepspeed=uses_deepspeed(recipe),
            zero_stage=recipe.scale.zero_stage,
            offload=recipe.scale.offload,
            precision=self.precision(recipe),
            passes=load.passes,
            is_gpu=self.machine.is_gpu,
            process=self.process,
        )

    def largest_micro_batch(self, recipe: Recipe) -> int | None:
        """The recipe's, halved until it fits; None where not even one example does."""
        number = micro_batch_size(recipe)
        while recipe.scale.workers <= self.machine.places:
            if self.option(recipe, number).fits:
                return number
            if number == 1:
                break
            number = -(-number // 2)
        return None


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
    subject = open_subject(recipe, num_examples)
    planner = Planner(subject, machine)
    notes = list(subject.notes)
    if recipe.train.precision == "bf16" and not machine.has_bf16:
        notes.append(f"a {machine.name} does not compute bf16 in hardware, so the run would be refused")
    micro_batch = micro_batch_size(recipe)
    load, found = planner.measure(recipe, micro_batch)
    chosen = planner.option(recipe, micro_batch)
    steps = steps_of(recipe, subject.num_examples)
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
        effort=effort_of(planner, recipe, micro_batch, steps, cached, calibration),
        checkpoint_bytes=STATES * FP32 * found.size.trained,
        model_bytes=FP32 * (found.size.trained + (recipe.transfer.adapter is None) * found.size.frozen),
        cache_bytes=cache_bytes(planner, recipe, found) if cached else None,
        concurrent=concurrent(planner, recipe, chosen),
        advice={} if chosen.fits else advise(planner, recipe),
        notes=notes,
    )


def machine_here(recipe: Recipe) -> Machine:
    """This machine's GPUs, or its cores where it has none."""
    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        return Machine(
            name=first.name,
            nodes=1,
            devices=torch.cuda.device_count(),
            memory=first.total_memory,
            rate=None,
            link=32e9,
            network=32e9,
            is_gpu=True,
            has_bf16=has_bf16(torch.device("cuda")),
        )
    free = psutil.virtual_memory().available
    return processors("this machine's CPU", 1, os.cpu_count() or 1, free, has_bf16(torch.device("cpu")))


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


def with_scale(recipe: Recipe, zero_stage: int, offload: str) -> Recipe:
    """The recipe with another way to spread it."""
    scale = recipe.scale.model_copy(update={"zero_stage": zero_stage, "offload": offload, "engine": "auto"})
    return recipe.model_copy(update={"scale": scale})


def possible(recipe: Recipe) -> list[tuple[int, str]]:
    """Stages and offload that may be written into the recipe."""
    adapter = recipe.transfer.adapter
    in_4_bits = adapter is not None and adapter.quantize is not None
    return [(stage, offload) for stage, offload in ALTERNATIVES if not (in_4_bits and stage == 3)]


def advise(planner: Planner, recipe: Recipe) -> dict[str, Any]:
    """Places of the recipe with values that make it fit, those that cost least time; empty where nothing does."""
    for checkpointing in dict.fromkeys((recipe.train.gradient_checkpointing, True)):
        train = recipe.train.model_copy(update={"gradient_checkpointing": checkpointing})
        for stage, offload in possible(recipe):
            other = with_scale(recipe.model_copy(update={"train": train}), stage, offload)
            number = planner.largest_micro_batch(other)
            if number is None:
                continue
            found: dict[str, Any] = {"train.micro_batch_size": number} if number < micro_batch_size(recipe) else {}
            if checkpointing != recipe.train.gradient_checkpointing:
                found["train.gradient_checkpointing"] = True
            if (stage, offload) != (recipe.scale.zero_stage, recipe.scale.offload):
                found |= {"scale.zero_stage": stage, "scale.offload": offload}
            return found
    return {}


def caches(planner: Planner, recipe: Recipe, found: Measured, load: Load, steps: int | None) -> bool:
    """Whether the run would store what its frozen blocks make of the data."""
    wanted = recipe.train.cache_prefix
    can = recipe.scale.zero_stage < 3 and planner.encoded.rows_per_example == 1 and not planner.encoded.augments
    if not can or found.boundary_numbers == 0 or wanted is False:
        return False
    return wanted is True or (found.frozen.linear > 0 and (steps is None or steps > load.steps))


def cache_bytes(planner: Planner, recipe: Recipe, found: Measured) -> int:
    tables = planner.subject.prepared.tables
    lengths = sum(int(planner.subject.prepared.encoded(name).lengths.sum()) for name in CACHED_SPLITS if name in tables)
    return int(found.boundary_numbers * lengths * (BF16 if planner.precision(recipe) == "bf16" else FP32))


def effort_of(
    planner: Planner, recipe: Recipe, micro_batch: int, steps: int | None, cached: bool, calibration: Path | None
) -> Effort:
    load, found = planner.measure(recipe, micro_batch)
    a_step = (found.whole.of(load) - (found.frozen.of(load) if cached else 0.0)) / load.steps
    rate, basis = pace(planner, calibration)
    network = network_bytes(found.size, planner.setting(recipe, load))
    seconds = step_seconds(a_step, rate, network, recipe.scale.workers, planner.machine)
    whole = None if steps is None else seconds * steps + operations_beside(planner, recipe, micro_batch, steps) / rate
    return Effort(a_step, rate, basis, seconds, whole)


def operations_beside(planner: Planner, recipe: Recipe, micro_batch: int, steps: int) -> float:
    """Of evaluations, and of what frozen blocks compute once, on each worker."""
    load, found = planner.measure(recipe, micro_batch)
    prepared = planner.subject.prepared
    cached = caches(planner, recipe, found, load, steps)
    once = found.frozen.of(load) if cached else 0.0
    if "select" not in prepared.tables:
        return once
    encoded = prepared.encoded("select")
    lengths = encoded.lengths.astype(float) * 1.0
    times = encoded.rows_per_example / recipe.scale.workers
    of_select = replace(load, linear=times * float(lengths.sum()), square=times * float((lengths**2).sum()))
    every = recipe.train.evaluate_every
    evaluations = max(1, steps // (load.steps if every == "epoch" else int(every)))
    frozen = found.frozen.of(of_select) if cached else 0.0
    return once + frozen + evaluations * (found.forward.of(of_select) - frozen)


def pace(planner: Planner, calibration: Path | None) -> tuple[float, str]:
    """Operations a second of a worker, and where that is from."""
    if calibration is not None:
        return pace_of_run(calibration, planner.machine), f"the pace of {calibration}"
    if planner.machine.rate is not None:
        return planner.machine.rate * EFFICIENCY, f"{EFFICIENCY:.0%} of what a {planner.machine.name} does at its best"
    return measure_products(planner.precision(planner.subject.prepared.recipe)), "matrix products timed here"


def pace_of_run(directory: Path, machine: Machine) -> float:
    """Operations a second of each worker of a finished run.

    Raises:
        InputError: there is none.
    """
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        recipe = load_recipe(directory / "recipe.yaml")
    except OSError as error:
        remedy = "name the directory of a finished run on the same kind of machine"
        raise InputError(Problem("there is no finished run", str(directory), remedy)) from error
    planner = Planner(open_subject(recipe), machine)
    micro_batch = micro_batch_size(recipe)
    load, found = planner.measure(recipe, micro_batch)
    steps = int(result["steps"])
    cached = caches(planner, recipe, found, load, steps)
    a_step = (found.whole.of(load) - (found.frozen.of(load) if cached else 0.0)) / load.steps
    # The clock of a run begins with its steps, after what is computed once.
    once = found.frozen.of(load) if cached else 0.0
    total = a_step * steps + operations_beside(planner, recipe, micro_batch, steps) - once
    return float(total / result["seconds"])


def measure_products(precision: Precision) -> float:
    """Operations a second of matrix products of a common size, on this machine."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 1024
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # Until it is there.
        best = min(best, time.perf_counter() - began)
    return EFFICIENCY * 2 * size**3 / best


def as_record(found: TrainingPlan) -> dict[str, Any]:
    """The plan as JSON has it."""

    def option(each: Option) -> dict[str, Any]:
        memory = each.memory
        return {**vars(each), "memory": {"total": memory.total, "main": memory.main, "parts": memory.parts}}

    record = {**vars(found), "recipe": found.recipe.name, "machine": vars(found.machine), "effort": vars(found.effort)}
    return {**record, "chosen": option(found.chosen), "options": [option(each) for each in found.options]}
