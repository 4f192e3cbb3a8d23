"""The end of a run that is known before it comes: a checkpoint is saved before that.

Machines will be taken away, or whoever gave the command wants it to end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.training.engine.base import Engine
from orchestrator.training.hooks import Saver, TrainingState
from orchestrator.training.interruption import Interrupted, StopRequest
from orchestrator.training.loop import Step

SECONDS_BETWEEN_LOOKS = 2.0


class PreemptionNotice(Protocol):
    """What the cluster tells a worker of its machines."""

    def is_given(self) -> bool:
        """Whether a machine of any worker will be taken away; the same on all workers, which all call this."""

    def wait(self) -> None:
        """Until the machine is gone, and this process with it; returns where it was not taken after all."""


class Watch:
    """Looks every few seconds, at the same steps on all workers, whether the end is near, and has that step saved.

    What would be computed after that is lost with the machine, so the run waits for its end.
    """

    def __init__(
        self,
        engine: Engine,
        saver: Saver,
        notice: PreemptionNotice | None,
        stop_request: StopRequest | None,
        report_phase: Callable[[str], None],
    ) -> None:
        """
        Args:
            notice: of machines that will be taken away; None where nobody takes any.
            wish: that the run ends; None where nobody can have it.
            tell: shows the user a phase.
        """
        self.engine = engine
        self.saver = saver
        self.notice = notice
        self.stop_request = stop_request
        self.report_phase = report_phase
        self._next = 1
        self._looked: tuple[int, float] | None = None

    def after_step(self, step: Step, state: TrainingState) -> None:
        # One worker alone may look at each step: nobody has to be asked.
        if self.engine.num_workers == 1 and self._is_wished():
            self._end(step, state)
        if step.number < self._next:
            return
        num_steps, is_wished = self.engine.from_first_worker((self._steps_to_pass(step.number), self._is_wished()))
        self._next = step.number + num_steps
        if is_wished:
            self._end(step, state)
        if self.notice is not None and self.notice.is_given():
            self.saver.save(step, state)
            self.report_phase(f"a machine is about to be taken away; step {step.number} is saved")
            self.notice.wait()

    def during_steps(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.stop_request is None else self.stop_request.during_steps()

    def _is_wished(self) -> bool:
        return self.stop_request is not None and self.stop_request.is_set()

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
