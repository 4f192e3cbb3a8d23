"""Trials of several workers: scored, stopped, failed and killed like those of one, and nothing stays reserved."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray._private.state import state as ray_state

from orchestrator import load_recipe
from orchestrator.errors import ClusterError, RunFailed
from orchestrator.search.changes import CHANGES
from orchestrator.search.ray.channel import RayChannel
from orchestrator.search.resources import TrialResources, num_concurrent, trial_resources
from orchestrator.search.run import SearchRun, search
from orchestrator.search.workers.group import WorkerGroup, WorkerGroups
from orchestrator.search.workers.messages import ChannelClosed, Command, Status

TWO_WORKERS = ["scale.workers=2", "train.evaluate_every=3", "train.save_every=3", "train.log_every=1"]
GOOD, POOR, TOO_HIGH = 1.0e-3, 1.0e-9, 1.0e30
RELEASE_TIMEOUT_S = 15.0


def rates(*values: float) -> str:
    return f"search.space.train.learning_rate={{choice: {json.dumps(values)}}}"


# ---- what a trial takes of the cluster


def test_a_trial_takes_what_all_of_its_workers_take(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), ["scale.workers=2", "scale.cpus_per_worker=3"])
    found = trial_resources(recipe, [{"CPU": 8.0, "GPU": 2.0}])
    assert found.worker == {"CPU": 3.0, "GPU": 1.0}
    assert found.total == {"CPU": 6.0, "GPU": 2.0}
    assert trial_resources(load_recipe(write_recipe()), [{"CPU": 8.0, "GPU": 0.0}]).actor == {"CPU": 1.0}


def test_the_actor_of_several_workers_takes_nothing_that_workers_need(write_recipe: Callable[..., Path]) -> None:
    found = trial_resources(load_recipe(write_recipe(), ["scale.workers=2"]), [{"CPU": 2.0, "GPU": 0.0}])
    assert not {"CPU", "GPU"} & found.actor.keys()


def test_workers_share_no_gpu_and_leave_none_without_a_word(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), ["scale.workers=2"])
    with pytest.raises(ClusterError, match=r"room for 1 [\s\S]*workers to 1 or less, or scale.gpus_per_worker to 0"):
        trial_resources(recipe, [{"CPU": 4.0, "GPU": 1.0}])
    recipe = load_recipe(write_recipe(), ["scale.workers=2", "scale.gpus_per_worker=0"])
    assert trial_resources(recipe, [{"CPU": 4.0, "GPU": 1.0}]).worker == {"CPU": 1.0}


def test_a_trial_that_never_fits_is_refused(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), ["scale.workers=4", "scale.cpus_per_worker=2"])
    with pytest.raises(ClusterError, match=r"a trial has 4 workers with 2 CPU each[\s\S]*room for 3 \(1 node: 7 CPU"):
        trial_resources(recipe, [{"CPU": 7.0}])


def test_the_workers_of_a_trial_are_placed_whole_on_nodes(write_recipe: Callable[..., Path]) -> None:
    # 12 CPUs in all, and no node has 4.
    recipe = load_recipe(write_recipe(), ["scale.workers=2", "scale.cpus_per_worker=4"])
    with pytest.raises(ClusterError, match="room for 0"):
        trial_resources(recipe, [{"CPU": 3.0}] * 4)
    plan: Any = SimpleNamespace(num_trials=20, num_parameters=1, search=SimpleNamespace(concurrent=8))
    # 24 CPUs in all would be for four trials with two workers of 3 CPUs, but each node holds one worker alone.
    assert num_concurrent(plan, [{"CPU": 4.0}] * 6, TrialResources({"CPU": 3.0}, workers=2)) == 3


def test_as_many_trials_run_as_their_workers_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    each = TrialResources({"CPU": 2.0}, workers=2)

    def num_for(concurrent: int | str) -> int:
        plan: Any = SimpleNamespace(num_trials=20, num_parameters=1, search=SimpleNamespace(concurrent=concurrent))
        return num_concurrent(plan, [{"CPU": 14.0, "GPU": 0.0}], each)

    assert {concurrent: num_for(concurrent) for concurrent in ("auto", 2, 8)} == {"auto": 3, 2: 2, 8: 3}


# ---- the trial's process and its worker group


@pytest.fixture
def channel(ray_cluster: None) -> Iterator[RayChannel]:
    channel = RayChannel()
    yield channel
    channel.close()


def test_a_message_reaches_who_waits_for_it_and_the_newest_is_read_again(channel: RayChannel) -> None:
    version, command = channel.next_command(-1, 0.0)
    assert (version, command) == (0, Command())
    threading.Timer(0.2, lambda: channel.send_command(Command(1, "0000"))).start()
    version, command = channel.next_command(version, 60.0)
    assert (version, command) == (1, Command(1, "0000"))
    assert channel.next_command(version, 0.01) == (1, command)
    copy = pickle.loads(pickle.dumps(channel))
    copy.send_status(Status(1, row={"step": 3}))
    assert channel.next_status(0, 60.0) == (1, Status(1, row={"step": 3}))
    for reason in ("the loss is nan", "died of it"):
        copy.record_failure(1, reason)
    assert (channel.failure_of(1), channel.failure_of(2)) == ("the loss is nan", None)


def test_the_channel_takes_no_resources_and_its_death_ends_every_wait(ray_cluster: None) -> None:
    before = ray.available_resources()
    channel = RayChannel()
    channel.send_command(Command())
    assert ray.available_resources() == before
    threading.Timer(0.2, channel.close).start()
    with pytest.raises(ChannelClosed):
        channel.next_status(0, 60.0)
    with pytest.raises(ChannelClosed):
        channel.send_status(Status())


def test_the_workers_death_is_raised_and_not_waited_for(channel: RayChannel, tmp_path: Path) -> None:
    def die() -> None:
        raise RunFailed("the workers failed more than 3 times")

    group = WorkerGroup(channel, die, tmp_path)
    group.start("0000", {}, 0, None)
    with pytest.raises(RunFailed, match="more than 3 times"):
        group.wait(lambda status: True)


def test_the_status_of_the_trial_before_is_not_taken_for_this_one(channel: RayChannel, tmp_path: Path) -> None:
    release = threading.Event()
    group = WorkerGroup(channel, lambda: release.wait() and None, tmp_path)
    channel.send_status(Status(1, is_over=True))
    group.start("0000", {}, 0, None)
    assert group.wait(lambda status: status.is_over).is_over
    group.start("0001", {"train.learning_rate": 1e-3}, 6, None)
    with pytest.raises(RunFailed, match=r"did not stop within 0\.1 s"):
        group.wait(lambda status: status.is_over, timeout=0.1)
    assert channel.next_command(-1, 0.0)[1] == Command(2, "0001", {"train.learning_rate": 1e-3}, seen_step=6)
    release.set()


def test_a_worker_group_that_has_died_is_replaced(ray_cluster: None, tmp_path: Path) -> None:
    release = threading.Event()
    work = iter([lambda: None, lambda: release.wait() and None])
    groups = WorkerGroups(lambda: WorkerGroup(RayChannel(), next(work), tmp_path))
    first = groups.running()
    first.running.result()
    second = groups.running()
    assert second is not first
    assert groups.running() is second
    with pytest.raises(ChannelClosed):
        first.channel.next_command(-1, 0.0)
    threading.Thread(target=lambda: second.channel.next_command(0, 60.0)[1].exit and release.set()).start()
    groups.shut_down()
    assert second.running.done()


# ---- searches


def reserved() -> list[dict[str, Any]]:
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def wait_until_all_is_free() -> None:
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while reserved() or ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"{ray.available_resources()}; {reserved()}"
        time.sleep(0.1)


@pytest.fixture
def nothing_stays_reserved(ray_cluster: None) -> Iterator[None]:
    """All resources of the cluster are free within 15 s after the test, and nothing waits for them."""
    wait_until_all_is_free()  # Of the searches of other tests.
    yield
    wait_until_all_is_free()
    now = ray.available_resources()
    held = {name for name, have in ray.cluster_resources().items() if name != "object_store_memory"}
    assert {name: now.get(name) for name in held} == {name: ray.cluster_resources()[name] for name in held}


def wait_for_step(trial: Path, step: int, seconds: float = 500.0) -> None:
    deadline = time.monotonic() + seconds
    metrics = trial / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, f"{trial} did not come to step {step} within {seconds} s"
        time.sleep(0.01)


def run(recipe: Path, output: Path, *overrides: str) -> SearchRun:
    return search(load_recipe(recipe, [*TWO_WORKERS, *overrides]), output)


def scores(found: SearchRun) -> dict[str, list[float]]:
    return {row["id"]: [each["loss"] for each in row["history"]] for row in found.rows}


@pytest.mark.slow
def test_trials_are_scored_stopped_and_failed_as_those_of_one_worker(
    write_recipe: Callable[..., Path], tmp_path: Path, nothing_stays_reserved: None
) -> None:
    overrides = ["train.steps=60", "train.evaluate_every=10", rates(GOOD, POOR, TOO_HIGH), "search.concurrent=1"]
    asha = ["search.metric=loss", "search.scheduler=asha", "search.grace=3", "search.reduction=2"]
    found = run(write_recipe(), tmp_path / "two", *overrides, *asha)
    rows = {row["parameters"]["train.learning_rate"]: row for row in found.rows}
    assert {rate: row["status"] for rate, row in rows.items()} == {
        GOOD: "finished",
        TOO_HIGH: "failed",
        POOR: "stopped",
    }
    assert [each["step"] for each in rows[GOOD]["history"]] == [10, 20, 30, 40, 50, 60]
    assert rows[POOR]["evaluations"] < 6
    assert "at step" in rows[TOO_HIGH]["reason"]
    assert found.result["metrics"]["select"]["accuracy"] == rows[GOOD]["metrics"]["accuracy"]
    assert (tmp_path / "two" / "trials" / rows[GOOD]["id"] / "best.safetensors").exists()
    groups = list((tmp_path / "two" / "logs" / "worker-groups").iterdir())
    assert len(groups) == 1, "the workers stay from trial to trial"
    alone = search(load_recipe(write_recipe(), [*TWO_WORKERS, *overrides, "scale.workers=1"]), tmp_path / "one")
    expected = scores(alone)[rows[GOOD]["id"]]
    # Dropout is another on each worker, so the curves are alike, not the same.
    assert scores(found)[rows[GOOD]["id"]] == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_trials_of_deepspeed_workers_follow_each_other(
    write_recipe: Callable[..., Path], tmp_path: Path, nothing_stays_reserved: None, stage: int
) -> None:
    overrides = ["train.steps=6", rates(GOOD, 5e-4, TOO_HIGH, 2e-3), "search.concurrent=1"]
    found = run(write_recipe(), tmp_path / "out", *overrides, f"scale.zero_stage={stage}")
    assert [row["status"] for row in found.rows] == ["finished", "finished", "failed", "finished"]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    plain = run(write_recipe(), tmp_path / "plain", *overrides)
    assert scores(found)["0000"] == pytest.approx(scores(plain)["0000"], rel=1e-3)


@pytest.mark.slow
def test_an_interrupted_search_releases_everything_and_resumes(
    write_recipe: Callable[..., Path], tmp_path: Path, nothing_stays_reserved: None, takes_signals: None
) -> None:
    overrides = ["train.steps=120", "train.evaluate_every=6", rates(GOOD, 5e-4, 2e-3), "search.concurrent=2"]
    output = tmp_path / "out"

    def interrupt() -> None:
        for id in ("0000", "0001"):
            wait_for_step(output / "trials" / id, 30)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(write_recipe(), output, *overrides)
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while reserved():
        assert time.monotonic() < deadline, reserved()
        time.sleep(0.1)
    assert not (output / "result.json").exists()
    assert json.loads((output / "search.json").read_text())["status"] == "interrupted"
    assert list((output / "trials" / "0000" / "checkpoints").glob("step-*"))
    found = run(write_recipe(), output, *overrides)
    assert [row["id"] for row in sorted(found.rows, key=lambda row: row["id"])] == ["0000", "0001", "0002"]
    assert {row["status"] for row in found.rows} == {"finished"}
    whole = run(write_recipe(), tmp_path / "whole", *overrides)
    for id, expected in scores(whole).items():
        assert scores(found)[id] == pytest.approx(expected, rel=1e-5), id


def find_process(log: Path) -> psutil.Process:
    """The process whose output goes to this file."""
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").readlink() == log:
                return process
        except (OSError, psutil.Error):
            continue
    raise AssertionError(f"no process writes to {log}")


def actors(class_name: str) -> list[psutil.Process]:
    """Return the processes of the actors whose class name ends like this."""
    alive = [actor for actor in ray_state.actor_table(None).values() if actor["State"] == "ALIVE"]
    assert any(actor["ActorClassName"] == "TrainController" for actor in alive)
    return [psutil.Process(actor["Pid"]) for actor in alive if actor["ActorClassName"].endswith(class_name)]


LONG = ["train.steps=120", rates(GOOD), "search.concurrent=1"]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
    write_toy: Callable[..., Path],
    tiny_bert: Path,
    small_data: Path,
    ray_cluster: None,
) -> SearchRun:
    """A search with one trial in which no process was killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(write_toy(folder / "recipe.yaml", tiny_bert, small_data), folder / "search", *LONG)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "Trainable", "ChannelActor"])
def test_a_killed_process_is_replaced_and_the_trial_continues_from_its_checkpoint(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    undisturbed: SearchRun,
    nothing_stays_reserved: None,
    victim: str,
) -> None:
    output = tmp_path / "killed"
    killed: list[int] = []

    def kill() -> None:
        trial = output / "trials" / "0000"
        wait_for_step(trial, 30)
        victims = [find_process(trial / "logs" / "worker-1.log")] if victim == "worker" else actors(victim)
        for process in victims:
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = run(write_recipe(), output, *LONG)
    killer.join(timeout=1)
    assert len(killed) == 1
    assert [row["status"] for row in found.rows] == ["finished"]
    assert scores(found)["0000"] == pytest.approx(scores(undisturbed)["0000"], rel=1e-5)


@pytest.mark.slow
def test_a_population_of_several_workers_exchanges_its_weights(
    write_recipe: Callable[..., Path], tmp_path: Path, nothing_stays_reserved: None
) -> None:
    space = "search.space.train.learning_rate={loguniform: [1.0e-5, 5.0e-3]}"
    overrides = ["train.steps=30", space, "search.trials=4", "search.algorithm=random", "search.scheduler=pbt"]
    found = run(write_recipe(), tmp_path / "out", *overrides, "search.grace=2", "search.concurrent=2")
    assert {row["id"]: row["status"] for row in found.rows} == dict.fromkeys(
        ("0000", "0001", "0002", "0003"), "finished"
    )
    assert [row["history"][-1]["step"] for row in found.rows] == [30] * 4
    assert list((tmp_path / "out" / "trials").glob(f"*/{CHANGES}")), "no trial continued from another"
