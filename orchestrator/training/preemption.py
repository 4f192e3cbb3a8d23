"""Save a checkpoint before a run ends early: because machines will be taken away, or a stop was requested."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.distributed import Exchange
from orchestrator.training.hooks import Saver, TrainingState
from orchestrator.training.interruption import Interrupted, StopRequest
from orchestrator.training.loop import Step

SECONDS_BETWEEN_CHECKS = 2.0


class PreemptionNotice(Protocol):
    """Notices of the cluster that machines will be taken away."""

    def is_given(self) -> bool:
        """Whether a machine of any worker will be taken away; the same on all workers, which all call this."""

    def wait(self) -> None:
        """Wait until the machine is gone, and this process with it; return if it was not taken away after all."""


class Watch:
    """A hook that checks every few seconds, at the same step on all workers, whether the run is to end, and saves it.

    After a notice the run waits for its end, because further steps would be lost with the machine.
    """

    def __init__(
        self,
        exchange: Exchange,
        saver: Saver,
        notice: PreemptionNotice | None,
        stop_request: StopRequest | None,
        report_phase: Callable[[str], None],
    ) -> None:
        """
        Args:
            notice: None where no machines are taken away.
            stop_request: None where nothing can request a stop.
            report_phase: shows the user a phase.
        """
        self.exchange = exchange
        self.saver = saver
        self.notice = notice
        self.stop_request = stop_request
        self.report_phase = report_phase
        self._next = 1
        self._last_check: tuple[int, float] | None = None

    def after_step(self, step: Step, state: TrainingState) -> None:
        # A single worker checks at each step: it needs no exchange with others.
        if self.exchange.size == 1 and self._is_stop_requested():
            self._end(step, state)
        if step.number < self._next:
            return
        mine = self._steps_until_check(step.number), self._is_stop_requested()
        num_steps, is_requested = self.exchange.broadcast(mine)
        self._next = step.number + num_steps
        if is_requested:
            self._end(step, state)
        if self.notice is not None and self.notice.is_given():
            self.saver.save(step, state)
            self.report_phase(f"a machine is about to be taken away; step {step.number} is saved")
            self.notice.wait()

    def during_steps(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.stop_request is None else self.stop_request.during_steps()

    def _is_stop_requested(self) -> bool:
        return self.stop_request is not None and self.stop_request.is_set()

    def _end(self, step: Step, state: TrainingState) -> None:
        self.report_phase(f"interrupted; step {step.number} is being saved")
        self.saver.save(step, state)
        raise Interrupted(f"interrupted; step {step.number} is saved")

    def _steps_until_check(self, number: int) -> int:
        """Return how many steps take the seconds between two checks, by this worker's clock."""
        now = time.monotonic()
        steps, since = self._last_check or (number - 1, now - SECONDS_BETWEEN_CHECKS)
        self._last_check = number, now
        seconds = (now - since) / max(1, number - steps)
        return max(1, int(SECONDS_BETWEEN_CHECKS / max(seconds, 1e-3)))
