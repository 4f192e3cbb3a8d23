"""What the user is told when workers die, in the words of the run and not in those of Ray's logs."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from orchestrator.training.progress import ProgressFile
from orchestrator.training.remote_run import open_run


def teller(place: str, keys: Any) -> Any:
    """A callback of Ray Train for the run directory at a path or a URL.

    Args:
        keys: a reference to the variables that reach an object store; None where the directory is in none.
    """
    import ray
    from ray.train import UserCallback

    class Teller(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if keys is not None:
                os.environ.update(ray.get(keys))
            told = what_died(worker_exceptions)
            with contextlib.suppress(OSError):  # The run does not depend on it.
                # Ray's controller of the workers runs on the machine of the command, whose copy this is.
                directory = open_run(place)
                directory.note(told)
                again = "all start again from the last checkpoint, once the cluster has room for them"
                ProgressFile(directory.root, directory.send_progress).show(force=True, phase=f"{told}; {again}")

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
