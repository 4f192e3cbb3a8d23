"""Ctrl-C and SIGTERM while a command trains: the step that is being taken is finished and saved, then the command ends.

Where no step is being taken, the first signal ends the command at once; the second one does everywhere.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

from orchestrator.errors import OrchestratorError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAID = "interrupted: the step that is being taken is finished and saved; press Ctrl-C again to end at once\n"


class Interrupted(OrchestratorError):
    """The run was asked to end, and has saved its last step."""

    exit_code = 130


class StopRequest(Protocol):
    """That a run ends, as a worker hears of it."""

    def is_set(self) -> bool:
        """Whether the run is to end; workers other than the first one need not know."""

    def during_steps(self) -> contextlib.AbstractContextManager[None]:
        """For as long as this lasts, whoever gives the wish waits for the worker to save."""


class InterruptHandler:
    """The wish of whoever sends this process a signal.

    Args:
        screen: where the user is told that a step is saved first; None for nowhere.
    """

    def __init__(self, screen: TextIO | None = None) -> None:
        self.screen = screen
        self._given = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        """The handlers that were there before; none while no signals are taken."""
        self._pass_on: Callable[[int], None] | None = None

    def is_set(self) -> bool:
        return self._given.is_set()

    def during_steps(self) -> contextlib.AbstractContextManager[None]:
        return self.forwarding_to(lambda number: None)

    @contextlib.contextmanager
    def forwarding_to(self, pass_on: Callable[[int], None]) -> Iterator[None]:
        """Call `pass_on` with the number of the first signal, instead of ending the command."""
        self._take_over()  # Ray's core, where it has been started since, aborts the process 3 s after a SIGTERM.
        self._pass_on = pass_on
        try:
            yield
        finally:
            self._pass_on = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take signals. Those that the process ignores stay ignored, and only a main thread can take any.

        Raises:
            KeyboardInterrupt: at a signal that ends the command at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        every = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: handler for number, handler in every.items() if handler not in (signal.SIG_IGN, None)}
        self._take_over()
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _take_over(self) -> None:
        for number in self._before:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: Any) -> None:
        is_first = not self._given.is_set()
        self._given.set()
        if not is_first or self._pass_on is None:
            raise KeyboardInterrupt
        if self.screen is not None:
            self.screen.write(SAID)
            self.screen.flush()
        self._pass_on(number)
