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

import ray
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2
from ray.tune import Callback
from ray.util.placement_group import PlacementGroup, remove_placement_group

SECONDS_BETWEEN_SWEEPS = 2.0
SECONDS_TO_DIE = 10.0  # For actors that were told to end.


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C end the search as Ray Tune ends one, with its trials stopped; then raise KeyboardInterrupt.

    Ray Tune itself would return as if all trials had been run. It takes SIGUSR1 for the same wish. A second Ctrl-C does
    not wait for anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    interrupted = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted.is_set():
        raise KeyboardInterrupt


class Sweeper(Callback):  # type: ignore[misc]
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
        found = [(group, is_orphan) for group, is_orphan in own_groups() if group not in self._others]
        for group, is_orphan in found:
            if is_orphan:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))
        self._swept = time.monotonic()
        return not all(is_orphan for _, is_orphan in found)

    @contextlib.contextmanager
    def at_end(self) -> Iterator[None]:
        """Wait at the end, for a moment, for actors that have been told to end."""
        try:
            yield
        finally:
            deadline = time.monotonic() + SECONDS_TO_DIE
            while self._sweep() and time.monotonic() < deadline:
                time.sleep(0.1)


def own_groups() -> list[tuple[bytes, bool]]:
    """The placement groups that actors of this job have made, and whether their maker is dead.

    `ray.util.placement_group_table` does not tell who made a group, so Ray's own table is read.
    """
    job = ray.get_runtime_context().get_job_id()
    found = []
    for entry in ray_state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        is_there = group.state != gcs_pb2.PlacementGroupTableData.REMOVED
        if is_there and group.creator_job_id.hex() == job and is_actor(group.creator_actor_id):
            found.append((group.placement_group_id, group.creator_actor_dead))
    return found


def is_actor(id: bytes) -> bool:
    """Whether this is an actor's id; that of a process that is none has nothing but its job at the end."""
    return bool(id) and not ray.ActorID(id).is_nil()
