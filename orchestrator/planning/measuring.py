"""Memory and operations of a model's passes, measured without values for a plan."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from orchestrator import models
from orchestrator.errors import ModelError, Problem
from orchestrator.planning import ModelSize
from orchestrator.planning.plan_input import PlanInput, build
from orchestrator.planning.simulation import PassProfile, fake_weights, simulate
from orchestrator.planning.workload import Indices, Positions, Workload, positions_of
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Batch, Totals
from orchestrator.training.assembling import ModelParts
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, is_exact_in_bf16, may_cast_frozen
from orchestrator.training.features.build import boundary_of, can_pack, is_wanted, why_not_replaceable
from orchestrator.training.loop import Schedule
from orchestrator.training.split_loader import SplitLoader
from orchestrator.transfer import methods_of

LAYERS_SIMULATED = 16
"""Larger outlines are extrapolated from a few layers, because each layer takes as much."""
BYTES_OF_4_BITS = 0.5 + 4 / 64
"""Bytes of a number in NF4: half a byte, and an fp32 scale for 64 of them (Dettmers et al. 2023)."""


@dataclass(frozen=True)
class OperationCount:
    """Floating-point operations of passes, as a function of the positions that they compute on."""

    linear: float
    """For each position."""
    square: float
    """For each square of a sequence's length."""

    def of(self, positions: Positions) -> float:
        return self.linear * positions.linear + self.square * positions.square


@dataclass(frozen=True)
class PassSettings:
    """Settings of the passes that are simulated."""

    packs: bool
    """Several examples share a row."""
    precision: Precision
    autocasts: bool
    """In bf16 with fp32 weights; otherwise the weights are in the precision."""
    balance: float = 0.0
    """As `ResourceTracker` takes it."""

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The format of weights and floating inputs; None leaves them."""
        return torch.bfloat16 if self.precision == "bf16" and not self.autocasts else None


@dataclass(frozen=True)
class Measurement:
    """A model, its largest pass, and its operations."""

    size: ModelSize
    first: PassProfile
    """Profile of the largest pass that begins a step."""
    later: int
    """Bytes that the largest later pass of a step holds besides gradients; 0 where there is none."""
    whole: OperationCount
    """Forward and backward."""
    forward: OperationCount
    frozen: OperationCount
    """Forward, through the frozen blocks alone."""
    boundary_numbers: float
    """Output of the frozen blocks for each position."""
    stores_features: bool
    """Whether a run would store that output."""


@dataclass(frozen=True)
class _SimulatedModel:
    size: ModelSize
    profile: PassProfile
    stores_features: bool


def measure(plan_input: PlanInput, recipe: Recipe, workload: Workload, settings: PassSettings) -> Measurement:
    """Simulate the largest passes, and one over a single example, which tells linear and quadratic costs apart."""
    encoded = plan_input.prepared.encoded("train")
    simulator = _Simulator(plan_input, recipe, workload.schedule, settings)
    sizes = [positions_of(encoded, rows, settings.packs) for rows in (workload.first, workload.first[:1])]
    many, few = sizes
    # Where all sequences are of one length, another pass tells nothing new.
    differ = many.linear * few.square - few.linear * many.square != 0
    simulated = [simulator.run(rows) for rows in (workload.first, workload.first[:1])[: 1 + differ]]
    found = simulated[0]
    later = 0 if workload.later is None else simulator.run(workload.later).profile.activations

    def count(name: str) -> OperationCount:
        values = [float(getattr(each.profile, name)) for each in simulated]
        mean = OperationCount(values[0] / many.linear, 0.0)
        if not differ:
            return mean
        matrix = np.array([(each.linear, each.square) for each in sizes])
        linear, square = np.linalg.solve(matrix, np.array(values))
        return OperationCount(float(linear), float(square)) if square >= 0 else mean

    return Measurement(
        size=found.size,
        first=found.profile,
        later=later,
        whole=count("operations"),
        forward=count("forward_operations"),
        frozen=count("frozen_operations"),
        boundary_numbers=found.profile.boundary_numbers / many.linear,
        stores_features=found.stores_features,
    )


def uses_packed_sequences(plan_input: PlanInput, recipe: Recipe) -> bool:
    """Whether a run would put several examples into a row."""
    encoded = plan_input.prepared.encoded("train")
    if not encoded.packs:
        return False
    parts = build(plan_input, recipe) if layers_to_extrapolate(plan_input) is None else _build(plan_input, recipe, 0, 1)
    if plan_input.reads_weights:
        return can_pack(SplitLoader(encoded, torch.device("cpu")), parts.module)
    return models.takes_packed_sequences(parts.module)


def measure_model(parts: ModelParts, recipe: Recipe) -> ModelSize:
    """Count a model's parameters, and the bytes that plain PyTorch holds them in."""
    tensors = [*parts.module.parameters(), *parts.module.buffers()]
    held = sum(value.numel() * value.element_size() for value in tensors)
    trained = sum(value.numel() for value in parts.module.parameters() if value.requires_grad)
    adapter = recipe.transfer.adapter
    if adapter is not None and adapter.quantize is not None:
        quantized = [value for value in _linear_weights(parts) if not value.requires_grad]
        held -= int(sum(value.numel() * (value.element_size() - BYTES_OF_4_BITS) for value in quantized))
    total = sum(value.numel() for value in parts.module.parameters())
    added = sum(method.plan().bytes_per_number for method in methods_of(recipe))
    return ModelSize(trained, total - trained, held, len(parts.blocks.layers), round(added * trained))


def _linear_weights(parts: ModelParts) -> list[Any]:
    modules = [module for block in parts.blocks.layers for module in block.modules]
    return [module.weight for module in modules if isinstance(module, torch.nn.Linear)]


def layers_to_extrapolate(plan_input: PlanInput) -> int | None:
    """Return the number of layers, where it is too large to simulate them all; otherwise None."""
    config = models.load_config(plan_input.prepared.source)
    if (
        plan_input.reads_weights
        or models.num_layers_overrides(config, 1) is None
        or config.num_hidden_layers <= LAYERS_SIMULATED
    ):
        return None
    return int(config.num_hidden_layers)


class _Simulator:
    """Simulates passes of one recipe."""

    def __init__(self, plan_input: PlanInput, recipe: Recipe, schedule: Schedule, settings: PassSettings) -> None:
        self.plan_input = plan_input
        self.recipe = recipe
        self.schedule = schedule
        self.settings = settings

    def run(self, rows: Indices) -> _SimulatedModel:
        """Return the model's size, and the profile of a pass over these rows."""
        batch, totals = self._batch(rows)
        layers = layers_to_extrapolate(self.plan_input)
        if layers is None:
            return self._run(build(self.plan_input, self.recipe), batch, totals)
        where = self.recipe.origin.where("transfer.freeze")
        frozen = models.resolve_depth(self.recipe.transfer.freeze, layers, where).num_layers
        trained = layers - frozen
        few, more = (min(frozen, 2), min(trained, 4)), (min(frozen, 4), min(trained, 8))
        base = self._run(_build(self.plan_input, self.recipe, *few), batch, totals)
        size, profile = base.size, base.profile
        for (num_frozen, num_trained), step, rest in (
            ((more[0], few[1]), more[0] - few[0], frozen - few[0]),
            ((few[0], more[1]), more[1] - few[1], trained - few[1]),
        ):
            if step:
                other = self._run(_build(self.plan_input, self.recipe, num_frozen, num_trained), batch, totals)
                size = _extrapolate(size, other.size, base.size, rest / step)
                profile = _extrapolate(profile, other.profile, base.profile, rest / step)
        return _SimulatedModel(size, profile, base.stores_features)

    def _run(self, parts: ModelParts, batch: Batch, totals: Totals) -> _SimulatedModel:
        stores = self._stores_features(parts)
        if self.settings.autocasts and may_cast_frozen(self.recipe):
            is_stored_so = parts.body.config.get_text_config().dtype == torch.bfloat16
            cast_frozen_to_bf16(
                parts.module, is_exact_in_bf16 if self.plan_input.reads_weights else lambda _: is_stored_so
            )
        return _SimulatedModel(measure_model(parts, self.recipe), self._profile(parts, batch, totals), stores)

    def _stores_features(self, parts: ModelParts) -> bool:
        prepared, boundary = replace(self.plan_input.prepared, recipe=self.recipe), boundary_of(parts)
        if boundary is None or why_not_replaceable(self.recipe, prepared.encoded("train")) is not None:
            return False
        return is_wanted(prepared, parts, self.schedule, boundary)

    def _profile(self, parts: ModelParts, batch: Batch, totals: Totals) -> PassProfile:
        prepared, settings = self.plan_input.prepared, self.settings
        try:
            with fake_weights(parts.module, settings.input_dtype):
                autocasts, input_dtype = settings.autocasts, settings.input_dtype
                return simulate(parts, prepared.task, batch, totals, autocasts, input_dtype, settings.balance)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            source = prepared.source
            what = f"the computation of {source.name!r} depends on values ({error}), which a plan does not have"
            remedy = "train it for a few steps: result.json has peak_bytes"
            raise ModelError(Problem(what, source.where, remedy)) from error

    def _batch(self, rows: Indices) -> tuple[Batch, Totals]:
        encoded = self.plan_input.prepared.encoded("train")
        if self.plan_input.prepared.task.needs_reference:
            encoded.reference = np.zeros((len(encoded), 2))
        batch = encoded.packed_batch(rows) if self.settings.packs else encoded.batch(rows, (0, 0))
        return batch, encoded.totals(rows)


def _build(plan_input: PlanInput, recipe: Recipe, frozen: int, trained: int) -> ModelParts:
    """Build an outline with these numbers of frozen and trained layers."""
    changes = models.num_layers_overrides(models.load_config(plan_input.prepared.source), frozen + trained)
    assert changes is not None
    freeze: int | str = "all" if trained == 0 else (frozen or ("stem" if recipe.transfer.depth.stem else 0))
    transfer = recipe.transfer.model_copy(update={"freeze": freeze})
    return build(plan_input, recipe.model_copy(update={"transfer": transfer}), **changes)


def _extrapolate(total: Any, other: Any, base: Any, factor: float) -> Any:
    """Add `factor` times the difference of `other` and `base` to `total`, field by field."""
    names = [field.name for field in fields(total)]
    changes = {name: factor * (getattr(other, name) - getattr(base, name)) for name in names}
    return replace(total, **{name: getattr(total, name) + round(change) for name, change in changes.items()})
