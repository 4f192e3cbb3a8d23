"""When workers die: what the user is told, in the words of the run and not in those of Ray's logs; what follows."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.runs.progress import ProgressFile
from orchestrator.runs.remote import open_run


class RestartWorkers(Exception):
    """Raised by a worker that has to begin again, with all others, for a reason that does not count as a failure."""


class AbortTraining(Exception):
    """Raised by a worker for which beginning again would be of no use; the others may be waiting for it."""

    def __init__(self, error: OrchestratorError) -> None:
        super().__init__(error)
        self.error = error


def error_of(failure: Any) -> OrchestratorError | None:
    """Return what a worker has given up for, from what Ray Train raises; None where none has."""
    found = getattr(failure, "worker_failures", {}).values()
    return next((each.error for each in found if isinstance(each, AbortTraining)), None)


def failure_policy(config: Any) -> Any:
    """Return Ray Train's own policy for failed workers, but for those that say themselves what is to follow.

    Args:
        config: Ray Train's `FailureConfig`.
    """
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    class Policy(DefaultFailurePolicy):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            # Where one worker stops, others die of it.
            failures = getattr(training_failed_error, "worker_failures", {}).values()
            if any(isinstance(each, AbortTraining) for each in failures):
                return FailureDecision.RAISE
            if any(isinstance(each, RestartWorkers) for each in failures):
                return FailureDecision.RETRY
            return super().make_decision(training_failed_error)

    return Policy(config)


def failure_callback(place: str, keys: Any) -> Any:
    """A callback of Ray Train for the run directory at a path or a URL.

    Args:
        keys: a reference to the variables that reach an object store; None where the directory is in none.
    """
    import ray
    from ray.train import UserCallback

    class Teller(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(isinstance(each, (RestartWorkers, AbortTraining)) for each in worker_exceptions.values()):
                return  # The worker has told it.
            if keys is not None:
                os.environ.update(ray.get(keys))
            told = what_died(worker_exceptions)
            with contextlib.suppress(OSError):  # The run does not depend on it.
                # Ray's controller of the workers runs on the machine of the command, whose copy this is.
                directory = open_run(place)
                directory.add_note(told)
                again = "all start again from the last checkpoint, once the cluster has room for them"
                ProgressFile(directory.root, directory.upload_progress).show(force=True, phase=f"{told}; {again}")

    return Teller()


def what_died(errors: dict[int, Exception]) -> str:
    """Which workers died, and what the first of them said last."""
    ranks = ", ".join(map(str, sorted(errors)))
    return f"worker{'s' if len(errors) > 1 else ''} {ranks} died ({reason(errors[min(errors)])})"


def reason(error: BaseException) -> str:
    """Why something died; in Ray's words, what follows the first sentence is what may have been, in general."""
    return last_line(error).partition(". ")[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's text: where Ray puts the worker's own words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
