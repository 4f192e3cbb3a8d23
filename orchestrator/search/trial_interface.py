"""What a trial is to those that run it, in Ray Tune's actors or in the command's own process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Report:
    """What a trial tells after an evaluation."""

    score: float | None
    """High is good; None where there is no number."""
    is_last: bool
    row: dict[str, Any]
    """The evaluation, as in metrics.jsonl."""
    reason: str | None = None
    """Why it failed."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Those that the evaluation was trained with; population-based training changes them midway."""


class RunningTrial(Protocol):
    """A trial, as an actor sees it."""

    def advance(self) -> Report:
        """Go on to the next evaluation."""

    def stop(self) -> None:
        """The scheduler, or the time limit, has had enough of it."""

    def save(self, folder: Path) -> None:
        """Write what another trial can go on from."""

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Go on from what another trial wrote, with other parameters."""


class Workplace(Protocol):
    """Makes trials; sent to each actor once."""

    def begin(self, id: str, parameters: dict[str, Any], members: dict[str, dict[str, Any]] | None) -> RunningTrial:
        """A trial; or several that are trained as one, where `members` holds the parameters of each by its id."""

    def close(self) -> None:
        """No more trials begin here: let go of everything."""


class Listener(Protocol):
    """What the search does with what trials tell; called in the process of the command."""

    def began(self, id: str) -> None: ...

    def told(self, id: str, row: dict[str, Any]) -> None:
        """An evaluation; where parameters change midway, `parameters` in it are those that it was trained with."""

    def ended(self, id: str, is_last: bool, reason: str | None) -> None: ...
