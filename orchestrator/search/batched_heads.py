"""Many heads on one frozen body, trained as one batched problem.

Trials that train nothing but the head, and differ in nothing but how fast it learns, see the same features in the same
order. Their heads are stacked along a new first axis (`torch.func.vmap` over the parameters), so that a step of all of
them costs little more than a step of one. The numbers are those of the trials by themselves: the same batches, the same
dropout, each head clipped by its own norm and stepped by AdamW (Loshchilov & Hutter 2019) at its own rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from orchestrator.data.batches import evaluation_batches
from orchestrator.models.attempt import calling_model
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Batch, Predictions, Totals
from orchestrator.tasks.bases.padded import as_arrays
from orchestrator.training.evaluation import EVALUATION_BATCH_FACTOR, in_order
from orchestrator.training.hooks import PHASE, TrainingState, is_due, judge
from orchestrator.training.loop import cut, rate_schedule, seed_dropout
from orchestrator.training.parameter_groups import parameter_groups, rate_multipliers
from orchestrator.training.session import Session
from orchestrator.transfer import methods_of

STACKING = "training several heads together"
BETAS, EPSILON = (0.9, 0.999), 1e-8  # As in torch.optim.AdamW.


@dataclass
class Head:
    """One of the heads."""

    recipe: Recipe
    state: TrainingState = field(default_factory=TrainingState)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Its rows of metrics.jsonl."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """At the best evaluation."""
    best_row: int = -1
    best_predictions: Predictions = field(default_factory=dict)
    failure: str | None = None

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.state.stop is not None


class Heads:
    """Heads that are trained together, each with its recipe.

    Args:
        session: of any one of the recipes; its features are fed, its head is where all of them begin.
    """

    def __init__(self, session: Session, recipes: Sequence[Recipe]) -> None:
        self.session = session
        self.heads = [Head(recipe) for recipe in recipes]
        module = session.parts.module
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        count = len(recipes)
        self.stacked = {
            name: value.detach().repeat(count, *[1] * value.dim()).view(count, *value.shape).requires_grad_()
            for name, value in trained.items()
        }
        self.moments = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.stacked.items()
        }
        # With a rate and a decay of 1 the groups tell what each parameter's are multiplied with.
        groups = parameter_groups(trained, rate_multipliers(session.parts, methods_of(recipes[0])), 1.0, 1.0)
        names = {id(value): name for name, value in trained.items()}
        self.multipliers = {
            names[id(value)]: (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]
        }
        self.schedules = [rate_schedule(recipe.train, session.schedule.total_steps) for recipe in recipes]

    def train(self) -> list[Head]:
        """Train all heads to their ends.

        Raises:
            CallFailed: the model, its head or the task's loss cannot be stacked, or there is no memory for all of them.
        """
        session, plan = self.session, self.session.schedule
        losses: list[Tensor] = []
        for index in range(plan.total_steps):
            epoch, position = divmod(index, plan.order.steps_per_epoch)
            if position == 0:
                batches = plan.order.epoch(epoch)
            session.parts.frozen.set_train_mode(session.engine.model)
            losses.append(self._step(index, batches[position]))
            every = session.prepared.recipe.train.evaluate_every
            if is_due(every, index + 1, plan.order.steps_per_epoch, plan.total_steps):
                self._record_losses(losses, index + 1)
                losses = []
                self._evaluate(index + 1)
            if all(head.is_over for head in self.heads):
                break
        for head in self.heads:
            self._complete(head)
        return self.heads

    def _step(self, index: int, rows: npt.NDArray[np.int64]) -> Tensor:
        """One optimizer step of all heads; returns their losses before it, shape [heads]."""
        session, plan = self.session, self.session.schedule
        loader = session.loaders["train"]
        totals = loader.encoded.totals(rows)
        total = torch.zeros(len(self.heads), device=session.engine.device)
        for number, (mine,) in enumerate(cut(session.engine, loader, plan, rows)):
            seed_dropout(plan.seed, index, number, 0)
            batch = loader.batch(mine)
            with calling_model(STACKING):
                losses = vmap(self._loss_function(batch, totals), randomness="same")(self.stacked)
                torch.autograd.backward(losses.sum())
            total += losses.detach()
        self._update(index, total)
        return total

    def _loss_function(self, batch: Batch, totals: Totals) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            outputs = functional_call(self.session.engine.model, parameters, (), batch.inputs)
            found: Tensor = self.session.prepared.task.loss(outputs, batch, totals)
            return found

        return loss

    @torch.no_grad()
    def _update(self, index: int, losses: Tensor) -> None:
        gradients = {name: value.grad for name, value in self.stacked.items()}
        squares = [g.flatten(1).pow(2).sum(1) for g in gradients.values() if g is not None]
        norms = torch.stack(squares).sum(0).sqrt()
        finite = torch.isfinite(norms) & torch.isfinite(losses)
        self._tell_failures(index, losses, finite)
        limit = self.session.prepared.recipe.train.max_grad_norm
        clip = torch.ones_like(norms) if limit is None else (limit / (norms + 1e-6)).clamp(max=1.0)
        live = torch.tensor([not head.is_over for head in self.heads], device=norms.device) & finite
        factors = [schedule(index) for schedule in self.schedules]
        rates = self._per_head([head.recipe.train.learning_rate for head in self.heads]) * self._per_head(factors)
        decays = self._per_head([head.recipe.train.weight_decay for head in self.heads])
        for name, value in self.stacked.items():
            gradient = gradients[name]
            assert gradient is not None
            shape = (-1, *[1] * (value.dim() - 1))
            # What is not finite must not reach the moments; such a head is not looked at any more.
            gradient = torch.nan_to_num(gradient * clip.view(shape), 0.0, 0.0, 0.0)
            multiplier, decay = self.multipliers[name]
            rate = torch.where(live, rates * multiplier, 0.0).view(shape)
            self._adamw(value, gradient, self.moments[name], rate, (decays * decay).view(shape), index + 1)
            value.grad = None

    @staticmethod
    def _adamw(
        value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rate: Tensor, decay: Tensor, step: int
    ) -> None:
        first, second = moments
        value.mul_(1 - rate * decay)
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        denominator = (second.sqrt() / math.sqrt(1 - BETAS[1] ** step)).add_(EPSILON)
        value.sub_(rate / (1 - BETAS[0] ** step) * first / denominator)

    def _per_head(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.session.engine.device)

    def _tell_failures(self, index: int, losses: Tensor, finite: Tensor) -> None:
        for head, loss, is_finite in zip(self.heads, losses.tolist(), finite.tolist(), strict=True):
            if not is_finite and not head.is_over:
                what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
                head.failure = f"the {what} at step {index + 1}"

    def _record_losses(self, losses: list[Tensor], step: int) -> None:
        """A train row for each head: the mean loss since the last evaluation."""
        means = torch.stack(losses).mean(0).tolist()
        for head, loss in zip(self.heads, means, strict=True):
            if not head.is_over:
                head.rows.append({**self._place(step), "split": "train", "loss": loss, "seconds": 0.0})

    def _place(self, step: int) -> dict[str, Any]:
        return {"step": step, "epoch": step / self.session.schedule.order.steps_per_epoch, "phase": PHASE}

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        session = self.session
        task, metric, loader = session.prepared.task, session.metric, session.loaders["select"]
        targets = loader.encoded.targets()
        predictions, losses = self._predict()
        for number, head in enumerate(self.heads):
            if head.is_over:
                continue
            own = predictions[number]
            loss = float(losses[number])
            value = loss if metric.name == "loss" else task.score(metric.name, own, targets)
            head.state.step = step
            head.rows.append({**self._place(step), "split": "select", "loss": loss, metric.name: value, "seconds": 0.0})
            judge(value, loss, step, head.state, metric, head.recipe.train)
            if head.state.improved:
                head.best_row, head.best_predictions = len(head.rows) - 1, own
                head.weights = {name: value[number].detach().clone() for name, value in self.stacked.items()}

    def _predict(self) -> tuple[list[Predictions], Tensor]:
        """Return the predictions of each head on *select*, and their losses, shape [heads]."""
        session = self.session
        task, loader = session.prepared.task, session.loaders["select"]
        session.engine.model.eval()
        total = torch.zeros(len(self.heads), device=session.engine.device)
        totals = loader.encoded.totals()
        rows: list[npt.NDArray[np.int64]] = []
        parts: list[list[Predictions]] = [[] for _ in self.heads]
        size = session.schedule.micro_batch_size * EVALUATION_BATCH_FACTOR
        for mine in evaluation_batches(loader.lengths, size, 1, 0, session.engine.cost_of_pass):
            batch = loader.batch(mine)

            def score(parameters: dict[str, Tensor], batch: Batch = batch) -> Any:
                outputs = functional_call(session.engine.model, parameters, (), batch.inputs)
                return task.predict(outputs, batch), task.loss(outputs, batch, totals)

            with calling_model(STACKING):
                predictions, losses = vmap(score)(self.stacked)
            total += losses
            rows.append(mine)
            for number, own in enumerate(parts):
                own.append(as_arrays(tree_map(lambda values, number=number: values[number], predictions)))
        return [in_order([(rows, own, 0.0)]) for own in parts], total

    def _complete(self, head: Head) -> None:
        """All metrics at the best evaluation, where until then only the one that decides is known."""
        if head.best_row >= 0:
            targets = self.session.loaders["select"].encoded.targets()
            head.rows[head.best_row].update(self.session.prepared.task.metrics(head.best_predictions, targets))
