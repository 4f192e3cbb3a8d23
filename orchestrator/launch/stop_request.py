"""Requests that a training of several workers stops, sent to the first worker through Ray's key-value store.

Ray Train cannot send its workers messages. Its controller can only be told to kill them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator

SECONDS_BETWEEN_CHECKS = 0.5
SECONDS_FOR_REPLY = 5.0
NAMESPACE = b"orchestrator"
REQUESTED, SAVING, NOTHING_TO_SAVE = b"requested", b"saving", b"nothing to save"


class StopRequestSender:
    """Sends a stop request; used by the command."""

    def __init__(self) -> None:
        self.key = f"interruption-{uuid.uuid4().hex}"
        """Key of the request in Ray's key-value store."""
        self._is_waiting = False
        self._sending: threading.Thread | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Enter this while the command waits for its workers."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False
            if self._sending is not None:
                self._sending.join()  # The store that it reads may be closed next.

    def send(self, number: int) -> None:
        """Request that the workers save and stop; if they cannot, send this process the signal `number` again."""
        self._sending = threading.Thread(target=self._send, args=(number,), name="interruption", daemon=True)
        self._sending.start()

    def _send(self, number: int) -> None:
        write(self.key, REQUESTED)
        until = time.monotonic() + SECONDS_FOR_REPLY
        reply: bytes | None = REQUESTED
        while reply == REQUESTED and self._is_waiting and time.monotonic() < until:
            time.sleep(0.1)
            reply = read(self.key)
        if reply != SAVING and self._is_waiting:
            os.kill(os.getpid(), number)


class StopRequestReceiver:
    """A `StopRequest` on a worker.

    Args:
        key: the sender's.
        listens: whether this worker reads the store; the first worker does, and tells the others.
    """

    def __init__(self, key: str, listens: bool) -> None:
        self.key = key
        self._is_set = threading.Event()
        self._takes_steps = False
        if listens:
            threading.Thread(target=self._listen, name="interruption", daemon=True).start()

    def is_set(self) -> bool:
        return self._is_set.is_set()

    @contextlib.contextmanager
    def during_steps(self) -> Iterator[None]:
        self._takes_steps = True
        try:
            yield
        finally:
            self._takes_steps = False

    def _listen(self) -> None:
        from ray.exceptions import RayError

        while not self._is_set.wait(SECONDS_BETWEEN_CHECKS):
            with contextlib.suppress(RayError):  # The machine of the store may be out of reach for a while.
                if read(self.key) is not None:
                    write(self.key, SAVING if self._takes_steps else NOTHING_TO_SAVE)
                    self._is_set.set()


def read(key: str) -> bytes | None:
    from ray.experimental import internal_kv

    found: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    return found


def write(key: str, value: bytes) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, namespace=NAMESPACE)
