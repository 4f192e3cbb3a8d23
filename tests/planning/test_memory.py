"""The parts of a worker's memory add up as the papers say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.planning import (
    ModelSize,
    PassMemory,
    ShardingSetup,
    estimate_memory,
    network_bytes,
    parse_machine,
    step_seconds,
)

MILLION = 10**6
MODEL = ModelSize(trained=100 * MILLION, frozen=0, held=400 * MILLION, layers=12)
PASS = PassMemory(
    activations=900 * MILLION, logits=50 * MILLION, with_gradients=1000 * MILLION, gradients=400 * MILLION
)
PLAIN = ShardingSetup(
    workers=1, deepspeed=False, zero_stage=0, offload="none", precision="bf16", passes=1, is_gpu=False, process=7
)


def zero(stage: int, **changes: object) -> ShardingSetup:
    return replace(PLAIN, workers=4, deepspeed=True, zero_stage=stage, **changes)  # type: ignore[arg-type]


def test_plain_training_holds_sixteen_bytes_for_each_trained_weight() -> None:
    found = estimate_memory(MODEL, PASS, PLAIN)
    states = {name: found.parts[name] for name in ("weights", "gradients", "optimizer")}
    assert sum(states.values()) == 16 * MODEL.trained
    # Gradients come as activations go.
    assert found.total == sum(states.values()) + (PASS.with_gradients - PASS.gradients) + 7


def test_gradients_of_earlier_passes_and_of_other_workers_are_there_all_the_time() -> None:
    later = replace(PASS, later=800 * MILLION)
    assert estimate_memory(MODEL, later, PLAIN).total == 16 * MODEL.trained + 800 * MILLION + 7
    assert estimate_memory(MODEL, PASS, replace(PLAIN, workers=2)).total == 16 * MODEL.trained + PASS.activations + 7


@pytest.mark.parametrize(("stage", "shares"), [(1, 1), (2, 1), (3, 1)])
def test_zero_shares_the_optimizer_out(stage: int, shares: int) -> None:
    found = estimate_memory(MODEL, PASS, zero(stage))
    assert found.parts["optimizer"] == 12 * MODEL.trained // 4 * shares


def test_the_third_stage_shares_the_weights_out_too() -> None:
    large = ModelSize(trained=10**6, frozen=70 * 10**9, held=0, layers=80)
    assert estimate_memory(large, PASS, zero(2)).parts["weights"] == 2 * (large.trained + large.frozen)
    assert estimate_memory(large, PASS, zero(3)).parts["weights"] == 2 * (large.trained + large.frozen) // 4


def test_gradients_between_passes_are_shared_out_from_the_second_stage_on() -> None:
    later = replace(PASS, later=PASS.activations)
    found = [estimate_memory(MODEL, later, zero(stage)).parts["gradients"] for stage in (1, 2, 3)]
    assert found == [2 * MODEL.trained, 2 * MODEL.trained // 4, 2 * MODEL.trained // 4]


def test_what_is_offloaded_is_in_main_memory_and_not_lost() -> None:
    gpu = replace(zero(3), is_gpu=True)
    on_it, half, away = (
        estimate_memory(MODEL, PASS, replace(gpu, offload=each)) for each in ("none", "optimizer", "all")
    )
    assert on_it.main == 0
    assert half.main >= on_it.parts["optimizer"]
    assert half.total == on_it.total - on_it.parts["optimizer"]
    assert away.main == half.main + on_it.parts["weights"]
    # Without a GPU there is but one memory.
    here = estimate_memory(MODEL, PASS, replace(zero(3), offload="all"))
    assert here.main == 0
    assert here.parts["offloaded"] == away.main


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_workers_never_take_more_memory_each(stage: int) -> None:
    setting = replace(PLAIN, deepspeed=stage > 0, zero_stage=stage)
    totals = [estimate_memory(MODEL, PASS, replace(setting, workers=number)).total for number in (2, 4, 8, 64)]
    assert totals == sorted(totals, reverse=True)


def test_the_third_stage_sends_half_as_much_again_as_the_others() -> None:
    model = replace(MODEL, trained=64 * MILLION)
    second, third = (network_bytes(model, replace(zero(stage), workers=64)) for stage in (2, 3))
    assert third == pytest.approx(1.5 * second)
    assert network_bytes(model, PLAIN) == 0


def test_a_step_takes_as_long_as_the_slower_of_computing_and_sending() -> None:
    machine = parse_machine("2x8xH100-80GB")
    assert step_seconds(1e15, 1e14, 0, 16, machine) == 10.0
    assert step_seconds(1e9, 1e14, 10**11, 8, machine) == 10**11 / machine.link
    assert step_seconds(1e9, 1e14, 10**11, 16, machine) == 10**11 / machine.network
