"""Population-based training, as Ray Tune's events reach the search."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.utils import flatten_dict

from orchestrator.search.ray.tuner import Population, TuneCallback

RATE = "train.learning_rate"
RESULT = {"row": {"step": 8}, "parameters": {RATE: 1.0e-3, "transfer.freeze": 1}}


class Tried(SimpleNamespace):
    """A trial of Ray Tune."""

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


def test_an_evaluation_is_reported_with_the_parameters_of_its_training_also_where_the_config_has_changed_since() -> (
    None
):
    reported: list[Any] = []
    trial = Tried(config={"spec": {"id": "0000"}, RATE: 5.0e-3})
    callback: Any = SimpleNamespace(on_trial_result=lambda *arguments: reported.append(arguments))
    TuneCallback(callback).on_trial_result(1, [trial], trial, RESULT)
    assert reported == [("0000", {"step": 8, "parameters": {RATE: 1.0e-3}})]


def test_a_population_goes_by_the_parameters_that_its_trials_have(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(PopulationBasedTraining, "on_trial_result", lambda *given: seen.append(given[2].config))
    population = Population(perturbation_interval=1, hyperparam_mutations={RATE: [1.0e-3, 5.0e-3]})
    spec = {"id": "0000"}
    population.on_trial_result(None, Tried(config={"spec": spec, RATE: 5.0e-3}), flatten_dict(RESULT))
    assert seen == [{"spec": spec, RATE: 1.0e-3}]
