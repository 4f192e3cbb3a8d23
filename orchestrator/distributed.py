"""The exchange of Python objects between the workers of a run: values, and the errors that one of them alone has met.

Objects go over a gloo group of their own, not over the group that sums up gradients. There a worker that waits for
another fails after some minutes, because collectives of a step that take so long hang; here the first worker may hash
or export a large model meanwhile.
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

WAIT_AT_BEGIN, LONGEST_WAIT = timedelta(minutes=10), timedelta(days=1)
T = TypeVar("T")


class Exchange:
    """The workers of the default process group; this process alone where there is none.

    Every method is called by all workers, in the same order. Each first tells how the workers fared since the last: an
    error that one of them left the block with, or met where it worked for all, is raised on all. So nobody waits for a
    worker that has given up.

    Only errors meant for users are told when the block is left. After others a worker dies, and Ray ends the rest,
    which may be waiting for it elsewhere.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._group: Any = None
        if self.size > 1:
            # Here nobody is busy: a worker that does not come has failed.
            self._group = dist.new_group(backend="gloo", timeout=WAIT_AT_BEGIN)
            distributed_c10d._set_pg_timeout(LONGEST_WAIT, self._group)
        self._has_failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._group is None:
            return
        found = None
        if not self._has_failed and (error is None or isinstance(error, OrchestratorError)):
            found = self._meet(error)
        dist.destroy_process_group(self._group)
        if error is None and found is not None:
            raise found

    def agree(self, trouble: str | None) -> str | None:
        """Return the first trouble that any worker has, on all of them; None where there is none."""
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
        """Return what `action` returns on worker 0, on every worker; the others wait for it.

        Args:
            action: works for all workers, and needs none of the others.

        Raises:
            RunFailed: on the other workers, where `action` raised an error; on worker 0 too where that is an OSError,
                which would come again if the workers were started again.
        """
        if self._group is None:
            return action()
        value: Any = None
        with contextlib.ExitStack() as stack:
            stack.push(self._tell)
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
        """Raise the error that a worker has come with, if there is one."""
        found = self._meet(None)
        if found is not None:
            raise found

    def _tell(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Share with all workers how a block ended."""
        found = self._meet(error)
        if found is not None and (error is None or isinstance(error, OSError)):
            raise found from error

    def _meet(self, error: BaseException | None) -> OrchestratorError | None:
        """Wait for all workers; returns the first error that any of them has come with."""
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
