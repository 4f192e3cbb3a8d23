"""The messages between a trial's process and its worker group, and the channel that carries them.

Imports neither torch nor Ray: the channel's own process reads these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Command:
    """The work that a trial's process asks of its worker group."""

    number: int = 0
    """Number of the trial, counted from 1 for each worker group."""
    id: str = ""
    """Id of the trial."""
    parameters: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    """Folder with the state of another trial to continue from."""
    seen_step: int = 0
    """Step of the last evaluation that the scheduler has seen; the workers may go on to the next one."""
    num_handovers: int = 0
    """Increased by 1 to have the workers write the state that another trial can continue from."""
    stop: bool = False
    """Whether to end the trial."""
    keep_best: bool = False
    """Whether to keep the weights of the best evaluation when the trial is stopped."""
    exit: bool = False
    """Whether the workers may exit: there are no more trials."""


@dataclass(frozen=True)
class Status:
    """The progress of a worker group, as worker 0 reports it."""

    number: int = 0
    """Number of the trial that the status is about."""
    resumed_step: int = 0
    """Step of the checkpoint that this trial continued from."""
    step: int = 0
    """Step of the last evaluation."""
    row: dict[str, Any] | None = None
    """Row of metrics.jsonl of the last evaluation; None before the first."""
    is_last: bool = False
    """Whether this was the last evaluation of the trial."""
    state: dict[str, Any] = field(default_factory=dict)
    """Fields of the hooks' `TrainingState`."""
    core_seconds: float = 0.0
    """CPU time of all workers in this trial."""
    num_handovers: int = 0
    """How many of the requested handovers are written."""
    is_over: bool = False
    """Whether the trial has ended on all workers and holds nothing any more."""
    failure: str | None = None
    """Why the trial failed."""


class ChannelClosed(Exception):
    """The channel's process has died: the trial's process and its workers can no longer reach each other."""


class Channel(Protocol):
    """Carries the newest command to the workers and the newest status back; both sides hold one, also after pickling.

    Versions count the messages of one kind that were sent; 0 is the initial message. A message that was replaced
    before anybody read it is not delivered. All methods raise `ChannelClosed`.
    """

    def send_command(self, command: Command) -> None:
        """Replace the command."""

    def send_status(self, status: Status) -> None:
        """Replace the status."""

    def next_command(self, version: int, timeout: float) -> tuple[int, Command]:
        """Return the newest command and its version, once that is above `version` or after `timeout` seconds."""

    def next_status(self, version: int, timeout: float) -> tuple[int, Status]:
        """Return the newest status and its version, once that is above `version` or after `timeout` seconds."""

    def record_failure(self, number: int, reason: str) -> None:
        """Keep why trial `number` failed on a worker that is about to die, for the workers that replace it."""

    def failure_of(self, number: int) -> str | None:
        """Return the recorded failure of trial `number`."""

    def close(self) -> None:
        """End the channel."""
