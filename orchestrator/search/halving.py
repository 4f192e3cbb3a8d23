"""Successive halving that does not wait for stragglers, for Ray Tune: Jamieson & Talwalkar 2016; Li et al. 2018 (ASHA).

Ray Tune's own ASHA never leaves a trial to take it up again: when a trial comes to a rung, it is stopped or goes on, by
what was there before. With few trials at a time most go on, because little was. Here every trial comes to the first
rung before one goes on to the second, as far as there is enough to do; a trial that is left costs nothing, being a run
directory with a checkpoint.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

Standing = tuple[float, float]  # Score, and the loss below zero, which decides between equal scores.


class Source(Protocol):
    """Where trials come from."""

    @property
    def is_exhausted(self) -> bool:
        """No more will come."""

    def left(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial may have come to its end: what it scored is to be learned from."""


class Halving(FIFOScheduler):  # type: ignore[misc]
    """A trial gets `grace` evaluations, then `reduction` times as many as often as it is among the best.

    Args:
        grace: evaluations up to the first rung.
        reduction: of those that came to a rung, one in so many goes on.
        score: the entry of a trial's results that is high for the good.
        worst: the score of what has none; such a trial never goes on.
        concurrent: trials at a time. Ray Tune's own limit counts those that are left, too.
    """

    def __init__(self, grace: int, reduction: int, score: str, worst: float, concurrent: int) -> None:
        super().__init__()
        self.grace, self.reduction = grace, reduction
        self.score, self.worst = score, worst
        self.concurrent = concurrent
        self.source: Source | None = None
        self._controller: Any = None
        self._scores: list[dict[str, Standing]] = []
        """Of each rung, by trial, in the order in which they came."""
        self._goals: dict[str, int] = {}
        """The rung that each trial is on its way to, or has come to."""
        self._waiting: set[str] = set()
        """Those that have come to their rung, and may be left for good."""
        self._one_is_through = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Of which Ray Tune's snapshots hold nothing: they are not read again.

    def has_room(self) -> bool:
        """Whether another trial may begin."""
        return self._controller is None or self._num_active() < self.concurrent

    def is_over(self) -> bool:
        """Whether no trial runs, and none will be taken up again."""
        return not self._waiting and (self._controller is None or not self._num_active())

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._controller = tune_controller

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        id, goal = trial.trial_id, self._goals.setdefault(trial.trial_id, 0)
        # A trial that was left, or whose process died, first tells again what it had told.
        if result["training_iteration"] < self.grace * self.reduction**goal:
            return str(TrialScheduler.CONTINUE)
        self._rung(goal)[id] = self._standing(result)
        self._waiting.add(id)
        if self._all_have_begun() and self._next_up() == id:
            self._go_on(id)
            return str(TrialScheduler.CONTINUE)
        if self.source is not None:
            self.source.left(id, result)
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return str(TrialScheduler.NOOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """One that ended before its rung, of its own accord, came to it as it was."""
        if result.get(self.score, self.worst) > self.worst:
            self._one_is_through = True
            self._rung(self._goals.setdefault(trial.trial_id, 0))[trial.trial_id] = self._standing(result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._controller = tune_controller
        trials = tune_controller.get_trials()
        if self._waiting and self.has_room() and self._all_have_begun():
            chosen = self._next_up()
            if chosen is None and not self._num_active():
                chosen = self._last_to_go_on()
            if chosen is not None:
                self._go_on(chosen)
                return next(trial for trial in trials if trial.trial_id == chosen)
            if not self._num_active():
                self._end(trials)
        return next((trial for trial in trials if trial.status == Trial.PENDING), None)

    def _all_have_begun(self) -> bool:
        return self.source is not None and self.source.is_exhausted

    def _next_up(self) -> str | None:
        """Who goes on first: the best of the lowest rung where any may."""
        ranked = (id for goal in range(len(self._scores)) for id in self._best(goal))
        return next((id for id in ranked if id in self._waiting), None)

    def _best(self, number: int) -> list[str]:
        """Those of a rung that may go on and have not, the best first; of equal ones the earlier."""
        scores = self._scores[number]
        ranked = sorted(scores, key=lambda id: scores[id], reverse=True)[: len(scores) // self.reduction]
        return [id for id in ranked if scores[id][0] > self.worst and self._goals[id] == number]

    def _last_to_go_on(self) -> str | None:
        """Where so few came to the last rungs that none of them may go on, one has to come to its end all the same."""
        able = {id: self._scores[self._goals[id]][id] for id in self._waiting}
        able = {id: standing for id, standing in able.items() if standing[0] > self.worst}
        if self._one_is_through or not able:
            return None
        return max(able, key=lambda id: (self._goals[id], able[id]))

    def _go_on(self, id: str) -> None:
        self._waiting.discard(id)
        self._goals[id] += 1

    def _end(self, trials: list[Trial]) -> None:
        """Those that wait have lost."""
        for trial in trials:
            if trial.trial_id in self._waiting:
                self._waiting.discard(trial.trial_id)
                self._controller.stop_trial(trial)

    def _standing(self, result: dict[str, Any]) -> Standing:
        loss = (result.get("row") or {}).get("loss")
        return result[self.score], -math.inf if loss is None or math.isnan(loss) else -float(loss)

    def _rung(self, number: int) -> dict[str, Standing]:
        while len(self._scores) <= number:
            self._scores.append({})
        return self._scores[number]

    def _num_active(self) -> int:
        return sum(trial.status in (Trial.RUNNING, Trial.PENDING) for trial in self._controller.get_trials())

    def debug_string(self) -> str:
        return f"halving: {[len(rung) for rung in self._scores]} trials came to the rungs"
