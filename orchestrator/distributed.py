"""The exchange of Python objects between the workers of a run: values, and errors that only one of them has met.

Objects use a gloo group of their own, not the group that sums gradients. In that group a worker that waits for another
fails after some minutes, because a collective of a step that takes longer is stuck. Here the first worker may hash or
export a large model while the others wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from orchestrator.errors import OrchestratorError, RunFailed

START_TIMEOUT, TIMEOUT = timedelta(minutes=10), timedelta(days=1)
T = TypeVar("T")


class Exchange:
    """The workers of the default process group; only this process if there is none.

    All workers call every method, in the same order. Each call first shares whether a worker has failed since the last
    one: an error that a worker left the block with, or met while the others waited for it, is raised on all workers. So
    no worker waits for one that has failed.

    Only errors for users are shared when the block is left. After other errors a worker dies, and Ray ends the others,
    which may be waiting for it elsewhere.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._group: Any = None
        if self.size > 1:
            # All workers come here at the same time: one that does not has failed.
            self._group = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
            distributed_c10d._set_pg_timeout(TIMEOUT, self._group)
        self._has_failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._group is None:
            return
        found = None
        if not self._has_failed and (error is None or isinstance(error, OrchestratorError)):
            found = self._gather_errors(error)
        dist.destroy_process_group(self._group)
        if error is None and found is not None:
            raise found

    def agree(self, trouble: str | None) -> str | None:
        """Return the first trouble that any worker has, on all of them; None if no worker has any."""
        return next((found for found in self._all(trouble) if found is not None), None)

    def broadcast(self, value: Any) -> Any:
        """Return worker 0's value, on every worker."""
        if self._group is None:
            return value
        self._check()
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, in the order of ranks, on worker 0; an empty list elsewhere."""
        if self._group is None:
            return [value]
        self._check()
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def run_on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on worker 0 while the others wait, and return its result on every worker.

        Args:
            action: a function that does not need the other workers.

        Raises:
            RunFailed: on the other workers, if `action` raised an error; also on worker 0 if that is an OSError, which
                starting the workers again would not solve.
        """
        if self._group is None:
            return action()
        value: Any = None
        with contextlib.ExitStack() as stack:
            stack.push(self._share_outcome)
            if self.rank == 0:
                value = action()
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        result: T = box[0]
        return result

    def _all(self, value: Any) -> list[Any]:
        """Return every worker's value, in the order of ranks, on every worker."""
        if self._group is None:
            return [value]
        self._check()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _check(self) -> None:
        """Raise the error of a worker, if there is one."""
        found = self._gather_errors(None)
        if found is not None:
            raise found

    def _share_outcome(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Share with all workers how a block ended."""
        found = self._gather_errors(error)
        if found is not None and (error is None or isinstance(error, OSError)):
            raise found from error

    def _gather_errors(self, error: BaseException | None) -> OrchestratorError | None:
        """Wait for all workers, and return the first error that any of them has."""
        mine = None
        if error is not None:
            mine = error if isinstance(error, OrchestratorError) else RunFailed(self._describe(error))
        errors: list[OrchestratorError | None] = [None] * self.size
        dist.all_gather_object(errors, mine, group=self._group)
        found = next((each for each in errors if each is not None), None)
        self._has_failed = found is not None
        return found

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, OSError):
            return f"{error}; the checkpoints are whole"
        return f"worker {self.rank} failed: {type(error).__name__}: {error}"
