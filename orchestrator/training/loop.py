"""The loop: optimizer steps one after another, each a pure function of the recipe, the weights and the step's number.

Nothing random is carried from step to step: the order of the data depends on seed and epoch, the dropout of a forward
pass on seed, step, pass and worker. So a run that starts again at a checkpoint goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.data.batches import BatchOrder
from orchestrator.errors import RunFailed
from orchestrator.models import Frozen
from orchestrator.models.shortcuts.token_pooling import eval_mode
from orchestrator.recipe import Train
from orchestrator.tasks import Task
from orchestrator.training.engine.base import Engine
from orchestrator.training.micro_batches import cut_into_passes
from orchestrator.training.split_loader import SplitLoader


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken."""

    number: int
    """Counted from 1."""
    epoch: float
    """Passes over the training data so far."""
    loss: float
    """Mean over the targets of the global batch, before the step."""
    gradient_norm: float
    learning_rate: float
    """Peak rate times the schedule; blocks may have a multiple of it."""
    num_examples: int


@dataclass(frozen=True)
class Schedule:
    """How many steps there are, and how fast each one learns."""

    order: BatchOrder
    total_steps: int
    rate_factor: Callable[[int], float]
    """Multiple of the peak rate at a step, counted from 0."""
    micro_batch_size: int
    learning_rate: float
    seed: int
    tokens_per_pass: int | None = None
    """As `Prepared` has it."""


def make_schedule(
    train: Train, lengths: npt.NDArray[np.int64], micro_batch_size: int, tokens_per_pass: int | None = None
) -> Schedule:
    order = BatchOrder(lengths, train.global_batch_size, train.group_by_length, train.seed)
    total = train.steps or math.ceil((train.epochs or 0) * order.steps_per_epoch)
    factor = rate_schedule(train, total)
    return Schedule(order, total, factor, micro_batch_size, train.learning_rate, train.seed, tokens_per_pass)


def rate_schedule(train: Train, total_steps: int) -> Callable[[int], float]:
    """transformers' schedule of this name, as a function of the step (counted from 0)."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = 0 if train.schedule == "constant" else math.ceil(total_steps * train.warmup_ratio)
    scheduler = get_scheduler(train.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def training_steps(
    engine: Engine, task: Task, loader: SplitLoader, frozen: Frozen, schedule: Schedule, start: int = 0
) -> Iterator[Step]:
    """Take the optimizer steps after `start`, yielding each one when it is done.

    Raises:
        RunFailed: the loss or its gradient is not a finite number.
    """
    batches: list[npt.NDArray[np.int64]] = []
    for index in range(start, schedule.total_steps):
        epoch, position = divmod(index, schedule.order.steps_per_epoch)
        if position == 0 or not batches:
            batches = schedule.order.epoch(epoch)
        frozen.set_train_mode(engine.model)
        loss, norm = take_step(engine, task, loader, schedule, index, batches[position])
        check_finite(loss, norm, index + 1)
        yield Step(
            number=index + 1,
            epoch=(index + 1) / schedule.order.steps_per_epoch,
            loss=loss,
            gradient_norm=norm,
            learning_rate=schedule.learning_rate * schedule.rate_factor(index),
            num_examples=len(batches[position]),
        )


def check_finite(loss: float, norm: float, step: int) -> None:
    """Raise RunFailed where the loss of a step, or the norm of its gradient, is not a finite number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is {norm}"
        raise RunFailed(
            f"the {what} at step {step}, so training was stopped; earlier checkpoints are kept\n"
            "    -> lower train.learning_rate, or set train.precision to fp32 and look for odd examples"
        )


def take_step(
    engine: Engine, task: Task, loader: SplitLoader, schedule: Schedule, index: int, rows: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """One optimizer step on the global batch `rows`; returns its loss and the norm of its gradient."""
    passes = cut(engine, loader, schedule, rows)
    totals = loader.encoded.totals(rows)
    stream = (schedule.seed, index // schedule.order.steps_per_epoch)
    total = torch.zeros((), device=engine.device)
    for number, hands in enumerate(passes):
        mine = hands[engine.rank]
        seed_dropout(schedule.seed, index, number, engine.rank)
        # A worker without examples computes on one that counts for nothing: gradients are summed with all workers. In
        # evaluation mode, so that statistics do not learn from it.
        batch = loader.batch(mine if len(mine) else rows[:1], stream)
        mode = contextlib.nullcontext() if len(mine) else eval_mode(engine.module)
        with mode, engine.accumulate(last=number == len(passes) - 1):
            loss = task.loss(engine.model(**batch.inputs), batch, totals) * (1.0 if len(mine) else 0.0)
            engine.backward(loss)
        total += loss.detach()
    norm = engine.step(schedule.rate_factor(index))
    return float(engine.sum_over_workers(total)), norm


def cut(
    engine: Engine, loader: SplitLoader, schedule: Schedule, rows: npt.NDArray[np.int64]
) -> list[list[npt.NDArray[np.int64]]]:
    """The passes of a step, each with the rows of every worker."""
    return cut_into_passes(
        rows,
        loader.encoded.lengths,
        engine.num_workers,
        schedule.micro_batch_size,
        engine.cost_of_pass,
        loader.packs,
        schedule.tokens_per_pass,
    )


def seed_dropout(*numbers: int) -> None:
    """Start the random streams at a point that depends on these numbers alone."""
    state = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
