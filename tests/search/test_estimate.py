"""Estimates before anything starts: trials, time, disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import load_recipe, train
from orchestrator.errors import InputError
from orchestrator.search import estimate as estimates
from orchestrator.search import local_runner
from orchestrator.search.estimate import (
    STARTUP_SECONDS,
    Estimate,
    Throughput,
    estimate,
    mean_share,
    measure,
    trial_seconds,
)
from orchestrator.search.plan import SearchPlan, plan_search
from orchestrator.training.prepare import Prepared

FREEZE, RATE = "transfer.freeze", "train.learning_rate"
SPACE = {FREEZE: {"choice": [0, 1, "all"]}, RATE: {"choice": [1.0e-3, 1.0e-2]}}
THROUGHPUT = Throughput(step=0.10, forward=0.02, sizes={1: 1})


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def estimate_of(write_recipe: Callable[..., Path]) -> Callable[..., Estimate]:
    def make(*overrides: str, **search: Any) -> Estimate:
        recipe = write_recipe(search={"space": SPACE, "trials": 6, **search}, train={"epochs": 3})
        return estimate(load_recipe(recipe, list(overrides)))

    return make


@pytest.fixture
def plan_of(prepared_toy: Prepared, write_recipe: Callable[..., Path]) -> Callable[..., SearchPlan]:
    def make(*overrides: str, **search: Any) -> SearchPlan:
        recipe = write_recipe(search={"space": SPACE, "trials": 6, **search}, train={"epochs": 3})
        return plan_search(replace(prepared_toy, recipe=load_recipe(recipe, list(overrides))))

    return make


def test_nothing_is_started_or_left(
    estimate_of: Callable[..., Estimate], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setattr("orchestrator.launch.cluster.start_ray", lambda *_: pytest.fail("Ray was started"))
    threads = torch.get_num_threads()
    running = threading.active_count()
    found = estimate_of()
    assert found.trials == 6
    assert 1 <= found.concurrent <= 6
    assert 10 < found.seconds < 120
    assert found.notes == []
    assert torch.get_num_threads() == threads
    assert threading.active_count() == running
    assert {path.name for path in own_folder.iterdir()} == {"recipe.yaml", "cache"}
    assert not list((own_folder / "cache").glob("features/*"))


def test_the_disk_for_features_is_what_they_take(estimate_of: Callable[..., Estimate], own_folder: Path) -> None:
    expected = estimate_of()
    recipe = own_folder / "recipe.yaml"
    for depth in ("1", "all"):
        train(load_recipe(recipe, ["train.steps=9", f"transfer.freeze={depth}"]), own_folder / depth)
    values = [path.stat().st_size for path in (own_folder / "cache" / "features").glob("*/values.bin")]
    assert len(values) == 4
    assert expected.cache_bytes == sum(values)
    assert expected.disk_bytes > 4 * 10_000
    assert expected.free_bytes > 0


def test_without_features_they_take_nothing_and_a_scheduler_that_stops_trials_early_is_noted(
    estimate_of: Callable[..., Estimate],
) -> None:
    found = estimate_of("train.cache_prefix=false", "search.scheduler=asha")
    assert found.cache_bytes == 0
    assert found.notes == ["asha stops trials early: the time is an average"]


def test_trials_that_are_suggested_later_or_repeated_with_other_seeds_count_and_without_depths_nothing_is_stored(
    estimate_of: Callable[..., Estimate],
) -> None:
    rates = "search.space={train.learning_rate: {choice: [1.0e-3, 2.0e-3, 3.0e-3, 4.0e-3, 5.0e-3]}}"
    tpe = ["search.algorithm=tpe", "search.trials=5"]
    found = estimate_of(rates, *tpe, "search.reseed_top=2", "search.reseeds=3")
    assert found.trials == 5 + 2 * 3
    assert found.cache_bytes == 0


def test_a_search_of_heads_takes_one_process_and_no_ray(
    estimate_of: Callable[..., Estimate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_runner, "has_cluster", lambda: False)  # Other tests may have started one.
    found = estimate_of("search.space={transfer.freeze: {choice: [all]}, train.learning_rate: {choice: [0.01, 0.1]}}")
    assert (found.trials, found.concurrent) == (2, 1)
    assert found.seconds < STARTUP_SECONDS


def test_what_is_wrong_is_refused(estimate_of: Callable[..., Estimate]) -> None:
    with pytest.raises(InputError, match="freeze depth is 7"):
        estimate_of("search.space={transfer.freeze: {choice: [7]}}")


def test_a_trial_costs_what_it_computes(plan_of: Callable[..., SearchPlan]) -> None:
    plan = plan_of()
    seconds = {depth: trial_seconds(plan, {FREEZE: depth}, THROUGHPUT) for depth in (0, "stem", 1, 2, "all")}
    # 3 epochs of 60 examples, and 3 evaluations of 30.
    whole = 3 * 60 * 0.10 + 3 * 30 * 0.02
    assert seconds[0] - seconds[2] == pytest.approx(whole)
    assert seconds["stem"] == seconds[0]
    assert seconds[1] - seconds[2] == pytest.approx(whole / 2)
    # Heads alone are trained together.
    assert seconds["all"] < seconds[2] < 1.0


def test_a_trial_whose_frozen_blocks_are_not_stored_computes_them_in_every_epoch(
    plan_of: Callable[..., SearchPlan],
) -> None:
    plan = plan_of()
    uncached = Throughput(THROUGHPUT.step, THROUGHPUT.forward, {})
    stored, computed = (trial_seconds(plan, {FREEZE: 1}, throughput) for throughput in (THROUGHPUT, uncached))
    assert computed - stored == pytest.approx((3 * 60 + 3 * 30) * 0.02 / 2)
    assert trial_seconds(plan, {FREEZE: 0}, uncached) == trial_seconds(plan, {FREEZE: 0}, THROUGHPUT)


def test_the_values_of_a_trial_count(plan_of: Callable[..., SearchPlan]) -> None:
    plan = plan_of()
    once = trial_seconds(plan, {FREEZE: 0, "train.epochs": 1}, THROUGHPUT)
    twice = trial_seconds(plan, {FREEZE: 0, "train.epochs": 2}, THROUGHPUT)
    assert twice - once == pytest.approx(60 * 0.10 + 30 * 0.02)


def test_successive_halving_gives_an_average_trial_its_share() -> None:
    shares = {
        (1, 1, 3): 1.0,
        (3, 1, 3): (1 + 2 / 3) / 3,
        (9, 1, 3): (1 + 2 / 3 + 6 / 9) / 9,
        (4, 4, 2): 1.0,
        (4, 2, 2): 0.75,
    }
    assert {each: mean_share(*each) for each in shares} == pytest.approx(shares)


def test_the_throughput_is_that_of_the_whole_model(
    plan_of: Callable[..., SearchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = estimates.take_step

    def count(engine: Any, *arguments: Any) -> Any:
        seen.append(sum(value.requires_grad for value in engine.module.parameters()))
        return real(engine, *arguments)

    monkeypatch.setattr(estimates, "take_step", count)
    throughput = measure(plan_of("transfer.freeze=all"))
    assert len(seen) >= 2
    assert min(seen) > 30
    assert 0 < throughput.forward < throughput.step * 5
    assert set(throughput.sizes) == {1, 2}  # The pooler is new, so what is stored ends before it.


def test_a_recipe_with_an_adapter_can_be_estimated(write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe(
        transfer={"adapter": {"type": "lora", "r": 2}},
        search={"space": {FREEZE: {"choice": [0, 1]}, "transfer.adapter.r": {"choice": [2, 4]}}, "trials": 4},
    )
    found = estimate(load_recipe(recipe))
    assert found.trials == 4
    assert found.cache_bytes > 0
