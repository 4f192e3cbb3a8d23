"""Trials of several workers: a Ray Train run that is started from the trial's actor, and goes from trial to trial.

The actor has a *crew*: the workers of one Ray Train run. They stay for all trials of the actor, as the actor does for
trials of one worker, so that a trial costs what it computes and not the start of its processes. Actor and crew talk
through two small files in a folder that both see: *orders* (what to train, how far, whether to stop), and what is
*told* (the last evaluation). The workers wait at each evaluation until the scheduler has seen it, so a trial can be
stopped, or left to another, after any.

Ray's own way to report from within is TuneReportCallback. It needs a Tune session, which only trainables that are
functions have, and those begin anew for every trial; what it reports passes the Train controller, which looks every two
seconds; and the workers train on while the scheduler thinks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.recipe import dump_recipe
from orchestrator.search.bench import Bench, trial_inputs
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial import (
    BEST_WEIGHTS,
    MEMORY,
    TRIAL_ERRORS,
    Outcome,
    Spec,
    history,
    read_outcome,
    write_outcome,
)
from orchestrator.search.tuning import Report
from orchestrator.tasks.base import MainMetric
from orchestrator.training.hooks import Memory, is_due
from orchestrator.training.loop import Step
from orchestrator.training.prepare import Prepared
from orchestrator.training.run_directory import RunDirectory, finite, write_atomically, write_json
from orchestrator.training.trainer import Session, evaluations, open_session, resume
from orchestrator.training.worker import output_to

ORDERS, TOLD, HANDOVER = "orders.json", "told.json", "handover"
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_OF_ONE_WAIT = 60.0  # Workers that wait for worker 0 must hear of it before their collective times out.
SECONDS_TO_STOP = 60.0  # For the workers to put down what they hold.
SHARE_OF_TIME_FOR_SAVING = 0.05
# What would come again if the workers were started again.
LASTING_ERRORS = (OrchestratorError, torch.OutOfMemoryError, MemoryError, ValueError, ArithmeticError)


@dataclass(frozen=True)
class Orders:
    """What the actor wants of its crew."""

    number: int = 0
    """Of the trial, counted from 1 for each crew."""
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    """A folder that another trial wrote, to go on from."""
    past: int = 0
    """The evaluation at this step has been seen: go on to the next."""
    save: int = 0
    """Counted up to have the crew write what another trial can go on from."""
    stop: bool = False
    keep: bool = False
    """When stopping: the weights of the best evaluation may be those of the winner."""
    leave: bool = False
    """There are no more trials."""


@dataclass(frozen=True)
class Told:
    """What worker 0 says of the crew."""

    number: int = 0
    """Of the trial that it is about."""
    resumed: int = 0
    """The step that the trial went on from when it began here."""
    step: int = 0
    """Of the last evaluation."""
    row: dict[str, Any] | None = None
    """That evaluation, as in metrics.jsonl; None before the first."""
    is_last: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    core_seconds: float = 0.0
    """Of all workers."""
    saved: int = 0
    """The last order to save that was carried out."""
    over: bool = False
    """The trial holds nothing any more."""
    failure: str | None = None


def read_orders(folder: Path) -> Orders:
    """The orders to the crew of this folder; none of them yet where there is no file."""
    path = folder / ORDERS
    return Orders(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Orders()


def read_told(folder: Path) -> Told:
    """What the crew of this folder has told; nothing yet where there is no file."""
    path = folder / TOLD
    return Told(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Told()


class Crew:
    """The workers, as the trial's actor sees them.

    Args:
        folder: of this crew alone; the workers see it too.
        run: runs `serve` on the workers, and returns when they have left.
    """

    def __init__(self, folder: Path, run: Callable[[], None]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.orders = Orders()
        self.running: Future[None] = Future()
        # A daemon: should the workers hang, the actor's process can still end, and they with it.
        Thread(target=self._run, args=(run,), name="crew", daemon=True).start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # Whatever it is: it is raised again where somebody waits for the workers.
            self.running.set_exception(error)
        else:
            self.running.set_result(None)

    def begin(self, spec: Spec, past: int, start_from: Path | None) -> int:
        """Have the workers train a trial; returns its number."""
        number = self.orders.number + 1
        self._order(Orders(number, spec.id, spec.parameters, None if start_from is None else str(start_from), past))
        return number

    def change(self, **changes: Any) -> None:
        """Change the orders for the trial that is trained."""
        self._order(replace(self.orders, **changes))

    def _order(self, orders: Orders) -> None:
        self.orders = orders
        write_json(self.folder / ORDERS, asdict(orders))

    def wait(self, is_it: Callable[[Told], bool], seconds: float | None = None) -> Told:
        """Wait until the workers tell what is waited for.

        Raises:
            RunFailed: the workers died more often than allowed, or have nothing to tell within `seconds`.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            has_ended = self.running.done()  # Asked first: what was told before the end is still read below.
            told = read_told(self.folder)
            if told.number == self.orders.number and is_it(told):
                return told
            if has_ended:
                self.running.result()
                raise RunFailed(f"the workers ended without a word; their output is in {self.folder}")
            if deadline is not None and time.monotonic() > deadline:
                raise RunFailed(f"the workers did not stop within {seconds:g} s; their output is in {self.folder}")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def dismiss(self) -> None:
        """Let the workers go; returns when Ray Train has given back what they held."""
        self.change(leave=True)
        with contextlib.suppress(OrchestratorError):  # Told already to the trial that they failed in.
            try:
                self.running.result(SECONDS_TO_STOP)
            except TimeoutError:
                # Ray Train cannot be called off from outside. What this process has started goes when it goes.
                os._exit(1)


class Foreman:
    """Keeps a crew for the trials of an actor, and hires another where one has died.

    Args:
        hire: starts a crew.
    """

    def __init__(self, hire: Callable[[], Crew]) -> None:
        self._hire = hire
        self._crew: Crew | None = None

    def crew(self) -> Crew:
        """A crew that is at work."""
        if self._crew is None or self._crew.running.done():
            self._crew = self._hire()
        return self._crew

    def dismiss(self) -> None:
        """Let the crew go, if there is one."""
        if self._crew is not None:
            self._crew.dismiss()
        self._crew = None


class NestedTrial:
    """A trial of several workers in progress, in the trial's actor.

    Args:
        bench: the workplace of this process.
        directory: the trial's run directory; what is in it already is not done again.
    """

    def __init__(self, bench: Bench, spec: Spec, directory: RunDirectory, foreman: Foreman) -> None:
        self.bench = bench
        self.spec = spec
        self.directory = directory
        self.foreman = foreman
        self.crew: Crew | None = None
        """Where it is being trained."""
        self.outcome = read_outcome(directory)
        self._told = Told()
        self._seen = 0
        self._start_from: Path | None = None
        self._started = time.monotonic()
        self._rows = self._advance()

    def advance(self) -> Report:
        """Go on to the next evaluation. A trial that was interrupted first tells those that it had."""
        try:
            row, is_last = next(self._rows, ({}, True))
            if not is_last:
                return Report(self._score(row), False, row)
            outcome = self._end()
        except TRIAL_ERRORS as error:
            row, outcome = {}, self._end("failed", str(error) or type(error).__name__)
        has_score = row and outcome.status != "failed"
        reason = outcome.reason if outcome.status == "failed" else None
        return Report(self._score(row) if has_score else None, True, row, reason)

    def stop(self) -> None:
        """Have the workers let go of everything; the weights are kept where this may be among the best."""
        if self.crew is None:
            return
        crew, self.crew = self.crew, None
        if crew.running.done():
            return
        best = self._told.memory.get("best_score")
        try:
            crew.change(stop=True, keep=best is not None and self.bench.may_win(best))
            self._told = crew.wait(lambda told: told.over, SECONDS_TO_STOP)
        except RunFailed:
            self.foreman.dismiss()
            raise

    def save(self, folder: Path) -> None:
        """Write what another trial can go on from."""
        if self.crew is not None:
            order = self.crew.orders.save + 1
            self.crew.change(save=order)
            self._told = self.crew.wait(lambda told: told.saved == order or told.over)
            if not self._told.over:
                shutil.copytree(self.directory.root / HANDOVER, folder, dirs_exist_ok=True)

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Go on from what another trial wrote, with other parameters."""
        if not (folder / MEMORY).exists():
            return
        self.stop()
        self.spec = Spec(self.spec.id, parameters)
        self.directory.create()
        # The folder is one of this process's machine; the workers may be on others.
        self._start_from = self.directory.root / HANDOVER
        shutil.rmtree(self._start_from, ignore_errors=True)
        shutil.copytree(folder, self._start_from)
        self._seen = 0
        self._rows = self._advance()

    def _advance(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Evaluations, each with whether it is the last."""
        if self.outcome is not None:
            rows = history(self.directory)
            yield from ((row, row is rows[-1]) for row in rows)
            return
        self._begin()
        first = self._wait(lambda told: True)
        # Evaluations of another trial that this one goes on from were told by that one.
        earlier = history(self.directory) if self._start_from is None else []
        for row in earlier:
            if row["step"] <= first.resumed:
                self._seen = row["step"]
                yield row, first.is_last and first.step == first.resumed == row["step"]
        while True:
            assert self.crew is not None
            self.crew.change(past=self._seen)
            told = self._wait(lambda told: told.row is not None and told.row["step"] > self._seen)
            assert told.row is not None
            self._seen = told.row["step"]
            yield told.row, told.is_last

    def _begin(self) -> None:
        self.directory.create()
        recipe = trial_inputs(self.bench.prepared, self.spec.parameters).recipe
        write_atomically(self.directory.recipe, dump_recipe(recipe))
        self.crew = self.foreman.crew()
        self.crew.begin(self.spec, self._seen, self._start_from)

    def _wait(self, is_it: Callable[[Told], bool]) -> Told:
        """What the workers tell next, where it is what is waited for.

        Raises:
            RunFailed: they failed in this trial.
        """
        assert self.crew is not None
        try:
            told = self.crew.wait(lambda told: told.over or is_it(told))
        except RunFailed:
            if self.crew.orders.number == 1:
                raise
            # Workers had died in the trials before; a new crew may fail as often as the recipe allows one trial.
            self._begin()
            told = self.crew.wait(lambda told: told.over or is_it(told))
        self._told = told
        if told.over:
            self.crew = None
            raise RunFailed(told.failure or "the workers stopped by themselves")
        return told

    def _score(self, row: dict[str, Any]) -> float | None:
        metric, value = self.bench.metric, row[self.bench.metric.name]
        return None if value is None else float(value) if metric.higher_is_better else -float(value)

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        """Write down what became of the trial, unless that has been done, and let go of what it held."""
        try:
            self.stop()
        except RunFailed as error:
            status, reason = "failed", reason or str(error)
        if self.outcome is None:
            self.outcome = Outcome(
                status=status,
                reason=reason or self._told.memory.get("stop"),
                best_step=self._told.memory.get("best_step"),
                seconds=time.monotonic() - self._started,
                core_seconds=self._told.core_seconds,
            )
            write_outcome(self.directory, self.outcome)
            # Nothing goes on from here, and what several workers wrote could not be read by one.
            for folder in (self.directory.checkpoints, self.directory.root / HANDOVER):
                shutil.rmtree(folder, ignore_errors=True)
        return self.outcome


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
            if isinstance(error, LASTING_ERRORS):
                write_atomically(note, str(error) or type(error).__name__)
            raise

    def _train(self, orders: Orders, run: RunDirectory, is_again: bool) -> None:
        began = time.process_time()
        inputs = trial_inputs(self.prepared, orders.parameters)
        with open_session(inputs, run.root, 0, self.device, None, self.metric, self.boundaries) as session:
            keeper = Keeper(session, run)
            memory = keeper.start(None if is_again or orders.start_from is None else Path(orders.start_from))
            self._tell_place(session, memory, began, resumed=memory.step)
            for row in evaluations(session, memory, [keeper]):
                self._tell_place(session, memory, began, row=row)
                if self.told.is_last:
                    break
                orders = self._wait_after(row["step"], orders, keeper, memory)
                if orders.stop:
                    break
            while not orders.stop:  # The last evaluation may be asked for, too.
                orders = self._wait_after(None, orders, keeper, memory)
            if orders.keep:
                keeper.keep_best_weights()
        self.tell(over=True)

    def _wait_after(self, step: int | None, orders: Orders, keeper: Keeper, memory: Memory) -> Orders:
        """The orders after the evaluation at this step; None for the last."""
        number = orders.number

        def is_news(new: Orders) -> bool:
            return new.stop or new.leave or new.save > self.told.saved or (step is not None and new.past >= step)

        while True:
            orders = self.wait(is_news)
            if orders.stop or orders.leave or orders.number != number:
                return replace(orders, stop=True)
            if orders.save > self.told.saved:
                keeper.hand_over(memory)
                self.tell(saved=orders.save)
            elif step is not None:
                return orders

    def _tell_place(self, session: Session, memory: Memory, began: float, **changes: Any) -> None:
        spent = torch.tensor(time.process_time() - began, dtype=torch.float64, device=session.engine.device)
        self.tell(
            step=memory.step,
            is_last=memory.stop is not None or memory.step >= session.plan.total_steps,
            memory=memory.to_state(),
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
        self._cost = 0.0
        """Seconds that the last saving took; the first is taken to cost nothing."""

    def start(self, start_from: Path | None) -> Memory:
        """Put the newest checkpoint, or what another trial wrote, into the engine."""
        session = self.session
        if start_from is None:
            memory = resume(session)
            folder = session.store.at(memory.step).folder
        else:
            memory, folder = self._take_over(start_from), start_from
        if session.engine.rank == 0 and (folder / BEST_WEIGHTS).exists():
            self.best = load_file(folder / BEST_WEIGHTS)
        if start_from is not None:
            self._checkpoint(memory)
        return memory

    def _take_over(self, folder: Path) -> Memory:
        session = self.session
        if session.engine.rank == 0:  # The trial's own checkpoints lead elsewhere.
            shutil.rmtree(self.run.checkpoints, ignore_errors=True)
            self.run.checkpoints.mkdir()
        session.engine.agree(None)
        session.engine.read_state(folder)
        return Memory(**json.loads((folder / MEMORY).read_text(encoding="utf-8")))

    def after_step(self, step: Step, memory: Memory) -> None:
        engine, plan, train = self.session.engine, self.session.plan, self.session.prepared.recipe.train
        if memory.improved:
            weights = engine.trained_weights()
            if engine.rank == 0:
                self.best = {name: value.clone() for name, value in weights.items()}
        due = any(
            is_due(every, step.number, plan.order.steps_per_epoch, plan.total_steps)
            for every in (train.save_every, train.evaluate_every)
        )
        if due and engine.from_first_worker(self._is_worth_it()):
            self._checkpoint(memory)

    def _is_worth_it(self) -> bool:
        return self._cost <= SHARE_OF_TIME_FOR_SAVING * (time.monotonic() - self._saved)

    def _checkpoint(self, memory: Memory) -> None:
        began = time.monotonic()
        self.session.store.save(memory.step, memory.to_state(), self._write)
        if self.session.engine.rank == 0:
            self.session.store.prune(1, None)
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _write(self, folder: Path) -> None:
        self.session.engine.write_state(folder)
        if self.session.engine.rank == 0:
            save_file(self.best, folder / BEST_WEIGHTS)

    def hand_over(self, memory: Memory) -> None:
        """Write what another trial can go on from."""
        folder, engine = self.run.root / HANDOVER, self.session.engine
        if engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        engine.agree(None)
        self._write(folder)
        if engine.rank == 0:
            write_json(folder / MEMORY, memory.to_state())
        engine.agree(None)

    def keep_best_weights(self) -> None:
        """Put the weights of the best evaluation where the winner's are looked for."""
        if self.best:
            temporary = self.run.root / f".{BEST_WEIGHTS}.partial"
            save_file(self.best, temporary)
            temporary.replace(self.run.root / BEST_WEIGHTS)
