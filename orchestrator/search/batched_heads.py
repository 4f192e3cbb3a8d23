"""Many heads on one frozen body, trained as one batched problem.

Trials that train only the head, and differ only in how fast it learns, see the same features in the same order. Their
heads are stacked along a new first axis (`torch.func.vmap` over the parameters), so that a step of all of them costs
little more than a step of one. The numbers are those of the trials by themselves: the same batches, the same dropout,
each head clipped by its own norm and stepped at its own rate, its evaluations judged and recorded by the hooks of the
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from orchestrator.errors import RunFailed
from orchestrator.models.attempt import calling_model
from orchestrator.recipe import Recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.search.batched_optimizer import BatchedAdamW
from orchestrator.tasks.base import Batch, Predictions, Totals
from orchestrator.tasks.bases.padded import as_arrays
from orchestrator.training.evaluation import in_order, predict_share
from orchestrator.training.hooks import PHASE, Evaluator, Recorder, TrainingState, is_due
from orchestrator.training.loop import Step, check_finite, cut, rate_schedule, seed_dropout
from orchestrator.training.parameter_groups import parameter_groups, rate_multipliers
from orchestrator.training.session import Session
from orchestrator.training.split_loader import SplitLoader
from orchestrator.transfer import methods_of

STACKING = "training several heads together"


class RowsInMemory(RunDirectory):
    """Keeps the rows that hooks write to metrics.jsonl until the best evaluation has all of its metrics."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.rows: list[dict[str, Any]] = []

    def append_metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


class HeadState:
    """One of the heads: its recipe, its hooks, and what they remember.

    Args:
        session: of any of the heads.
    """

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self.recipe = recipe
        self.state = TrainingState()
        self.failure: str | None = None
        self.weights: dict[str, Tensor] = {}
        """At the best evaluation."""
        self.best_row: dict[str, Any] | None = None
        self.best_predictions: Predictions = {}
        self.rate_factor = rate_schedule(recipe.train, session.schedule.num_steps)
        self._directory = RowsInMemory(session.directory.root)
        self.recorder = Recorder(session.engine.exchange, self._directory, recipe.train.log_every)
        task, select = session.prepared.task, session.loaders["select"]
        self.evaluator = Evaluator(
            session.engine, task, select, session.metric, recipe.train, session.schedule, self._directory, PHASE
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its rows of metrics.jsonl."""
        return self._directory.rows

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.state.stop is not None


class BatchedHeads:
    """Heads that are trained together, each with its recipe.

    Args:
        session: of any one of the recipes; all heads read its features and start as its head.
    """

    def __init__(self, session: Session, recipes: Sequence[Recipe]) -> None:
        self.session = session
        self.heads = [HeadState(session, recipe) for recipe in recipes]
        trained = session.engine.trained
        count = len(recipes)
        self.stacked = {
            name: value.detach().repeat(count, *[1] * value.dim()).view(count, *value.shape).requires_grad_()
            for name, value in trained.items()
        }
        # At a rate and a decay of 1 the groups hold the multipliers of each parameter.
        groups = parameter_groups(trained, rate_multipliers(session.parts, methods_of(recipes[0])), 1.0, 1.0)
        names = {id(value): name for name, value in trained.items()}
        multipliers = {
            names[id(value)]: (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]
        }
        self.optimizer = BatchedAdamW(self.stacked, multipliers, [recipe.train for recipe in recipes])

    def train(self) -> list[HeadState]:
        """Train all heads to their ends.

        Raises:
            CallFailed: the model, its head or the task's loss cannot be stacked, or memory does not suffice for all.
        """
        session, schedule = self.session, self.session.schedule
        for index in range(schedule.num_steps):
            epoch, position = divmod(index, schedule.order.steps_per_epoch)
            if position == 0:
                batches = schedule.order.epoch(epoch)
            session.parts.frozen.set_train_mode(session.engine.model)
            self._step(index, batches[position])
            every = session.prepared.recipe.train.evaluate_every
            if is_due(every, index + 1, schedule.order.steps_per_epoch, schedule.end):
                self._evaluate(index)
            if all(head.is_over for head in self.heads):
                break
        for head in self.heads:
            self._complete(head)
        return self.heads

    def _step(self, index: int, rows: npt.NDArray[np.int64]) -> None:
        """Take one optimizer step of all heads on the global batch `rows`."""
        session, schedule = self.session, self.session.schedule
        loader = session.loaders["train"]
        totals = loader.encoded.totals(rows)
        stream = (schedule.seed, index // schedule.order.steps_per_epoch)
        losses = torch.zeros(len(self.heads), device=session.engine.device)
        for number, (mine,) in enumerate(cut(session.engine, loader, schedule, rows)):
            seed_dropout(schedule.seed, index, number, 0)
            batch = loader.batch(mine, stream)
            with calling_model(STACKING):
                share = vmap(self._loss_function(batch, totals), randomness="same")(self.stacked)
                torch.autograd.backward(share.sum())
            losses += share.detach()
        norms = self.optimizer.gradient_norms()
        self._record(index, losses.tolist(), norms.tolist(), len(rows))
        factors = [0.0 if head.is_over else head.rate_factor(index) for head in self.heads]
        self.optimizer.step(norms, torch.tensor(factors, device=session.engine.device))

    def _loss_function(self, batch: Batch, totals: Totals) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            outputs = functional_call(self.session.engine.model, parameters, (), batch.inputs)
            found: Tensor = self.session.prepared.task.loss(outputs, batch, totals)
            return found

        return loss

    def _record(self, index: int, losses: list[float], norms: list[float], num_examples: int) -> None:
        """Record the step of each head; one whose loss or gradient is not finite has failed."""
        for head, loss, norm in zip(self.heads, losses, norms, strict=True):
            if head.is_over:
                continue
            try:
                check_finite(loss, norm, index + 1)
            except RunFailed as error:
                head.failure = str(error)
            else:
                head.recorder.after_step(self._step_of(head, index, loss, norm, num_examples), head.state)

    def _step_of(self, head: HeadState, index: int, loss: float, norm: float, num_examples: int) -> Step:
        epoch = (index + 1) / self.session.schedule.order.steps_per_epoch
        rate = head.recipe.train.learning_rate * head.rate_factor(index)
        head.state.step = index + 1
        return Step(index + 1, epoch, loss, norm, rate, num_examples)

    @torch.no_grad()
    def _evaluate(self, index: int) -> None:
        """Score each head on *select* by the metric that decides."""
        task, metric = self.session.prepared.task, self.session.metric
        targets = self.session.loaders["select"].encoded.targets()
        predictions, losses = self._predict()
        for number, head in enumerate(self.heads):
            if head.is_over:
                continue
            own, loss = predictions[number], losses[number]
            value = loss if metric.name == "loss" else task.score(metric.name, own, targets)
            step = self._step_of(head, index, loss, 0.0, 0)
            head.evaluator.record(step, head.state, {"loss": loss, metric.name: value})
            if head.state.improved:
                head.best_row, head.best_predictions = head.evaluator.last, own
                head.weights = {name: value[number].detach().clone() for name, value in self.stacked.items()}

    def _predict(self) -> tuple[list[Predictions], list[float]]:
        """Return the predictions of each head on *select*, and their losses."""
        session, task = self.session, self.session.prepared.task

        def predict(
            model: Any, task: Any, loader: SplitLoader, rows: npt.NDArray[np.int64], totals: Totals
        ) -> tuple[list[Predictions], Tensor]:
            batch = loader.batch(rows)

            def of_head(parameters: dict[str, Tensor]) -> Any:
                outputs = functional_call(model, parameters, (), batch.inputs)
                return task.predict(outputs, batch), task.loss(outputs, batch, totals)

            with calling_model(STACKING):
                stacked, losses = vmap(of_head)(self.stacked)
            heads = range(len(self.heads))
            return [as_arrays(tree_map(lambda values, head=head: values[head], stacked)) for head in heads], losses

        size = session.schedule.micro_batch_size, session.schedule.tokens_per_pass
        gathered: Any = predict_share(session.engine, task, session.loaders["select"], *size, predict)
        ((rows, parts, losses),) = gathered  # One worker.
        found = [in_order([(rows, [part[number] for part in parts], 0.0)]) for number in range(len(self.heads))]
        return found, losses.tolist()

    def _complete(self, head: HeadState) -> None:
        """Add all metrics to the row of the best evaluation, which until then has only the one that decides."""
        if head.best_row is not None:
            targets = self.session.loaders["select"].encoded.targets()
            head.best_row.update(self.session.prepared.task.metrics(head.best_predictions, targets))
