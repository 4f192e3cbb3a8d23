"""Ctrl-C and SIGTERM during a training: the current step is finished and saved, then the command ends.

Outside of training steps the first signal ends the command at once; everywhere else the second one does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

from orchestrator.errors import OrchestratorError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MESSAGE = "interrupted: finishing and saving the current step; press Ctrl-C again to end at once\n"


class Interrupted(OrchestratorError):
    """The run was interrupted, and its last step is saved."""

    exit_code = 130


class StopRequest(Protocol):
    """A request that the run stops, as a worker sees it."""

    def is_set(self) -> bool:
        """Whether the run is to stop; workers other than the first one need not know."""

    def during_steps(self) -> contextlib.AbstractContextManager[None]:
        """Enter this while steps are taken: whoever requests a stop then waits for the worker to save."""


class InterruptHandler:
    """Turns signals to this process into a `StopRequest`.

    Args:
        screen: where users are told that the step is saved first; None for nowhere.
    """

    def __init__(self, screen: TextIO | None = None) -> None:
        self.screen = screen
        self._is_set = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}
        """The handlers that this one replaces; empty while it is not installed."""
        self._forward: Callable[[int], None] | None = None

    def is_set(self) -> bool:
        return self._is_set.is_set()

    def during_steps(self) -> contextlib.AbstractContextManager[None]:
        return self.forwarding_to(lambda number: None)

    @contextlib.contextmanager
    def forwarding_to(self, forward: Callable[[int], None]) -> Iterator[None]:
        """Call `forward` with the number of the first signal, instead of ending the command."""
        self._install()  # Again, because Ray's core, once it has started, aborts the process 3 s after a SIGTERM.
        self._forward = forward
        try:
            yield
        finally:
            self._forward = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals. Those that the process ignores stay ignored, and only the main thread can handle any.

        Raises:
            KeyboardInterrupt: at a signal that ends the command at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        every = {number: signal.getsignal(number) for number in SIGNALS}
        self._previous = {number: handler for number, handler in every.items() if handler not in (signal.SIG_IGN, None)}
        self._install()
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}

    def _install(self) -> None:
        for number in self._previous:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        is_first = not self._is_set.is_set()
        self._is_set.set()
        if not is_first or self._forward is None:
            raise KeyboardInterrupt
        if self.screen is not None:
            self.screen.write(MESSAGE)
            self.screen.flush()
        self._forward(number)
