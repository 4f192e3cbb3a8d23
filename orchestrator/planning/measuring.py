"""How much memory a model's passes take and how many operations they are, for a plan; and how much work an epoch is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from orchestrator import models
from orchestrator.data.batches import assign
from orchestrator.errors import ModelError, Problem
from orchestrator.planning import ModelSize
from orchestrator.planning.plan_input import PlanInput, build
from orchestrator.planning.simulation import Pass, fake_weights, simulate
from orchestrator.recipe import Recipe
from orchestrator.tasks import Encoded
from orchestrator.tasks.base import Batch, Totals
from orchestrator.training.assembling import Parts
from orchestrator.training.engine.base import cost_of_pass
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, may_cast_frozen, survives
from orchestrator.training.features.build import can_pack
from orchestrator.training.loop import NEVER, make_schedule
from orchestrator.training.split_loader import SplitLoader
from orchestrator.transfer import methods_of

Rows = npt.NDArray[np.int64]
BATCHES_LOOKED_AT = 200
LAYERS_SIMULATED = 16
"""Of outlines with more than so many, few are gone through, and the rest is worked out: each layer takes as much."""
BYTES_OF_4_BITS = 0.5 + 4 / 64
"""Of a number in NF4: half a byte, and an fp32 scale for 64 of them (Dettmers et al. 2023)."""


@dataclass(frozen=True)
class Load:
    """What the steps of an epoch are for the busiest worker."""

    steps: int
    passes: int
    """The most of a step."""
    first: Rows
    """The examples of the pass that takes most, of those that begin a step."""
    later: Rows | None
    """The same of those that find gradients of passes before them; None where there are none."""
    linear: float
    """Positions that are computed, in all passes of an epoch."""
    square: float
    """Sum of the squares of the lengths of texts, which attention takes."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations: so many for each position, and for each square of a text's length."""

    linear: float
    square: float

    def of(self, load: Load) -> float:
        return self.linear * load.linear + self.square * load.square


@dataclass(frozen=True)
class Measured:
    """A model, its largest pass, and what it computes."""

    size: ModelSize
    first: Pass
    """The largest that begins a step."""
    later: int
    """Bytes that the largest pass after such a one holds besides gradients; 0 where there is none."""
    whole: Work
    """Forward and backward."""
    forward: Work
    frozen: Work
    """Forward, through the frozen blocks alone."""
    boundary_numbers: float
    """What the frozen blocks hand on for each position."""


def measure_load(encoded: Encoded, recipe: Recipe, micro_batch: int, packs: bool, device: str, autocasts: bool) -> Load:
    """Deal out an epoch, or a part of one that is long."""
    order = make_schedule(recipe.train, encoded.lengths, micro_batch).order
    batches = order.epoch(0)
    some = batches[:: -(-len(batches) // BATCHES_LOOKED_AT)]
    cost = NEVER if packs else cost_of_pass(device, autocasts)
    linear, square, passes = 0.0, 0.0, 1
    most: list[tuple[float, Rows]] = [(0.0, batches[0][:1]), (0.0, batches[0][:0])]  # That begin a step, and others.
    for batch in some:
        dealt = assign(batch, encoded.lengths, recipe.scale.workers, micro_batch, cost)
        passes = max(passes, len(dealt))
        for number, hands in enumerate(dealt):
            (size, squares), rows = max(((positions(encoded, each, packs), each) for each in hands), key=itemgetter(0))
            linear, square = linear + size, square + squares
            most[number > 0] = max(most[number > 0], (size, rows), key=itemgetter(0))
    share = len(batches) / len(some)
    first, later = (rows for _, rows in most)
    return Load(order.steps_per_epoch, passes, first, later if len(later) else None, linear * share, square * share)


def positions(encoded: Encoded, rows: Rows, packs: bool) -> tuple[float, float]:
    """Positions that a pass computes, and the sum of the squares of its texts' lengths."""
    if not len(rows):
        return 0.0, 0.0
    lengths = encoded.lengths[rows].astype(float)
    if not packs:
        lengths = np.full(len(rows), lengths.max())
    times = encoded.rows_per_example
    return times * float(lengths.sum()), times * float((lengths**2).sum())


def measure(
    plan_input: PlanInput,
    recipe: Recipe,
    load: Load,
    packs: bool,
    precision: Precision,
    autocast: bool,
    balance: float = 0.0,
) -> Measured:
    """Go through the largest passes, and through one over a single example.

    Args:
        autocast: compute in bf16 with fp32 weights; otherwise the weights are in the precision.
        balance: as `Tally` has it.
    """
    encoded = plan_input.prepared.encoded("train")

    def look(rows: Rows) -> tuple[ModelSize, Pass]:
        return _measure(plan_input, recipe, *_batch(plan_input, rows, packs), precision, autocast, balance)

    sizes = [positions(encoded, each, packs) for each in (load.first, load.first[:1])]
    (many, squares), (few, few_squares) = sizes
    # Where all texts are of one length, or there are none, another pass says nothing new.
    differ = many * few_squares - few * squares != 0
    found = [look(rows) for rows in (load.first, load.first[:1])[: 1 + differ]]
    size, first = found[0]
    later = 0 if load.later is None else look(load.later)[1].activations

    def work(name: str) -> Work:
        values = [float(getattr(one, name)) for _, one in found]
        linear, square = np.linalg.solve(np.array(sizes), np.array(values)) if differ else (values[0] / many, 0.0)
        return Work(float(linear), float(square)) if square >= 0 else Work(values[0] / many, 0.0)

    return Measured(
        size,
        first,
        later,
        work("operations"),
        work("forward_operations"),
        work("frozen_operations"),
        first.boundary_numbers / many,
    )


def whether_packed(plan_input: PlanInput, recipe: Recipe) -> bool:
    """Whether a run would put several texts into a row."""
    encoded = plan_input.prepared.encoded("train")
    if not encoded.packs:
        return False
    parts = build(plan_input, recipe) if layers_left_out(plan_input) is None else _some_layers(plan_input, recipe, 0, 1)
    if plan_input.reads_weights:
        return can_pack(SplitLoader(encoded, torch.device("cpu")), parts.module)
    return models.takes_packed_sequences(parts.module)


def measure_model(parts: Parts, recipe: Recipe) -> ModelSize:
    tensors = [*parts.module.parameters(), *parts.module.buffers()]
    held = sum(value.numel() * value.element_size() for value in tensors)
    trained = sum(value.numel() for value in parts.module.parameters() if value.requires_grad)
    adapter = recipe.transfer.adapter
    if adapter is not None and adapter.quantize is not None:
        narrow = [value for value in _products(parts) if not value.requires_grad]
        held -= int(sum(value.numel() * (value.element_size() - BYTES_OF_4_BITS) for value in narrow))
    total = sum(value.numel() for value in parts.module.parameters())
    added = sum(method.plan().bytes_per_number for method in methods_of(recipe))
    return ModelSize(trained, total - trained, held, len(parts.blocks.layers), round(added * trained))


def _products(parts: Parts) -> list[Any]:
    """The weights of the layers' linear functions."""
    modules = [module for block in parts.blocks.layers for module in block.modules]
    return [module.weight for module in modules if isinstance(module, torch.nn.Linear)]


def _narrowed(plan_input: PlanInput, parts: Parts, recipe: Recipe, autocast: bool) -> Parts:
    if autocast and may_cast_frozen(recipe):
        is_stored_so = parts.body.config.get_text_config().dtype == torch.bfloat16
        cast_frozen_to_bf16(parts.module, survives if plan_input.reads_weights else lambda _: is_stored_so)
    return parts


def _measure(
    plan_input: PlanInput,
    recipe: Recipe,
    batch: Batch,
    totals: Totals,
    precision: Precision,
    autocast: bool,
    balance: float,
) -> tuple[ModelSize, Pass]:
    """The model, and a pass over a batch."""

    def look(parts: Parts) -> tuple[ModelSize, Pass]:
        parts = _narrowed(plan_input, parts, recipe, autocast)
        return measure_model(parts, recipe), _simulate(plan_input, parts, batch, totals, precision, autocast, balance)

    layers = layers_left_out(plan_input)
    if layers is None:
        return look(build(plan_input, recipe))
    frozen = models.resolve_depth(recipe.transfer.freeze, layers, recipe.origin.where("transfer.freeze")).num_layers
    trained = layers - frozen
    first, more = (min(frozen, 2), min(trained, 4)), (min(frozen, 4), min(trained, 8))
    base = look(_some_layers(plan_input, recipe, *first))
    total = base
    for shape, step, rest in (
        ((more[0], first[1]), more[0] - first[0], frozen - first[0]),
        ((first[0], more[1]), more[1] - first[1], trained - first[1]),
    ):
        if step:
            other = look(_some_layers(plan_input, recipe, *shape))
            size, one = (_add(*each, rest / step) for each in zip(total, other, base, strict=True))
            total = size, one
    return total


def layers_left_out(plan_input: PlanInput) -> int | None:
    """The number of layers, where it is so large that not all of them are gone through."""
    config = models.load_config(plan_input.prepared.source)
    if (
        plan_input.reads_weights
        or models.layer_changes(config, 1) is None
        or config.num_hidden_layers <= LAYERS_SIMULATED
    ):
        return None
    return int(config.num_hidden_layers)


def _add(total: Any, other: Any, base: Any, times: float) -> Any:
    """`total` and so many times the difference of two others, in each field."""
    names = [field.name for field in fields(total)]
    changes = {name: times * (getattr(other, name) - getattr(base, name)) for name in names}
    return replace(total, **{name: getattr(total, name) + round(change) for name, change in changes.items()})


def _some_layers(plan_input: PlanInput, recipe: Recipe, frozen: int, trained: int) -> Parts:
    changes = models.layer_changes(models.load_config(plan_input.prepared.source), frozen + trained)
    assert changes is not None
    freeze: int | str = "all" if trained == 0 else (frozen or ("stem" if recipe.transfer.freeze == "stem" else 0))
    transfer = recipe.transfer.model_copy(update={"freeze": freeze})
    return build(plan_input, recipe.model_copy(update={"transfer": transfer}), **changes)


def _simulate(
    plan_input: PlanInput,
    parts: Parts,
    batch: Batch,
    totals: Totals,
    precision: Precision,
    autocast: bool,
    balance: float,
) -> Pass:
    wide = torch.bfloat16 if precision == "bf16" and not autocast else None
    try:
        with fake_weights(parts.module, wide):
            return simulate(parts, plan_input.prepared.task, batch, totals, autocast, wide, balance)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        source = plan_input.prepared.source
        what = f"what {source.name!r} computes depends on values ({error}), so it cannot be planned from shapes"
        raise ModelError(Problem(what, source.where, "train it for some steps: result.json has peak_bytes")) from error


def _batch(plan_input: PlanInput, rows: Rows, packs: bool) -> tuple[Batch, Totals]:
    encoded = plan_input.prepared.encoded("train")
    if plan_input.prepared.task.needs_reference:
        encoded.reference = np.zeros((len(encoded), 2))
    return encoded.packed_batch(rows) if packs else encoded.batch(rows, (0, 0)), encoded.totals(rows)
