"""Work on many items by all cores at once, where the work lets go of Python's lock: reading, hashing, decoding."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_TOGETHER = 32  # Handing over a single small item costs more than the work on it.
_PARTS_AHEAD = 4  # For each core; so that results do not pile up where they are used slowly.


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `work(item)` of each item, in their order."""

    def work_on(part: Sequence[Item]) -> list[Result]:
        return [work(item) for item in part]

    num_cores = os.cpu_count() or 1
    waiting: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(num_cores, thread_name_prefix="data") as pool:
        for start in range(0, len(items), _ITEMS_TOGETHER):
            waiting.append(pool.submit(work_on, items[start : start + _ITEMS_TOGETHER]))
            if len(waiting) > num_cores * _PARTS_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
