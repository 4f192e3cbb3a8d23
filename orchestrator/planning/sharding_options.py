"""Ways to spread a training over its workers, what each takes of their memory, and which of them fit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from orchestrator.planning import Machine, Memory, ModelSize, PassSize, Setting, memory_of, network_bytes, processors
from orchestrator.planning.measuring import Load, Measured, measure, measure_load, whether_packed
from orchestrator.planning.plan_input import PlanInput
from orchestrator.recipe import Recipe
from orchestrator.training.engine.devices import uses_gpu
from orchestrator.training.engine.precision import Precision, has_bf16
from orchestrator.training.engine.settings import micro_batch_size, uses_deepspeed
from orchestrator.training.engine.sizes import BF16, FP32
from orchestrator.transfer import methods_of

SPARE = 0.05
"""Of a device's memory, left for what no plan knows: pieces that fit nowhere."""
ALTERNATIVES = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all"))


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


class Planner:
    """Measures one recipe on one machine; what was measured once is kept.

    Args:
        balance: operations that the machine does while it moves a byte; 0 has only operations count.
    """

    def __init__(self, plan_input: PlanInput, machine: Machine, balance: float = 0.0) -> None:
        self.plan_input = plan_input
        self.machine = machine
        self.balance = balance
        self.encoded = plan_input.prepared.encoded("train")
        self.process = int(psutil.Process().memory_info().rss)
        """Bytes of a process of this package before it has a model: as much as this one."""
        self.packs = whether_packed(plan_input, plan_input.prepared.recipe)
        self._found: dict[Any, tuple[Load, Measured]] = {}

    def measure(self, recipe: Recipe, micro_batch: int) -> tuple[Load, Measured]:
        key = self._key(recipe, micro_batch)
        if key not in self._found:
            precision, autocasts = self.precision(recipe), self.autocasts(recipe)
            device = "cuda" if self.machine.is_gpu else "cpu"
            load = measure_load(self.encoded, recipe, micro_batch, self.packs, device, autocasts)
            self._found[key] = (
                load,
                measure(self.plan_input, recipe, load, self.packs, precision, autocasts, self.balance),
            )
        return self._found[key]

    def _key(self, recipe: Recipe, micro_batch: int) -> Any:
        transfer = recipe.transfer.model_dump_json()
        checkpointing, is_third = recipe.train.gradient_checkpointing, recipe.scale.zero_stage == 3
        return micro_batch, recipe.scale.workers, self.autocasts(recipe), checkpointing, is_third, transfer

    def precision(self, recipe: Recipe) -> Precision:
        return precision_on(self.machine, recipe)

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


def precision_on(machine: Machine, recipe: Recipe) -> Precision:
    """Return the precision that the recipe trains in on a machine."""
    wanted = recipe.train.precision
    return wanted if wanted != "auto" else ("bf16" if machine.has_bf16 else "fp32")


def machine_here(recipe: Recipe) -> Machine:
    """This machine's GPUs, or its cores where it has none or the recipe wants none."""
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
    return processors("this machine's CPU", 1, os.cpu_count() or 1, free, has_bf16(torch.device("cpu")))


def with_scale(recipe: Recipe, zero_stage: int, offload: str) -> Recipe:
    """The recipe with another way to spread it."""
    scale = recipe.scale.model_copy(update={"zero_stage": zero_stage, "offload": offload, "engine": "auto"})
    return recipe.model_copy(update={"scale": scale})


def possible(recipe: Recipe) -> list[tuple[int, str]]:
    """Stages and offload that may be written into the recipe."""
    adapter = recipe.transfer.adapter
    in_4_bits = adapter is not None and adapter.quantize is not None
    adds_to_gradients = any(method.changes_gradients() for method in methods_of(recipe))
    return [
        (stage, offload)
        for stage, offload in ALTERNATIVES
        if not (stage == 3 and (in_4_bits or adds_to_gradients)) and not (offload != "none" and adds_to_gradients)
    ]


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
