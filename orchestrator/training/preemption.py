"""The end of a run that is known before it comes: a checkpoint is saved before that.

Machines will be taken away, or whoever gave the command wants it to end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.distributed import Exchange
from orchestrator.training.hooks import Saver, TrainingState
from orchestrator.training.interruption import Interrupted, Wish
from orchestrator.training.loop import Step

SECONDS_BETWEEN_LOOKS = 2.0


class Notice(Protocol):
    """Says when the cluster is about to take a worker's machine away."""

    def is_given(self) -> bool:
        """Whether a machine of any worker will be taken away; the same on all workers, which all call this."""

    def wait(self) -> None:
        """Wait until the machine is gone, and this process with it; return where it was not taken after all."""


class Watch:
    """Checks every few seconds, at the same steps on all workers, whether the end is near, and saves that step.

    What would be computed after that is lost with the machine, so the run waits for its end.
    """

    def __init__(
        self,
        exchange: Exchange,
        saver: Saver,
        notice: Notice | None,
        wish: Wish | None,
        report_phase: Callable[[str], None],
    ) -> None:
        """
        Args:
            notice: of machines that will be taken away; None where nobody takes any.
            wish: that the run ends; None where nobody can have it.
            report_phase: shows the user what the run is doing.
        """
        self.exchange = exchange
        self.saver = saver
        self.notice = notice
        self.wish = wish
        self.report_phase = report_phase
        self._next = 1
        self._looked: tuple[int, float] | None = None

    def after_step(self, step: Step, state: TrainingState) -> None:
        # One worker alone may look at each step: nobody has to be asked.
        if self.exchange.size == 1 and self._is_wished():
            self._end(step, state)
        if step.number < self._next:
            return
        num_steps, is_wished = self.exchange.from_first((self._steps_to_pass(step.number), self._is_wished()))
        self._next = step.number + num_steps
        if is_wished:
            self._end(step, state)
        if self.notice is not None and self.notice.is_given():
            self.saver.save(step, state)
            self.report_phase(f"a machine is about to be taken away; step {step.number} is saved")
            self.notice.wait()

    def while_steps_are_taken(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.wish is None else self.wish.while_steps_are_taken()

    def _is_wished(self) -> bool:
        return self.wish is not None and self.wish.is_given()

    def _end(self, step: Step, state: TrainingState) -> None:
        self.report_phase(f"interrupted; step {step.number} is being saved")
        self.saver.save(step, state)
        raise Interrupted(f"interrupted; step {step.number} is saved")

    def _steps_to_pass(self, number: int) -> int:
        """Return how many steps are as long as a look is to wait for the next one, by this worker's clock."""
        now = time.monotonic()
        steps, since = self._looked or (number - 1, now - SECONDS_BETWEEN_LOOKS)
        self._looked = number, now
        throughput = (now - since) / max(1, number - steps)
        return max(1, int(SECONDS_BETWEEN_LOOKS / max(throughput, 1e-3)))
