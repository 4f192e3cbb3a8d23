"""Successive halving that does not wait for stragglers, for Ray Tune: Jamieson & Talwalkar 2016; Li et al. 2018 (ASHA).

Ray Tune's own ASHA never leaves a trial to take it up again: when a trial comes to a rung, it is stopped or goes on, by
what was there before. With few trials at a time most go on, because little was. Here every trial comes to the first
rung before one goes on to the second, as far as there is enough to do; a trial that is left costs nothing, being a run
directory with a checkpoint.
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

Standing = tuple[float, float]  # Score, and the loss below zero, which decides between equal scores.
Rank = tuple[float, float, int, str]
"""Of a trial at a rung; the least is the best: its standing below zero, how many came before it, and its id."""


class Source(Protocol):
    """Where trials come from."""

    @property
    def is_exhausted(self) -> bool:
        """No more will come."""

    def left(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial may have come to its end: what it scored is to be learned from."""


class Rung:
    """The trials that came to a rung, in an order that is kept: a decision costs little, however many they are."""

    def __init__(self) -> None:
        self._places: dict[str, Rank] = {}
        self._ranked: list[Rank] = []
        self._candidates: list[Rank] = []
        """A heap; those that have gone on are dropped when they come to its top."""

    def __len__(self) -> int:
        return len(self._places)

    def add(self, id: str, standing: Standing) -> None:
        """A trial has come; one whose process died may come again, which counts in the place of the first time."""
        before = self._places.get(id)
        if before is not None:
            self._ranked.remove(before)
        rank = (-standing[0], -standing[1], len(self) if before is None else before[2], id)
        self._places[id] = rank
        insort(self._ranked, rank)
        heapq.heappush(self._candidates, rank)

    def standing(self, id: str) -> Standing:
        return -self._places[id][0], -self._places[id][1]

    def first(self, is_waiting: Callable[[str], bool], most: int) -> str | None:
        """The best of those that wait here, if it is among the best `most` of all that came."""
        while self._candidates and not self._may_be_chosen(self._candidates[0], is_waiting):
            heapq.heappop(self._candidates)
        if not self._candidates or bisect_left(self._ranked, self._candidates[0]) >= most:
            return None
        return self._candidates[0][3]

    def _may_be_chosen(self, rank: Rank, is_waiting: Callable[[str], bool]) -> bool:
        return self._places[rank[3]] == rank and is_waiting(rank[3])


class ASHA(FIFOScheduler):  # type: ignore[misc]
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
        self._trials: dict[str, Trial] = {}
        self._open: dict[str, Trial] = {}
        """Those of them that neither wait nor have ended, and some that have been so since they were looked at last."""
        self._rungs: list[Rung] = []
        self._goals: dict[str, int] = {}
        """The rung that each trial is on its way to, or has come to."""
        self._waiting: set[str] = set()
        """Those that have come to their rung, and may be left for good."""
        self._one_is_through = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Of which Ray Tune's snapshots hold nothing: they are not read again.

    def has_room(self) -> bool:
        """Whether another trial may begin."""
        return len(self._active()) < self.concurrent

    def is_over(self) -> bool:
        """Whether no trial runs, and none will be taken up again."""
        return not self._waiting and not self._active()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Also called where a trial begins again because its process died."""
        self._controller = tune_controller
        self._trials[trial.trial_id] = self._open[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        id, goal = trial.trial_id, self._goals.setdefault(trial.trial_id, 0)
        # A trial that was left, or whose process died, first tells again what it had told.
        if result["training_iteration"] < self.grace * self.reduction**goal:
            return str(TrialScheduler.CONTINUE)
        self._rung(goal).add(id, self._standing(result))
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
            self._rung(self._goals.setdefault(trial.trial_id, 0)).add(trial.trial_id, self._standing(result))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._controller = tune_controller
        if self._waiting and self.has_room() and self._all_have_begun():
            chosen = self._next_up()
            if chosen is None and not self._active():
                chosen = self._last_to_go_on()
            if chosen is not None:
                self._go_on(chosen)
                return self._trials[chosen]
            if not self._active():
                self._end()
        return next((trial for trial in self._active() if trial.status == Trial.PENDING), None)

    def _all_have_begun(self) -> bool:
        return self.source is not None and self.source.is_exhausted

    def _next_up(self) -> str | None:
        """Who goes on first: the best of the lowest rung where any may; of equal ones the earlier."""
        for goal, rung in enumerate(self._rungs):
            first = rung.first(partial(self._is_waiting, goal), len(rung) // self.reduction)
            if first is not None and rung.standing(first)[0] > self.worst:
                return first
        return None

    def _is_waiting(self, goal: int, id: str) -> bool:
        return id in self._waiting and self._goals[id] == goal

    def _last_to_go_on(self) -> str | None:
        """Where so few came to the last rungs that none of them may go on, one has to come to its end all the same."""
        able = {id: self._rungs[self._goals[id]].standing(id) for id in self._waiting}
        able = {id: standing for id, standing in able.items() if standing[0] > self.worst}
        if self._one_is_through or not able:
            return None
        return max(able, key=lambda id: (self._goals[id], able[id]))

    def _go_on(self, id: str) -> None:
        self._waiting.discard(id)
        self._open[id] = self._trials[id]
        self._goals[id] += 1

    def _end(self) -> None:
        """Those that wait have lost."""
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
        """Those that run, or are about to. What has ended, or waits, is forgotten: it may be nearly all of them."""
        for id, trial in list(self._open.items()):
            has_ended = trial.status in (Trial.TERMINATED, Trial.ERROR)
            if has_ended or (trial.status == Trial.PAUSED and id in self._waiting):
                del self._open[id]
        return [trial for trial in self._open.values() if trial.status in (Trial.RUNNING, Trial.PENDING)]

    def debug_string(self) -> str:
        return f"halving: {[len(rung) for rung in self._rungs]} trials came to the rungs"
