"""Dead workers: messages for users in plain words, and whether the others start again."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.runs.progress import ProgressFile
from orchestrator.runs.remote import open_run


class RestartWorkers(Exception):
    """Raised by a worker if all workers have to start again, for a reason that is not a failure."""


class AbortTraining(Exception):
    """Raised by a worker to end the training, because starting again would not help."""

    def __init__(self, error: OrchestratorError) -> None:
        super().__init__(error)
        self.error = error


def error_of(failure: Any) -> OrchestratorError | None:
    """Return the error of a worker that raised `AbortTraining`, from what Ray Train raises; None if none did."""
    found = getattr(failure, "worker_failures", {}).values()
    return next((each.error for each in found if isinstance(each, AbortTraining)), None)


def failure_policy(config: Any) -> Any:
    """Return Ray Train's default policy for failed workers, except for those that raise one of the errors above.

    Args:
        config: Ray Train's `FailureConfig`.
    """
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    class Policy(DefaultFailurePolicy):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            # If one worker stops, others fail because of it.
            failures = getattr(training_failed_error, "worker_failures", {}).values()
            if any(isinstance(each, AbortTraining) for each in failures):
                return FailureDecision.RAISE
            if any(isinstance(each, RestartWorkers) for each in failures):
                return FailureDecision.RETRY
            return super().make_decision(training_failed_error)

    return Policy(config)


def failure_callback(place: str, keys: Any) -> Any:
    """Return a callback of Ray Train that adds a note to the run directory when workers die.

    Args:
        place: path or URL of the run directory.
        keys: a reference to the environment variables that give access to an object store; None for a path.
    """
    import ray
    from ray.train import UserCallback

    class FailureCallback(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(isinstance(each, (RestartWorkers, AbortTraining)) for each in worker_exceptions.values()):
                return  # The worker itself has added a note.
            if keys is not None:
                os.environ.update(ray.get(keys))
            text = describe_dead_workers(worker_exceptions)
            with contextlib.suppress(OSError):  # A run does not fail for a note.
                # Ray's controller runs on the machine of the command, and this is the command's copy.
                directory = open_run(place)
                directory.add_note(text)
                next_step = "all start again from the last checkpoint, once the cluster has room for them"
                ProgressFile(directory.root, directory.upload_progress).show(force=True, phase=f"{text}; {next_step}")

    return FailureCallback()


def describe_dead_workers(errors: dict[int, Exception]) -> str:
    """Return which workers died, and the reason of the first one."""
    ranks = ", ".join(map(str, sorted(errors)))
    return f"worker{'s' if len(errors) > 1 else ''} {ranks} died ({reason(errors[min(errors)])})"


def reason(error: BaseException) -> str:
    """Return the first sentence of an error; in Ray's messages, later ones list possible causes in general."""
    return last_line(error).partition(". ")[0]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where Ray puts the worker's own message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
