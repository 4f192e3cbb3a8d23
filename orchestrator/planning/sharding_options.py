"""Ways to distribute a training over its workers, the memory that each one takes, and which of them fit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from orchestrator.planning import (
    Machine,
    Memory,
    ModelSize,
    PassMemory,
    ShardingSetup,
    cpu_machine,
    estimate_memory,
    network_bytes,
)
from orchestrator.planning.measuring import Measurement, PassSettings, measure, uses_packed_sequences
from orchestrator.planning.plan_input import PlanInput
from orchestrator.planning.workload import Workload, measure_workload
from orchestrator.recipe import Recipe
from orchestrator.training.engine.devices import uses_gpu
from orchestrator.training.engine.precision import Precision, has_bf16, resolve_precision
from orchestrator.training.engine.settings import autocasts, micro_batch_size, uses_deepspeed
from orchestrator.training.engine.sizes import BF16, FP32
from orchestrator.transfer import methods_of

SPARE = 0.05
"""Share of a device's memory that is left free for what a plan does not know, such as fragmentation."""
ALTERNATIVES = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all"))


@dataclass(frozen=True)
class ShardingOption:
    """One way to distribute a training."""

    zero_stage: int
    offload: str
    memory: Memory
    fits: bool
    network: int
    """Bytes that a worker sends in a step."""
    at_least: bool = False
    """Whether the memory leaves out activations, because the rest alone is too much already."""


class Planner:
    """Measures one recipe on one machine, each variant of it once.

    Args:
        balance: as `ResourceTracker` takes it.
    """

    def __init__(self, plan_input: PlanInput, machine: Machine, balance: float = 0.0) -> None:
        self.plan_input = plan_input
        self.machine = machine
        self.balance = balance
        self.encoded = plan_input.prepared.encoded("train")
        self.process = int(psutil.Process().memory_info().rss)
        """Bytes of a process of this package without a model: this one's."""
        self.packs = uses_packed_sequences(plan_input, plan_input.prepared.recipe)
        self._measured: dict[Any, tuple[Workload, Measurement]] = {}

    def measure(self, recipe: Recipe, micro_batch: int) -> tuple[Workload, Measurement]:
        """Return the passes of an epoch, and what they take."""
        key = self._key(recipe, micro_batch)
        if key not in self._measured:
            settings = PassSettings(self.packs, self.precision(recipe), self.autocasts(recipe), self.balance)
            device = "cuda" if self.machine.is_gpu else "cpu"
            workload = measure_workload(self.plan_input, recipe, micro_batch, self.packs, device, settings.autocasts)
            self._measured[key] = workload, measure(self.plan_input, recipe, workload, settings)
        return self._measured[key]

    def _key(self, recipe: Recipe, micro_batch: int) -> Any:
        """Return what decides a measurement."""
        transfer = recipe.transfer.model_dump_json()
        checkpointing, is_third = recipe.train.gradient_checkpointing, recipe.scale.zero_stage == 3
        return micro_batch, recipe.scale.workers, self.autocasts(recipe), checkpointing, is_third, transfer

    def precision(self, recipe: Recipe) -> Precision:
        return resolve_precision(recipe, self.machine.has_bf16)

    def autocasts(self, recipe: Recipe) -> bool:
        return autocasts(recipe, self.precision(recipe))

    def option(self, recipe: Recipe, micro_batch: int) -> ShardingOption:
        """Return the way that the recipe distributes its training."""
        at_least = self._without_activations(recipe, micro_batch)
        if at_least is not None:
            return at_least
        workload, found = self.measure(recipe, micro_batch)
        first = found.first
        size = PassMemory(first.activations, first.logits, first.with_gradients, first.gradients, found.later)
        return self._option(recipe, workload, found.size, size)

    def _without_activations(self, recipe: Recipe, micro_batch: int) -> ShardingOption | None:
        """Return an option that is too large even without activations, which then need not be measured."""
        if not self._measured or self._key(recipe, micro_batch) in self._measured:
            return None
        workload, known = next(iter(self._measured.values()))
        adapter = recipe.transfer.adapter
        frozen = 0 if adapter is not None and adapter.quantize is not None else known.size.frozen
        size = replace(known.size, held=FP32 * known.size.trained + BF16 * frozen)
        option = self._option(recipe, workload, size, PassMemory(0, 0, 0, 0))
        return None if option.memory.total <= self.room(recipe) else replace(option, at_least=True)

    def room(self, recipe: Recipe) -> float:
        """Return the bytes that each worker may take: of its device, or its share of a node's main memory."""
        workers = 1 if self.machine.is_gpu else -(-recipe.scale.workers // self.machine.nodes)
        return self.machine.memory * (1 - SPARE) / workers

    def _option(self, recipe: Recipe, workload: Workload, model: ModelSize, size: PassMemory) -> ShardingOption:
        setup = self.setup(recipe, workload)
        memory = estimate_memory(model, size, setup)
        fits = memory.total <= self.room(recipe) and recipe.scale.workers <= self.machine.places
        scale = recipe.scale
        return ShardingOption(scale.zero_stage, scale.offload, memory, fits, network_bytes(model, setup))

    def setup(self, recipe: Recipe, workload: Workload) -> ShardingSetup:
        return ShardingSetup(
            workers=recipe.scale.workers,
            deepspeed=uses_deepspeed(recipe),
            zero_stage=recipe.scale.zero_stage,
            offload=recipe.scale.offload,
            precision=self.precision(recipe),
            passes=workload.passes,
            is_gpu=self.machine.is_gpu,
            process=self.process,
        )

    def largest_micro_batch(self, recipe: Recipe) -> int | None:
        """Return the recipe's micro batch, halved until it fits; None where not even one example does."""
        number = micro_batch_size(recipe)
        while recipe.scale.workers <= self.machine.places:
            if self.option(recipe, number).fits:
                return number
            if number == 1:
                break
            number = -(-number // 2)
        return None


def local_machine(recipe: Recipe) -> Machine:
    """Return this machine's GPUs, or its cores where it has no GPU or the recipe uses none."""
    if uses_gpu(recipe):
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
    return cpu_machine("this machine's CPU", 1, os.cpu_count() or 1, free, has_bf16(torch.device("cpu")))


def with_sharding(recipe: Recipe, zero_stage: int, offload: str) -> Recipe:
    """Return the recipe with another way to distribute its training."""
    scale = recipe.scale.model_copy(update={"zero_stage": zero_stage, "offload": offload, "engine": "auto"})
    return recipe.model_copy(update={"scale": scale})


def valid_options(recipe: Recipe) -> list[tuple[int, str]]:
    """Return the ZeRO stages and offload settings that the recipe may have."""
    adapter = recipe.transfer.adapter
    in_4_bits = adapter is not None and adapter.quantize is not None
    adds_to_gradients = any(method.changes_gradients() for method in methods_of(recipe))
    return [
        (stage, offload)
        for stage, offload in ALTERNATIVES
        if not (stage == 3 and (in_4_bits or adds_to_gradients)) and not (offload != "none" and adds_to_gradients)
    ]


def advise(planner: Planner, recipe: Recipe) -> dict[str, Any]:
    """Return keys of the recipe with values that make it fit, those that cost least time; empty where none do."""
    for checkpointing in dict.fromkeys((recipe.train.gradient_checkpointing, True)):
        train = recipe.train.model_copy(update={"gradient_checkpointing": checkpointing})
        for stage, offload in valid_options(recipe):
            other = with_sharding(recipe.model_copy(update={"train": train}), stage, offload)
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
