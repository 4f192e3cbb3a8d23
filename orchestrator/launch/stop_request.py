"""That a training of several workers is to end: told to the first of them through Ray's key-value store.

Ray Train has no way to ask its workers for anything. Its controller can only be told to kill them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_FOR_AN_ANSWER = 5.0
NAMESPACE = b"orchestrator"
ASKED, SAVES, CANNOT = b"asked", b"saves", b"cannot"


class StopRequestSender:
    """The command's side."""

    def __init__(self) -> None:
        self.key = f"interruption-{uuid.uuid4().hex}"
        self._is_waiting = False
        self._asking: threading.Thread | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts, the command waits for its workers."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False
            if self._asking is not None:
                self._asking.join()  # What it reads from may be closed next.

    def ask(self, number: int) -> None:
        """Ask the workers to save and end; where they cannot, this process gets the signal of that number once more."""
        self._asking = threading.Thread(target=self._ask, args=(number,), name="interruption", daemon=True)
        self._asking.start()

    def _ask(self, number: int) -> None:
        write(self.key, ASKED)
        until = time.monotonic() + SECONDS_FOR_AN_ANSWER
        answer: bytes | None = ASKED
        while answer == ASKED and self._is_waiting and time.monotonic() < until:
            time.sleep(0.1)
            answer = read(self.key)
        if answer != SAVES and self._is_waiting:
            os.kill(os.getpid(), number)


class StopRequestReceiver:
    """A worker's side.

    Args:
        key: the asker's.
        listens: of the first worker, which tells the others.
    """

    def __init__(self, key: str, listens: bool) -> None:
        self.key = key
        self._given = threading.Event()
        self._takes_steps = False
        if listens:
            threading.Thread(target=self._listen, name="interruption", daemon=True).start()

    def is_set(self) -> bool:
        return self._given.is_set()

    @contextlib.contextmanager
    def during_steps(self) -> Iterator[None]:
        self._takes_steps = True
        try:
            yield
        finally:
            self._takes_steps = False

    def _listen(self) -> None:
        from ray.exceptions import RayError

        while not self._given.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(RayError):  # The store may be out of reach for a while, as its machine may.
                if read(self.key) is not None:
                    write(self.key, SAVES if self._takes_steps else CANNOT)
                    self._given.set()


def read(key: str) -> bytes | None:
    from ray.experimental import internal_kv

    found: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    return found


def write(key: str, value: bytes) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, namespace=NAMESPACE)
