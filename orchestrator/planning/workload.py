"""The passes of an epoch on the busiest worker, cut as the training loop cuts them."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from orchestrator.planning.plan_input import PlanInput
from orchestrator.recipe import Recipe
from orchestrator.tasks import Encoded
from orchestrator.training.engine.base import cost_of_pass
from orchestrator.training.hooks import is_due
from orchestrator.training.loop import Schedule, make_schedule
from orchestrator.training.micro_batches import cut_into_passes

Indices = npt.NDArray[np.int64]
BATCHES_EXAMINED = 200


@dataclass(frozen=True)
class Positions:
    """The size of passes: most costs are linear in the first number, the cost of attention is linear in the second."""

    linear: float
    """Positions, padding included."""
    square: float
    """Sum of the squared lengths of the sequences."""

    def __add__(self, other: Positions) -> Positions:
        return Positions(self.linear + other.linear, self.square + other.square)

    def __mul__(self, factor: float) -> Positions:
        return Positions(self.linear * factor, self.square * factor)


@dataclass(frozen=True)
class Workload:
    """The steps of an epoch, for the busiest worker."""

    schedule: Schedule
    passes: int
    """The most that a step has."""
    first: Indices
    """The examples of the largest pass among those that begin a step."""
    later: Indices | None
    """The same among passes that follow others in a step; None where each step is one pass."""
    epoch: Positions
    """Positions of all passes of an epoch."""

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.schedule.order.steps_per_epoch

    def num_evaluations(self, recipe: Recipe, steps: int) -> int:
        """Return how often *select* is scored in a training of `steps` steps."""
        every = recipe.train.evaluate_every
        return sum(is_due(every, number, self.steps, steps) for number in range(1, steps + 1))


def measure_workload(
    plan_input: PlanInput, recipe: Recipe, micro_batch: int, packs: bool, device: str, autocasts: bool
) -> Workload:
    """Cut the batches of an epoch into passes; of a long epoch, every n-th batch.

    Args:
        device: `cuda` or `cpu`.
        autocasts: whether passes compute in bf16 with fp32 weights.
    """
    encoded, lengths = plan_input.prepared.encoded("train"), plan_input.lengths
    schedule = make_schedule(recipe.train, lengths, micro_batch)
    batches = schedule.order.epoch(0)
    some = batches[:: -(-len(batches) // BATCHES_EXAMINED)]
    cost, workers = cost_of_pass(device, autocasts), recipe.scale.workers
    epoch, num_passes = Positions(0.0, 0.0), 1
    # The largest pass of those that begin a step, and of the others.
    largest: list[tuple[float, Indices]] = [(0.0, batches[0][:1]), (0.0, batches[0][:0])]
    for batch in some:
        passes = cut_into_passes(batch, lengths, workers, micro_batch, cost, packs)
        num_passes = max(num_passes, len(passes))
        for number, shares in enumerate(passes):
            found = ((positions_of(encoded, plan_input.stored_rows(rows), packs), rows) for rows in shares)
            busiest, rows = max(found, key=lambda pair: pair[0].linear)
            epoch += busiest
            largest[number > 0] = max(largest[number > 0], (busiest.linear, rows), key=itemgetter(0))
    first, later = (plan_input.stored_rows(rows) for _, rows in largest)
    return Workload(schedule, num_passes, first, later if len(later) else None, epoch * (len(batches) / len(some)))


def positions_of(encoded: Encoded, rows: Indices, packs: bool) -> Positions:
    """Return what a pass over these rows computes on."""
    if not len(rows):
        return Positions(0.0, 0.0)
    lengths = encoded.lengths[rows].astype(float)
    return _sum_of(lengths if packs else np.full(len(rows), lengths.max()), encoded.rows_per_example)


def positions_of_split(encoded: Encoded, num_workers: int) -> Positions:
    """Return a worker's share of a whole split, without padding."""
    return _sum_of(encoded.lengths.astype(float), encoded.rows_per_example / num_workers)


def _sum_of(lengths: npt.NDArray[np.float64], factor: float) -> Positions:
    return Positions(float(lengths.sum()), float((lengths**2).sum())) * factor
