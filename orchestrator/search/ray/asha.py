"""Asynchronous successive halving (ASHA; Jamieson & Talwalkar 2016, Li et al. 2018) as a scheduler for Ray Tune.

Ray Tune's own ASHA stops a trial for good at a rung, or promotes it, by the scores of the trials that were there before
it. With few trials at a time most are promoted, because few were there. Here a trial that is not promoted is paused and
may be resumed, and every trial runs to the first rung before one goes on to the second, as long as none would be idle.
A paused trial costs nothing: it is a run directory with a checkpoint.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

Standing = tuple[float, float]
"""Score and negated loss of a trial; the loss decides between equal scores."""
Rank = tuple[float, float, int, str]
"""Negated standing of a trial at a rung, the number of trials that came before it, its id; the smallest is the best."""


class TrialSource(Protocol):
    """Suggests trials."""

    @property
    def is_exhausted(self) -> bool:
        """Whether there are no more trials."""

    def on_trial_pause(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn the score of a trial that may not be resumed."""


class Rung:
    """The trials that came to a rung, kept in order, so that a decision is cheap however many trials there are."""

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._ranked: list[Rank] = []
        self._candidates: list[Rank] = []
        """A heap; promoted trials are removed when they come to its top."""

    def __len__(self) -> int:
        return len(self._ranks)

    def add(self, id: str, standing: Standing) -> None:
        """Add a trial. One that comes again, because its process died, keeps its position among equal ones."""
        before = self._ranks.get(id)
        if before is not None:
            self._ranked.remove(before)
        rank = (-standing[0], -standing[1], len(self) if before is None else before[2], id)
        self._ranks[id] = rank
        insort(self._ranked, rank)
        heapq.heappush(self._candidates, rank)

    def standing(self, id: str) -> Standing:
        """Return the standing that a trial was added with."""
        return -self._ranks[id][0], -self._ranks[id][1]

    def first(self, is_waiting: Callable[[str], bool], most: int) -> str | None:
        """Return the id of the best trial that waits here, if it is among the best `most` of all; else None."""
        while self._candidates and not self._may_be_chosen(self._candidates[0], is_waiting):
            heapq.heappop(self._candidates)
        if not self._candidates or bisect_left(self._ranked, self._candidates[0]) >= most:
            return None
        return self._candidates[0][3]

    def _may_be_chosen(self, rank: Rank, is_waiting: Callable[[str], bool]) -> bool:
        return self._ranks[rank[3]] == rank and is_waiting(rank[3])


class ASHA(FIFOScheduler):  # type: ignore[misc]
    """Gives each trial `grace` evaluations, and `reduction` times as many each time that it is among the best.

    Args:
        grace: evaluations up to the first rung.
        reduction: one in this many of the trials at a rung is promoted.
        score: name of the metric in a trial's results; higher is better.
        worst: the score of a trial without one; such a trial is never promoted.
        concurrent: trials at a time. Ray Tune's own limit counts paused trials, too.
    """

    def __init__(self, grace: int, reduction: int, score: str, worst: float, concurrent: int) -> None:
        super().__init__()
        self.grace, self.reduction = grace, reduction
        self.score, self.worst = score, worst
        self.concurrent = concurrent
        self.source: TrialSource | None = None
        self._controller: Any = None
        self._trials: dict[str, Trial] = {}
        self._open: dict[str, Trial] = {}
        """Trials that run or are about to; those that have ended or wait by now are removed at the next look."""
        self._rungs: list[Rung] = []
        self._goals: dict[str, int] = {}
        """The rung that each trial runs to or waits at."""
        self._waiting: set[str] = set()
        """Trials that are paused at their rung."""
        self._one_is_complete = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune's snapshots are not read again.

    def has_room(self) -> bool:
        """Whether another trial may start."""
        return len(self._active()) < self.concurrent

    def is_over(self) -> bool:
        """Whether no trial runs, and none will be resumed."""
        return not self._waiting and not self._active()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Also called where a trial starts again because its process died."""
        self._controller = tune_controller
        self._trials[trial.trial_id] = self._open[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        id, goal = trial.trial_id, self._goals.setdefault(trial.trial_id, 0)
        # A trial that was paused, or whose process died, first reports again what it had reported.
        if result["training_iteration"] < self.grace * self.reduction**goal:
            return str(TrialScheduler.CONTINUE)
        self._rung(goal).add(id, self._standing(result))
        self._waiting.add(id)
        if self._all_have_started() and self._next_to_promote() == id:
            self._promote(id)
            return str(TrialScheduler.CONTINUE)
        if self.source is not None:
            self.source.on_trial_pause(id, result)
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return str(TrialScheduler.NOOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Add a trial that ended before its rung to that rung."""
        if result.get(self.score, self.worst) > self.worst:
            self._one_is_complete = True
            self._rung(self._goals.setdefault(trial.trial_id, 0)).add(trial.trial_id, self._standing(result))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._controller = tune_controller
        if self._waiting and self.has_room() and self._all_have_started():
            chosen = self._next_to_promote()
            if chosen is None and not self._active():
                chosen = self._last_to_promote()
            if chosen is not None:
                self._promote(chosen)
                return self._trials[chosen]
            if not self._active():
                self._stop_waiting()
        return next((trial for trial in self._active() if trial.status == Trial.PENDING), None)

    def _all_have_started(self) -> bool:
        return self.source is not None and self.source.is_exhausted

    def _next_to_promote(self) -> str | None:
        """Return the best trial of the lowest rung where one may be promoted; of equal ones the earlier."""
        for goal, rung in enumerate(self._rungs):
            first = rung.first(partial(self._is_waiting, goal), len(rung) // self.reduction)
            if first is not None and rung.standing(first)[0] > self.worst:
                return first
        return None

    def _is_waiting(self, goal: int, id: str) -> bool:
        return id in self._waiting and self._goals[id] == goal

    def _last_to_promote(self) -> str | None:
        """Return the best waiting trial where none is complete and none may be promoted: one trial has to complete."""
        able = {id: self._rungs[self._goals[id]].standing(id) for id in self._waiting}
        able = {id: standing for id, standing in able.items() if standing[0] > self.worst}
        if self._one_is_complete or not able:
            return None
        return max(able, key=lambda id: (self._goals[id], able[id]))

    def _promote(self, id: str) -> None:
        self._waiting.discard(id)
        self._open[id] = self._trials[id]
        self._goals[id] += 1

    def _stop_waiting(self) -> None:
        """Stop the trials that wait: none of them will be promoted."""
        for id in sorted(self._waiting):
            self._waiting.discard(id)
            self._controller.stop_trial(self._trials[id])

    def _standing(self, result: dict[str, Any]) -> Standing:
        loss = (result.get("row") or {}).get("loss")
        return result[self.score], -math.inf if loss is None or math.isnan(loss) else -float(loss)

    def _rung(self, number: int) -> Rung:
        while len(self._rungs) <= number:
            self._rungs.append(Rung())
        return self._rungs[number]

    def _active(self) -> list[Trial]:
        """Return the trials that run or are about to; the others are not looked at again, as they may be many."""
        for id, trial in list(self._open.items()):
            has_ended = trial.status in (Trial.TERMINATED, Trial.ERROR)
            if has_ended or (trial.status == Trial.PAUSED and id in self._waiting):
                del self._open[id]
        return [trial for trial in self._open.values() if trial.status in (Trial.RUNNING, Trial.PENDING)]

    def debug_string(self) -> str:
        return f"ASHA: {[len(rung) for rung in self._rungs]} trials came to the rungs"
