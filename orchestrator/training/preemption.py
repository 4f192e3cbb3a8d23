"""Machines that will be taken away soon: the run saves a checkpoint before that, and holds still."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.training.engine import Engine
from orchestrator.training.hooks import Memory, Saver
from orchestrator.training.loop import Step

SECONDS_BETWEEN_LOOKS = 2.0


class Notice(Protocol):
    """What the cluster tells a worker of its machines."""

    def is_given(self) -> bool:
        """Whether a machine of any worker will be taken away; the same on all workers, which all call this."""

    def wait(self) -> None:
        """Until the machine is gone, and this process with it; returns where it was not taken after all."""


class Watch:
    """Looks for a notice every few seconds, at the same steps on all workers, and has the step saved that it comes at.

    What would be computed after that is lost with the machine, so the run waits for its end.
    """

    def __init__(self, engine: Engine, saver: Saver, notice: Notice, tell: Callable[[str], None]) -> None:
        """
        Args:
            tell: shows the user a phase.
        """
        self.engine = engine
        self.saver = saver
        self.notice = notice
        self.tell = tell
        self._next = 1
        self._looked: tuple[int, float] | None = None

    def after_step(self, step: Step, memory: Memory) -> None:
        if step.number < self._next:
            return
        self._next = step.number + self._steps_to_pass(step.number)
        if self.notice.is_given():
            self.saver.save(step, memory)
            self.tell(f"a machine is about to be taken away; step {step.number} is saved")
            self.notice.wait()

    def _steps_to_pass(self, number: int) -> int:
        """How many steps are as long as a look is to wait for the next one; the first worker's clock decides."""
        now = time.monotonic()
        steps, since = self._looked or (number - 1, now - SECONDS_BETWEEN_LOOKS)
        self._looked = number, now
        pace = (now - since) / max(1, number - steps)
        found: int = self.engine.from_first_worker(max(1, int(SECONDS_BETWEEN_LOOKS / max(pace, 1e-3))))
        return found
