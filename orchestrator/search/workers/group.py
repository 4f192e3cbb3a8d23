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
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.runs.directory import write_json

ORDERS, TOLD = "orders.json", "told.json"
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_STOP = 60.0  # For the workers to put down what they hold.


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
    state: dict[str, Any] = field(default_factory=dict)
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

    def begin(self, id: str, parameters: dict[str, Any], past: int, start_from: Path | None) -> int:
        """Have the workers train a trial; returns its number."""
        number = self.orders.number + 1
        self._order(Orders(number, id, parameters, None if start_from is None else str(start_from), past))
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
