"""The hooks around the steps: records, evaluation, the best checkpoint, early stopping, saving, the progress line.

A hook is called after each step, in a fixed order, on every worker. Where only worker 0 does something (writing), the
others wait for it, and learn how it ended. Hooks are built again for each phase.
What has to outlive a kill or a phase is in `TrainingState`, which every checkpoint holds.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from orchestrator.distributed import Exchange
from orchestrator.recipe import Train
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.progress import ProgressFile
from orchestrator.tasks import Task
from orchestrator.tasks.base import MainMetric
from orchestrator.training.engine.base import Engine
from orchestrator.training.evaluation import score
from orchestrator.training.loop import Schedule, Step
from orchestrator.training.memory_use import peak_bytes
from orchestrator.training.split_loader import SplitLoader

if TYPE_CHECKING:  # Sessions know the state.
    from orchestrator.training.session import Session

PHASE = "tune"
"""The name of a run's phase where it has one."""


@dataclass
class TrainingState:
    """The state of the hooks, kept from step to step and from phase to phase."""

    step: int = 0
    seconds: float = 0.0
    """Training time up to the last step, over all attempts."""
    loss_sum: float = 0.0
    loss_steps: int = 0
    """Losses since the last train row."""
    term_sums: dict[str, float] = field(default_factory=dict)
    """The same of what methods added to the loss, by their names."""
    num_rows: int = 0
    """Rows of metrics.jsonl up to the last step."""
    best_step: int | None = None
    best_score: float | None = None
    best_loss: float | None = None
    """Loss on *select* at the best step, which decides between equal scores."""
    last_score: float | None = None
    evaluations_without_improvement: int = 0
    improved: bool = False
    """The last step's evaluation is the best so far, so its weights must be kept."""
    stop: str | None = None
    """Why the phase ends before its last step."""
    phase: int = 0
    """Index of the phase."""
    phase_start: int = 0
    """Steps that earlier phases took."""
    peak_bytes: int = 0
    """The most that a step has held on this worker: of the GPU's memory, or resident; without what happens between
    steps. 0 where the system does not say."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Hook(Protocol):
    """Called on every worker after each step."""

    def after_step(self, step: Step, state: TrainingState) -> None: ...


def is_due(every: str | int, number: int, steps_per_epoch: int, last: int) -> bool:
    """Whether something that happens every epoch (or every n steps) happens after this step.

    Args:
        last: the number of the phase's last step, after which it always happens.
    """
    return number % (steps_per_epoch if every == "epoch" else int(every)) == 0 or number == last


class Clock:
    """Keeps the training time and its peak of memory, and shows worker 0's progress."""

    def __init__(
        self,
        schedule: Schedule,
        phase: str,
        metric: str,
        progress: ProgressFile | None,
        start_seconds: float,
        device: torch.device,
    ) -> None:
        self.schedule = schedule
        self.phase = phase
        self.device = device
        self.metric = metric
        self.progress = progress
        self.started = time.monotonic() - start_seconds
        self.first_step: int | None = None
        self.mark = time.monotonic()
        self.num_examples = 0

    def after_step(self, step: Step, state: TrainingState) -> None:
        state.step = step.number
        state.seconds = time.monotonic() - self.started
        state.peak_bytes = max(state.peak_bytes, peak_bytes(self.device) or 0)
        if self.first_step is None:  # The first step warms up; the throughput is that of the steps after it.
            self.first_step, self.mark = step.number, time.monotonic()
            return
        self.num_examples += step.num_examples
        if self.progress is not None:
            elapsed = time.monotonic() - self.mark
            steps_left = self.schedule.total_steps - step.number
            self.progress.show(
                phase=self.phase,
                step=step.number,
                steps=self.schedule.total_steps,
                loss=step.loss,
                metric=self.metric,
                score=state.last_score,
                examples_per_second=self.num_examples / elapsed,
                seconds_left=elapsed / (step.number - self.first_step) * steps_left,
            )


class Recorder:
    """Writes a train row every `log_every` steps: the mean loss since the last one, and the mean of each other term."""

    def __init__(self, exchange: Exchange, directory: RunDirectory, log_every: int, phase: str = PHASE) -> None:
        self.exchange = exchange
        self.directory = directory
        self.log_every = log_every
        self.phase = phase

    def after_step(self, step: Step, state: TrainingState) -> None:
        state.loss_sum += step.loss
        state.loss_steps += 1
        for name, value in step.terms.items():
            state.term_sums[name] = state.term_sums.get(name, 0.0) + value
        if step.number % self.log_every:
            return
        state.num_rows += 1
        row = {
            "step": step.number,
            "epoch": step.epoch,
            "phase": self.phase,
            "split": "train",
            "loss": state.loss_sum / state.loss_steps,
            **{name: value / state.loss_steps for name, value in state.term_sums.items()},
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.learning_rate,
            "seconds": state.seconds,
        }
        self.exchange.run_on_first(lambda: self.directory.append_metrics(row))
        state.loss_sum, state.loss_steps, state.term_sums = 0.0, 0, {}


class Evaluator:
    """Scores *select* when it is due, remembers the best step, ends the phase when there is no improvement for long."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        select: SplitLoader,
        metric: MainMetric,
        train: Train,
        schedule: Schedule,
        directory: RunDirectory,
        phase: str,
    ) -> None:
        self.engine = engine
        self.task = task
        self.select = select
        self.metric = metric
        self.train = train
        self.schedule = schedule
        self.directory = directory
        self.phase = phase
        self.last: dict[str, Any] | None = None
        """The row of this step's evaluation; None where there was none."""

    def after_step(self, step: Step, state: TrainingState) -> None:
        state.improved = False
        self.last = None
        schedule = self.schedule
        if not is_due(self.train.evaluate_every, step.number, schedule.order.steps_per_epoch, schedule.end):
            return
        size = (schedule.micro_batch_size, schedule.tokens_per_pass)
        self.record(step, state, score(self.engine, self.task, self.select, *size).metrics)

    def record(self, step: Step, state: TrainingState, metrics: dict[str, float]) -> None:
        """Write the row of an evaluation, and judge it."""
        place = {"step": step.number, "epoch": step.epoch, "phase": self.phase, "split": "select"}
        state.num_rows += 1
        row = self.last = {**place, **metrics, "seconds": state.seconds}
        self.engine.run_on_first_worker(lambda: self.directory.append_metrics(row))
        judge(metrics[self.metric.name], metrics["loss"], step.number, state, self.metric, self.train)


def judge(new: float, loss: float, step: int, state: TrainingState, metric: MainMetric, train: Train) -> None:
    """Remember an evaluation, whether it is the best so far, and whether the phase should end."""
    state.last_score = new
    higher = metric.improves(new, state.best_score)
    # A small *select* gives many equal scores; the surer model of two is the better one.
    surer = new == state.best_score and state.best_loss is not None and loss < state.best_loss
    state.improved = higher or surer
    if state.improved:
        state.best_step, state.best_score, state.best_loss = step, new, loss
    if higher:
        state.evaluations_without_improvement = 0
        return
    state.evaluations_without_improvement += 1
    stopping = train.early_stopping
    if stopping and state.evaluations_without_improvement >= stopping.patience:
        state.stop = f"{metric.name} on select did not improve for {stopping.patience} evaluations"


class Saver:
    """Saves a checkpoint when it is due, when the weights are the best so far, and when a phase ends."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.train = session.prepared.recipe.train
        self._saved: int | None = None

    def after_step(self, step: Step, state: TrainingState) -> None:
        schedule = self.session.schedule
        due = is_due(self.train.save_every, step.number, schedule.order.steps_per_epoch, schedule.end)
        if due or state.improved or state.stop:
            self.save(step, state)

    def save(self, step: Step, state: TrainingState) -> None:
        """Save this step, unless it is saved."""
        if self._saved == step.number:
            return
        self._saved = step.number
        store = self.session.store
        store.save(step.number, state.to_dict(), self.session.write_state)
        self.session.exchange.run_on_first(lambda: store.prune(self.train.keep, state.best_step))
