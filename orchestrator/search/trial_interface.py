"""The interface between trials and those that run them: Ray Tune's actors, or the process of the command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial after an evaluation."""

    score: float | None
    """Higher is better; None where there is no score."""
    is_last: bool
    row: dict[str, Any]
    """The evaluation, as in metrics.jsonl."""
    reason: str | None = None
    """Why the trial failed."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters that were used up to this evaluation; population-based training changes them during the trial."""


class RunningTrial(Protocol):
    """A trial in progress."""

    def advance(self) -> TrialResult:
        """Train up to the next evaluation."""

    def stop(self) -> None:
        """Release all resources: the scheduler or the time limit ends the trial here."""

    def save(self, folder: Path) -> None:
        """Write the state that another trial can continue from."""

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Continue from the state that another trial wrote, with other parameters."""


class TrialProcess(Protocol):
    """Starts trials in the process that it was created in."""

    def start(self, id: str, parameters: dict[str, Any], batched: dict[str, dict[str, Any]] | None) -> RunningTrial:
        """Start a trial; or several that are trained as one, where `batched` holds the parameters of each by its id."""

    def close(self) -> None:
        """Release all resources: no more trials start here."""


class TrialCallback(Protocol):
    """Called in the process of the command."""

    def on_trial_start(self, id: str) -> None: ...

    def on_trial_result(self, id: str, row: dict[str, Any]) -> None:
        """Handle an evaluation.

        Args:
            row: as in metrics.jsonl; with `parameters` where population-based training changes them.
        """

    def on_trial_complete(self, id: str, is_last: bool, reason: str | None) -> None:
        """Handle the end of a trial.

        Args:
            is_last: whether it came to its last evaluation, or failed.
            reason: why it failed.
        """
