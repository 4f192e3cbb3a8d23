"""Ends a search on Ray Tune early, and releases the resources of trials whose processes died.

A trial of several workers is a Ray Train run that the trial's actor starts. Where such an actor is killed, the run is
killed with it, but the CPUs that it had reserved stay reserved: Ray removes a placement group only when the whole job
has ended. So the command removes the placement groups whose creators are dead.
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

from orchestrator.launch.cluster import find_placement_groups, remove_orphaned_groups
from orchestrator.training.interruption import SIGNALS

CLEANUP_INTERVAL_S = 2.0
EXIT_TIMEOUT_S = 10.0  # For actors that were asked to end.


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Stop the trials on Ctrl-C or SIGTERM, as Ray Tune stops them on SIGUSR1, and raise KeyboardInterrupt.

    Ray Tune itself would return as if all trials had been run. A second signal is handled as before the search.
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
    """Removes the placement groups of trials whose actors died: other trials may be waiting for their resources.

    Placement groups that are older than the search belong to others.
    """

    def __init__(self) -> None:
        self._others = {group for group, _ in find_placement_groups()}
        self._last_cleanup = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune's snapshots are not read again.

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if time.monotonic() - self._last_cleanup > CLEANUP_INTERVAL_S:
            self._clean_up()

    def _clean_up(self) -> bool:
        """Remove placement groups whose creators are dead; return whether there are others still."""
        self._last_cleanup = time.monotonic()
        return remove_orphaned_groups(self._others)

    @contextlib.contextmanager
    def at_end(self) -> Iterator[None]:
        """Wait at the end for actors that were asked to end, and clean up after them."""
        try:
            yield
        finally:
            deadline = time.monotonic() + EXIT_TIMEOUT_S
            while self._clean_up() and time.monotonic() < deadline:
                time.sleep(0.1)
