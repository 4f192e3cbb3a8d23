"""The searchers: a search that was killed suggests nothing twice, and continues as if it had not been killed."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import yaml
from ray.tune.search import Searcher

from orchestrator.recipe import parse_recipe
from orchestrator.search.ray.searchers import SCORE, OptunaSearcher
from orchestrator.search.space import Space, key_of

FREEZE, RATE = "transfer.freeze", "train.learning_rate"
CONDITIONS = {
    FREEZE: {"choice": [0, "stem", 2, "all"]},
    RATE: [{"when": {FREEZE: "all"}, "loguniform": [3e-3, 1.0]}, {"loguniform": [1e-5, 2e-4]}],
}
CHOICES = {FREEZE: {"choice": [0, "stem", "all"]}, RATE: {"choice": [1e-3, 1e-2]}}


@pytest.fixture(autouse=True)
def quiet_optuna() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


class Attempt:
    """One attempt at a search, as Ray Tune makes it: some trials at a time, which end in the order of their start."""

    def __init__(self, written: dict[str, Any], limit: int, recorded: list[dict[str, Any]], concurrent: int) -> None:
        recipe = parse_recipe(
            yaml.safe_dump(
                {
                    "name": "mine",
                    "source": {"model": "owner/model"},
                    "target": {"task": "text-classification", "data": "owner/data"},
                    "search": {"trials": 10**6, "space": written},
                }
            )
        )
        self.points: list[dict[str, Any]] = []
        self.parameters: list[dict[str, Any]] = []
        self.concurrent = concurrent
        self.searcher = OptunaSearcher(Space.of(recipe, 6).optuna_define, 3, limit, recorded, self._make_spec)

    def _make_spec(self, point: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        self.points.append(point)
        self.parameters.append(parameters)
        return parameters

    def run(self, num_ended: int | None = None) -> Attempt:
        """Run to the end, or until `num_ended` trials have ended."""
        running: list[tuple[str, dict[str, Any]]] = []
        ended = 0
        while num_ended is None or ended < num_ended:
            while len(running) < self.concurrent:
                name = f"{id(self)}-{len(self.points)}"
                found = self.searcher.suggest(name)
                if found == Searcher.FINISHED:
                    break
                running.append((name, found["spec"]))
            if not running:
                break
            name, parameters = running.pop(0)
            self.searcher.on_trial_complete(name, {SCORE: score_of(parameters)})
            ended += 1
        return self


def score_of(parameters: dict[str, Any]) -> float:
    return (1.0 if parameters[FREEZE] == 2 else 0.0) - float(parameters[RATE])


def test_a_killed_tpe_search_continues_as_if_it_had_not_been_killed() -> None:
    for concurrent in (1, 3):
        whole = Attempt(CONDITIONS, 20, [], concurrent).run()
        assert len({key_of(each) for each in whole.parameters}) == 20
        for killed_after in (1, 3, 12, 19):
            killed = Attempt(CONDITIONS, 20, [], concurrent).run(killed_after)
            again = Attempt(CONDITIONS, 20, killed.points, concurrent).run()
            assert again.parameters == whole.parameters, (concurrent, killed_after)


def test_a_search_that_is_killed_again_and_again_suggests_nothing_twice() -> None:
    recorded: list[dict[str, Any]] = []
    for _ in range(6):
        recorded = Attempt(CONDITIONS, 20, recorded, 2).run(len(recorded) + 1).points
    again = Attempt(CONDITIONS, 20, recorded, 2).run()
    assert again.points[: len(recorded)] == recorded
    assert len({key_of(each) for each in again.parameters}) == 20


def test_tpe_suggests_each_point_of_a_space_of_choices_once_and_ends_when_there_are_no_more() -> None:
    found = Attempt(CHOICES, 8, [], 1).run()
    assert len(found.parameters) == len({key_of(each) for each in found.parameters}) == 6
    assert found.searcher.is_exhausted


def test_repeated_points_of_an_earlier_attempt_keep_their_numbers() -> None:
    point = Attempt(CHOICES, 1, [], 1).run().points[0]
    again = Attempt(CHOICES, 3, [point, point], 1).run()
    assert again.points[:2] == [point, point]
    assert again.points[2] != point


def test_tpe_learns_from_scores() -> None:
    parameters = Attempt(CONDITIONS, 40, [], 1).run().parameters
    good = [each[FREEZE] == 2 for each in parameters]
    assert sum(good[20:]) > sum(good[:20])


def test_a_trial_that_is_paused_and_resumed_is_learned_from_once() -> None:
    attempt = Attempt(CONDITIONS, 20, [], 1)
    attempt.searcher.suggest("a")
    attempt.searcher.on_trial_pause("a", {SCORE: 0.5})
    attempt.searcher.on_trial_pause("a", {SCORE: 0.7})
    attempt.searcher.on_trial_complete("a", {SCORE: 0.9})
    assert [trial.value for trial in attempt.searcher._study.trials] == [0.5]


def test_a_trial_that_fails_has_no_score_and_ends_nothing() -> None:
    for end in ({"error": True}, {"result": None}, {"result": {SCORE: 0.5}, "error": True}):
        attempt = Attempt(CONDITIONS, 20, [], 1)
        attempt.searcher.suggest("a")
        attempt.searcher.on_trial_complete("a", **end)
        assert [trial.value for trial in attempt.searcher._study.trials] == [None], end
        assert isinstance(attempt.searcher.suggest("b"), dict), end
