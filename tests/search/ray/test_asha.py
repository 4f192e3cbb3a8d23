"""ASHA: which trials are promoted from rung to rung, which are paused and resumed, and how the search ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.ray.asha import ASHA, Rung

WORST = -1e30


@dataclass(eq=False)
class Trial:
    """Stands in for Ray Tune's trial, with the attributes that the scheduler reads."""

    trial_id: str
    status: str = "PENDING"
    num_reported: int = 0


@dataclass
class Source:
    is_exhausted: bool = False
    heard: list[str] = field(default_factory=list)

    def on_trial_pause(self, trial_id: str, result: dict[str, Any]) -> None:
        self.heard.append(trial_id)


@dataclass
class Controller:
    """Runs trials as Ray Tune does, one evaluation of each running trial after another."""

    scheduler: ASHA
    scores: Callable[[str, int], float]
    length: int
    losses: Callable[[str], float] | None = None
    trials: list[Trial] = field(default_factory=list)
    evaluated: list[tuple[str, int]] = field(default_factory=list)
    """Evaluations that were computed, by trial and number."""
    done: dict[str, set[int]] = field(default_factory=dict)
    most_running: int = 0

    def get_trials(self) -> list[Trial]:
        return self.trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None:
        assert not should_checkpoint
        trial.status = "PAUSED"

    def stop_trial(self, trial: Trial) -> None:
        assert trial.status == "PAUSED"
        assert trial.trial_id in self.scheduler.source.heard
        trial.status = "TERMINATED"

    def run(self, ids: list[str]) -> None:
        source = self.scheduler.source = Source()
        waiting = list(ids)
        for _ in range(10_000):
            if waiting and self.scheduler.has_room() and not any(trial.status == "PENDING" for trial in self.trials):
                self.trials.append(Trial(waiting.pop(0)))
                self.scheduler.on_trial_add(self, self.trials[-1])
            source.is_exhausted = not waiting
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is not None:
                chosen.status, chosen.num_reported = "RUNNING", 0
            running = [trial for trial in self.trials if trial.status == "RUNNING"]
            self.most_running = max(self.most_running, len(running))
            for trial in running:
                self.evaluate(trial)
            if not waiting and all(trial.status == "TERMINATED" for trial in self.trials):
                return
        raise AssertionError("it never ends")

    def evaluate(self, trial: Trial) -> None:
        trial.num_reported += 1  # From the first on: a trial that is resumed reports again what it had reported.
        seen = self.done.setdefault(trial.trial_id, set())
        if trial.num_reported not in seen:
            seen.add(trial.num_reported)
            self.evaluated.append((trial.trial_id, trial.num_reported))
        result: dict[str, Any] = {
            "training_iteration": trial.num_reported,
            "score": self.scores(trial.trial_id, trial.num_reported),
        }
        if self.losses is not None:
            result["row"] = {"loss": self.losses(trial.trial_id)}
        if trial.num_reported == self.length:
            trial.status = "TERMINATED"
            self.scheduler.on_trial_complete(self, trial, result)
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        assert decision == ("CONTINUE" if trial.status == "RUNNING" else "NOOP")

    def lengths(self) -> dict[str, int]:
        return {id: max(numbers) for id, numbers in self.done.items()}


def controller(
    scores: Callable[[str, int], float], length: int = 9, concurrent: int = 2, grace: int = 1, reduction: int = 3
) -> Controller:
    return Controller(ASHA(grace, reduction, "score", WORST, concurrent), scores, length)


def rising(id: str, number: int) -> float:
    """Later trials are better, which is worst for a scheduler that lets the first ones go on."""
    return float(id) + number / 100


IDS = [str(number) for number in range(18)]


def test_worse_trials_that_come_first_stay_at_the_first_rung() -> None:
    found = controller(lambda id, number: -rising(id, 0))
    found.run(IDS)
    lengths = found.lengths()
    assert sorted(lengths.values()) == [1] * 12 + [3] * 4 + [9] * 2
    assert [id for id in IDS if lengths[id] == 9] == ["0", "1"]


def test_better_trials_that_come_last_cost_no_more() -> None:
    found = controller(rising)
    found.run(IDS)
    lengths = found.lengths()
    assert sorted(lengths.values()) == [1] * 12 + [3] * 4 + [9] * 2
    assert [id for id in IDS if lengths[id] == 9] == ["16", "17"]


def test_trials_that_begin_together_do_not_wait_for_one_that_is_slow() -> None:
    found = controller(rising, concurrent=8)
    found.run(IDS)
    assert found.lengths()["17"] == 9
    assert len(found.evaluated) <= 1.5 * (18 + 12 + 12)


def test_nothing_is_evaluated_twice_and_no_more_run_than_may() -> None:
    found = controller(rising, concurrent=3)
    found.run(IDS)
    assert len(found.evaluated) == len(set(found.evaluated))
    assert found.most_running == 3


def test_of_equal_scores_the_lower_loss_is_promoted_and_nan_never() -> None:
    found = controller(lambda id, number: 0.5)
    found.losses = lambda id: math.nan if id == "17" else 20.0 - float(id)
    found.run(IDS)
    assert [id for id in IDS if found.lengths()[id] == 9] == ["15", "16"]


def test_one_comes_to_its_end_however_few_there_are() -> None:
    for count in (1, 2, 3, 4):
        found = controller(rising)
        found.run(IDS[:count])
        assert max(found.lengths().values()) == 9
        assert found.lengths()[IDS[count - 1]] == 9


def test_trials_without_a_score_are_never_promoted() -> None:
    found = controller(lambda id, number: WORST if id in ("3", "17") else rising(id, number))
    found.run(IDS)
    assert found.lengths()["3"] == found.lengths()["17"] == 1
    assert found.lengths()["16"] == 9


def test_where_none_has_a_score_it_ends() -> None:
    found = controller(lambda id, number: WORST)
    found.run(IDS[:5])
    assert set(found.lengths().values()) == {1}


def test_rungs_are_as_far_apart_as_asked_for() -> None:
    found = controller(rising, length=16, grace=2, reduction=2)
    found.run(IDS)
    assert set(found.lengths().values()) <= {2, 4, 8, 16}
    assert found.lengths()["17"] == 16


def test_one_that_ends_by_itself_before_its_rung_counts_there() -> None:
    found = controller(rising, length=2, grace=4)
    found.run(IDS[:4])
    assert set(found.lengths().values()) == {2}


class Watched(Trial):
    """Counts how often its status is looked at while the scheduler is at work."""

    at_work = False
    looks = 0

    def __getattribute__(self, name: str) -> Any:
        Watched.looks += name == "status" and Watched.at_work
        return super().__getattribute__(name)


def watched(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        before, Watched.at_work = Watched.at_work, True
        try:
            return method(*arguments, **named)
        finally:
            Watched.at_work = before

    return call


def test_a_decision_looks_at_no_trial_that_waits_or_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else four times as many trials would cost sixteen times as much."""
    monkeypatch.setitem(globals(), "Trial", Watched)
    looks = []
    for count in (50, 200):
        found = controller(lambda id, number: -rising(id, number))
        for name in ("has_room", "on_trial_add", "on_trial_result", "on_trial_complete", "choose_trial_to_run"):
            monkeypatch.setattr(found.scheduler, name, watched(getattr(found.scheduler, name)))
        Watched.looks = 0
        found.run([str(number) for number in range(count)])
        looks.append(Watched.looks / count)
    assert 0 < looks[1] <= 1.2 * looks[0]


@given(
    st.lists(st.tuples(st.sampled_from([WORST, 0.1, 0.5, 0.9]), st.sampled_from([-math.inf, -2.0, -1.0])), max_size=20),
    st.integers(0, 20),
    st.randoms(),
)
def test_a_rung_gives_the_best_that_waits_as_if_all_were_put_in_order_anew(
    standings: list[tuple[float, float]], most: int, chance: Any
) -> None:
    rung, waiting, came = Rung(), set[str](), dict[str, tuple[float, float]]()
    for standing in standings:
        # Now and then one comes again, because its process died.
        id = chance.choice([*came, "new"])
        id = str(len(came)) if id == "new" else id
        rung.add(id, standing)
        came[id] = standing
        if chance.random() < 0.8:
            waiting.add(id)
        ranked = sorted(came, key=lambda id: came[id], reverse=True)[:most]
        first = next((id for id in ranked if id in waiting), None)
        assert rung.first(waiting.__contains__, most) == first
        assert rung.standing(id) == standing
        if first is not None and chance.random() < 0.5:
            waiting.discard(first)
    assert len(rung) == len(came)


def test_a_snapshot_holds_nothing() -> None:
    state: Any = controller(rising).scheduler.__getstate__()
    assert state == {}
