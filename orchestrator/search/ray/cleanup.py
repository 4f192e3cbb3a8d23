"""How a search on Ray Tune ends early, and what its dead leave behind.

A trial of several workers is a Ray Train run that its actor starts. Where such an actor is killed, the run is killed
with it, but the CPUs that it had reserved are not given back: Ray removes a placement group only when the whole job has
ended. So the command looks for placement groups whose makers are dead, and removes them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from ray.tune import Callback

from orchestrator.launch.cluster import own_groups, remove_orphans
from orchestrator.training.interruption import SIGNALS

SECONDS_BETWEEN_SWEEPS = 2.0
SECONDS_TO_DIE = 10.0  # For actors that were told to end.


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Have Ctrl-C, or SIGTERM, end the search as Ray Tune ends one, with its trials stopped; raise KeyboardInterrupt.

    Ray Tune itself would return as if all trials had been run. It takes SIGUSR1 for the same wish. A second signal does
    not wait for anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGUSR1)}
    interrupted = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        interrupted.set()
        for each in SIGNALS:
            signal.signal(each, before[each])
        os.kill(os.getpid(), signal.SIGUSR1)

    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted.is_set():
        raise KeyboardInterrupt


class PlacementGroupCleaner(Callback):  # type: ignore[misc]
    """Gives back what trials had reserved whose actors died: others may be waiting for it.

    What was reserved before the search is somebody else's.
    """

    def __init__(self) -> None:
        self._others = {group for group, _ in own_groups()}
        self._swept = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune's snapshots are not read again.

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if time.monotonic() - self._swept > SECONDS_BETWEEN_SWEEPS:
            self._sweep()

    def _sweep(self) -> bool:
        """Remove placement groups whose makers are dead; whether there are others still."""
        self._swept = time.monotonic()
        return remove_orphans(self._others)

    @contextlib.contextmanager
    def at_end(self) -> Iterator[None]:
        """Wait at the end, for a moment, for actors that have been told to end."""
        try:
            yield
        finally:
            deadline = time.monotonic() + SECONDS_TO_DIE
            while self._sweep() and time.monotonic() < deadline:
                time.sleep(0.1)
