"""One worker of a crew: it trains what it is ordered to, and waits at each evaluation."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.launch.out_of_memory import is_out_of_memory
from orchestrator.launch.ray_train import output_to
from orchestrator.runs.directory import RunDirectory, finite, write_atomically, write_json
from orchestrator.runs.logs import log_to
from orchestrator.search.outcome import BEST_WEIGHTS, MEMORY, TRIAL_ERRORS
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial_context import trial_inputs
from orchestrator.search.workers.group import SECONDS_BETWEEN_LOOKS, TOLD, Orders, Told, read_orders, read_told
from orchestrator.search.workers.trial import HANDOVER
from orchestrator.tasks.base import MainMetric
from orchestrator.training.hooks import TrainingState, is_due
from orchestrator.training.loop import Step
from orchestrator.training.prepare import Prepared
from orchestrator.training.session import Session, open_session
from orchestrator.training.worker import evaluations, resume

SECONDS_OF_ONE_WAIT = 60.0  # Workers that wait for worker 0 must hear of it before their collective times out.
SHARE_OF_TIME_FOR_SAVING = 0.05
# What would come again if the workers were started again.
LASTING_ERRORS = (OrchestratorError, ValueError, ArithmeticError)


def serve(
    folder: Path,
    root: Path,
    boundaries: Sequence[int],
    metric: MainMetric,
    num_threads: int,
    prepared: Prepared,
    device: torch.device,
) -> None:
    """What each worker of a crew does: one trial after another, until it may leave.

    Args:
        folder: of the crew.
        root: of the search.
        boundaries: freeze boundaries of the search's trials.
    """
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    member = Member(folder, SearchDirectory(root), boundaries, metric, prepared, device)
    done = member.begun if member.told.over else max(0, member.begun - 1)
    while (orders := member.next_trial(done)) is not None:
        run = member.directory.trial(orders.id)
        with output_to(run.logs / f"worker-{member.rank}.log"):
            member.work(orders, run)
        done = orders.number


class Member:
    """One worker of a crew."""

    def __init__(
        self,
        folder: Path,
        directory: SearchDirectory,
        boundaries: Sequence[int],
        metric: MainMetric,
        prepared: Prepared,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.directory = directory
        self.boundaries = boundaries
        self.metric = metric
        self.prepared = prepared
        self.device = device
        self.rank = dist.get_rank()
        self.told: Told = self.from_first(lambda: read_told(folder))
        """What has been told last; by the worker before this one, where that died."""
        self.begun = self.told.number
        """The trial that this worker's forerunner had begun."""

    def from_first(self, look: Callable[[], Any]) -> Any:
        """What worker 0 sees, on every worker."""
        box = [look() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self, is_it: Callable[[Orders], bool]) -> Orders:
        """The orders, once they are what is waited for."""

        def look() -> Orders | None:
            deadline = time.monotonic() + SECONDS_OF_ONE_WAIT
            while time.monotonic() < deadline:
                if is_it(orders := read_orders(self.folder)):
                    return orders
                time.sleep(SECONDS_BETWEEN_LOOKS)
            return None

        while True:
            orders: Orders | None = self.from_first(look)
            if orders is not None:
                return orders

    def next_trial(self, done: int) -> Orders | None:
        """Orders for a trial after number `done`; None when the workers may leave."""
        orders = self.wait(lambda new: new.leave or new.number > done)
        return None if orders.leave else orders

    def tell(self, **changes: Any) -> None:
        self.told = replace(self.told, **changes)
        if self.rank == 0:
            write_json(self.folder / TOLD, finite(asdict(self.told)))

    def work(self, orders: Orders, run: RunDirectory) -> None:
        """Train a trial until it is stopped."""
        is_again = self.begun == orders.number
        note = self.folder / f"failure-{orders.number}"
        failure = self.from_first(lambda: note.read_text(encoding="utf-8") if note.exists() else None)
        if not is_again:
            self.told = Told(orders.number)
        if failure is not None or orders.stop:
            self.tell(over=True, failure=failure)
            return
        try:
            self._train(orders, run, is_again)
        except RunFailed as error:
            # Which all workers find out at the same step.
            self.tell(over=True, failure=str(error))
        except TRIAL_ERRORS as error:
            # The others may be waiting for this one. Ray Train sees it die and starts all again.
            if isinstance(error, LASTING_ERRORS) or is_out_of_memory(error):
                write_atomically(note, str(error) or type(error).__name__)
            raise

    def _train(self, orders: Orders, run: RunDirectory, is_again: bool) -> None:
        began = time.process_time()
        inputs = trial_inputs(self.prepared, orders.parameters)
        opened = open_session(inputs, run, 0, self.device, None, self.metric, self.boundaries)
        with log_to(run.logs), opened as session:
            keeper = Keeper(session, run)
            # Workers that died may have left no checkpoint of their own yet.
            has_own = is_again and self.from_first(lambda: bool(run.committed()))
            state = keeper.start(None if has_own or orders.start_from is None else Path(orders.start_from))
            self._tell_place(session, state, began, resumed=state.step)
            for row in evaluations(session, state, [keeper]):
                self._tell_place(session, state, began, row=row)
                if self.told.is_last:
                    break
                orders = self._wait_after(row["step"], orders, keeper, state)
                if orders.stop:
                    break
            while not orders.stop:  # The last evaluation may be asked for, too.
                orders = self._wait_after(None, orders, keeper, state)
            if orders.keep:
                keeper.keep_best_weights()
            if not self.told.is_last:
                keeper.save(state)  # It may be taken up again.
        self.tell(over=True)

    def _wait_after(self, step: int | None, orders: Orders, keeper: Keeper, state: TrainingState) -> Orders:
        """The orders after the evaluation at this step; None for the last."""
        number = orders.number

        def is_news(new: Orders) -> bool:
            return new.stop or new.leave or new.save > self.told.saved or (step is not None and new.past >= step)

        while True:
            orders = self.wait(is_news)
            if orders.stop or orders.leave or orders.number != number:
                return replace(orders, stop=True)
            if orders.save > self.told.saved:
                keeper.hand_over(state)
                self.tell(saved=orders.save)
            elif step is not None:
                return orders

    def _tell_place(self, session: Session, state: TrainingState, began: float, **changes: Any) -> None:
        spent = torch.tensor(time.process_time() - began, dtype=torch.float64, device=session.engine.device)
        self.tell(
            step=state.step,
            is_last=session.ends_run(state),
            state=state.to_dict(),
            core_seconds=float(session.engine.sum_over_workers(spent)),
            **changes,
        )


class Keeper:
    """The last hook of the loop: keeps the best weights in worker 0's memory, and saves what a trial goes on from."""

    def __init__(self, session: Session, run: RunDirectory) -> None:
        self.session = session
        self.run = run
        self.best: dict[str, torch.Tensor] = {}
        self._saved = time.monotonic()
        self._saved_step = -1
        self._cost = 0.0
        """Seconds that the last saving took; the first is taken to cost nothing."""

    def start(self, start_from: Path | None) -> TrainingState:
        """Put the newest checkpoint, or what another trial wrote, into the engine."""
        session = self.session
        if start_from is None:
            state = resume(session)
            folder = session.store.at(state.step).folder
        else:
            state, folder = TrainingState(**json.loads((start_from / MEMORY).read_text(encoding="utf-8"))), start_from
            session.read_state(start_from, state)
        if session.engine.rank == 0 and (folder / BEST_WEIGHTS).exists():
            self.best = load_file(folder / BEST_WEIGHTS)
        if start_from is not None:
            self.save(state)
        self._saved_step = state.step
        return state

    def after_step(self, step: Step, state: TrainingState) -> None:
        engine, plan, train = self.session.engine, self.session.schedule, self.session.prepared.recipe.train
        if state.improved:
            weights = self.session.trained_weights()
            if engine.rank == 0:
                self.best = {name: value.clone() for name, value in weights.items()}
        due = any(
            is_due(every, step.number, plan.order.steps_per_epoch, plan.end)
            for every in (train.save_every, train.evaluate_every)
        )
        if due and engine.from_first_worker(self._is_worth_it()):
            self.save(state)

    def _is_worth_it(self) -> bool:
        return self._cost <= SHARE_OF_TIME_FOR_SAVING * (time.monotonic() - self._saved)

    def save(self, state: TrainingState) -> None:
        """Write what the trial goes on from, unless that has been done at this step."""
        if state.step == self._saved_step:
            return
        began = time.monotonic()
        self.session.store.save(state.step, state.to_dict(), self._write)
        self.session.engine.first_worker_does(lambda: self.session.store.prune(1, None))
        self._saved, self._saved_step = time.monotonic(), state.step
        self._cost = self._saved - began

    def _write(self, folder: Path) -> None:
        self.session.write_state(folder)
        if self.session.engine.rank == 0:
            save_file(self.best, folder / BEST_WEIGHTS)

    def hand_over(self, state: TrainingState) -> None:
        """Write what another trial can go on from."""
        folder, engine = self.run.root / HANDOVER, self.session.engine

        def make_room() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

        engine.first_worker_does(make_room)
        self._write(folder)
        engine.first_worker_does(lambda: write_json(folder / MEMORY, state.to_dict()))

    def keep_best_weights(self) -> None:
        """Put the weights of the best evaluation where the winner's are looked for."""
        if self.best:
            temporary = self.run.root / f".{BEST_WEIGHTS}.partial"
            save_file(self.best, temporary)
            temporary.replace(self.run.root / BEST_WEIGHTS)
