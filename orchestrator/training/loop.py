"""The loop: optimizer steps one after another, each a pure function of the recipe, the weights and the step's number.

Nothing random is carried from step to step: the order of the data depends on seed and epoch, the dropout of a forward
pass on seed, step, pass and worker. So a run that starts again at a checkpoint goes on as if nothing had happened.

Methods act here: on the loss of each pass, and on the gradient of each step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data.batches import BatchOrder
from orchestrator.errors import RunFailed
from orchestrator.models import Frozen
from orchestrator.models.shortcuts.token_pooling import eval_mode
from orchestrator.recipe import Train
from orchestrator.tasks import Task
from orchestrator.training.engine.base import Engine
from orchestrator.training.micro_batches import cut_into_passes
from orchestrator.training.split_loader import SplitLoader
from orchestrator.transfer import LossContext, Method


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken."""

    number: int
    """Counted from 1."""
    epoch: float
    """Passes over the training data so far."""
    loss: float
    """Mean over the targets of the global batch, before the step; the task's alone."""
    gradient_norm: float
    learning_rate: float
    """Peak rate times the schedule; blocks may have a multiple of it."""
    num_examples: int
    terms: dict[str, float] = field(default_factory=dict)
    """The values of the methods' terms, by the names of the methods."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a phase, their data and their rates."""

    order: BatchOrder
    start: int
    """Steps that earlier phases took."""
    end: int
    """Number of the phase's last step."""
    total_steps: int
    """Number of the run's last step."""
    rate_factor: Callable[[int], float]
    """Returns the multiple of the peak rate at a step, counted from 0."""
    micro_batch_size: int
    learning_rate: float
    seed: int
    tokens_per_pass: int | None = None
    """As `Prepared` has it."""

    @property
    def num_steps(self) -> int:
        """Steps of the phase."""
        return self.end - self.start


def make_schedule(
    train: Train,
    lengths: npt.NDArray[np.int64],
    micro_batch_size: int,
    tokens_per_pass: int | None = None,
    start: int = 0,
    later: int = 0,
) -> Schedule:
    """Return the schedule of a phase.

    Args:
        train: with the phase's values.
        lengths: of the training examples.
        start: steps that earlier phases took.
        later: steps that later phases will take.
    """
    order = BatchOrder(lengths, train.global_batch_size, train.group_by_length, train.seed)
    num_steps = count_steps(train, order.steps_per_epoch)
    factor = rate_schedule(train, num_steps)
    return Schedule(
        order=order,
        start=start,
        end=start + num_steps,
        total_steps=start + num_steps + later,
        rate_factor=lambda index: factor(index - start),
        micro_batch_size=micro_batch_size,
        learning_rate=train.learning_rate,
        seed=train.seed,
        tokens_per_pass=tokens_per_pass,
    )


def count_steps(train: Train, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a training."""
    return train.steps or math.ceil((train.epochs or 0) * steps_per_epoch)


def rate_schedule(train: Train, num_steps: int) -> Callable[[int], float]:
    """Return transformers' schedule of this name, as a function of the step (counted from 0)."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = 0 if train.schedule == "constant" else math.ceil(num_steps * train.warmup_ratio)
    scheduler = get_scheduler(train.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def training_steps(
    engine: Engine,
    task: Task,
    loader: SplitLoader,
    frozen: Frozen,
    schedule: Schedule,
    start: int = 0,
    methods: Sequence[Method] = (),
) -> Iterator[Step]:
    """Take the optimizer steps after `start` up to the end of the phase, yielding each one when it is done.

    Raises:
        RunFailed: the loss or its gradient is not a finite number.
    """
    batches: list[npt.NDArray[np.int64]] = []
    for index in range(start, schedule.end):
        epoch, position = divmod(index, schedule.order.steps_per_epoch)
        if position == 0 or not batches:
            batches = schedule.order.epoch(epoch)
        frozen.set_train_mode(engine.model)
        loss, terms, norm = take_step(engine, task, loader, schedule, index, batches[position], methods)
        check_finite(loss, norm, index + 1)
        yield Step(
            number=index + 1,
            epoch=(index + 1) / schedule.order.steps_per_epoch,
            loss=loss,
            gradient_norm=norm,
            learning_rate=schedule.learning_rate * schedule.rate_factor(index),
            num_examples=len(batches[position]),
            terms=terms,
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
    engine: Engine,
    task: Task,
    loader: SplitLoader,
    schedule: Schedule,
    index: int,
    rows: npt.NDArray[np.int64],
    methods: Sequence[Method] = (),
) -> tuple[float, dict[str, float], float]:
    """Take one optimizer step on the global batch `rows`.

    Returns:
        The task's loss, what each method added to it, and the norm of the gradient of all.
    """
    passes = cut(engine, loader, schedule, rows)
    totals = loader.encoded.totals(rows)
    stream = (schedule.seed, index // schedule.order.steps_per_epoch)
    total = torch.zeros((), device=engine.device)
    added: dict[str, Tensor] = {}
    for number, shares in enumerate(passes):
        mine = shares[engine.rank]
        seed_dropout(schedule.seed, index, number, engine.rank)
        # A worker without examples computes on one that counts for nothing: gradients are summed with all workers. In
        # evaluation mode, so that statistics do not learn from it.
        batch = loader.batch(mine if len(mine) else rows[:1], stream)
        mode = contextlib.nullcontext() if len(mine) else eval_mode(engine.module)
        with mode, engine.accumulate(last=number == len(passes) - 1):
            outputs = engine.model(**batch.inputs)
            counts = 1.0 if len(mine) else 0.0
            loss = task.loss(outputs, batch, totals) * counts
            total += loss.detach()
            for name, term in _terms(methods, LossContext(outputs, batch, totals, index)):
                loss = loss + term * counts
                added[name] = added.get(name, torch.zeros_like(total)) + term.detach() * counts
            engine.backward(loss)
    added = {name: engine.sum_over_workers(value) for name, value in added.items()}
    added |= add_to_gradients(engine, methods, index)
    norm = engine.step(schedule.rate_factor(index))
    return float(engine.sum_over_workers(total)), {name: float(value) for name, value in added.items()}, norm


def _terms(methods: Sequence[Method], context: LossContext) -> Iterator[tuple[str, Tensor]]:
    for method in methods:
        term = method.loss(context)
        if term is not None:
            yield method.name, term


def add_to_gradients(engine: Engine, methods: Sequence[Method], index: int) -> dict[str, Tensor]:
    """Let methods add to the gradients of a step.

    Returns:
        The values of the terms that the additions are the gradients of, by the methods' names.
    """
    changing = [method for method in methods if method.changes_gradients()]
    added = {method.name: torch.zeros((), device=engine.device) for method in changing}
    if changing:
        with torch.no_grad():
            for part in engine.trained_parts():
                for method in changing:
                    value = method.gradient(part, index)
                    if value is not None:
                        added[method.name] += value
    return added if engine.has_whole_parts else {name: engine.sum_over_workers(each) for name, each in added.items()}


def cut(
    engine: Engine, loader: SplitLoader, schedule: Schedule, rows: npt.NDArray[np.int64]
) -> list[list[npt.NDArray[np.int64]]]:
    """Return the passes of a step, each with the rows of every worker."""
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
