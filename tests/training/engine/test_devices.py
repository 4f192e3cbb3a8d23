"""The device that a process computes on: a GPU by its index, none where none is wanted, never silently the CPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.tune.execution import class_cache

from orchestrator import load_recipe, train
from orchestrator.cli.main import main
from orchestrator.errors import ClusterError
from orchestrator.inference.trained_model import choose_inference_device
from orchestrator.launch.cluster import HIDES_GPUS
from orchestrator.launch.trainer import worker_environment
from orchestrator.planning.sharding_options import local_machine
from orchestrator.recipe import Recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.search import trial_context, winner
from orchestrator.search.ray.tuner import plain_actors
from orchestrator.search.records import SearchDirectory
from orchestrator.search.run import search
from orchestrator.tasks.base import MainMetric
from orchestrator.training.engine.devices import check_gpu, choose_device
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver."
NO_GPU = "scale.gpus_per_worker=0"
METRIC = MainMetric("accuracy", higher_is_better=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that can be found, and not computed on."""
    importlib.import_module("transformers.optimization")  # It looks at the GPU when it is imported.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose driver is older than the PyTorch."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Recipe:
    return load_recipe(write_recipe(train={"epochs": 1}))


def test_trials_and_the_winner_get_a_gpu_by_its_index(
    recipe: Recipe, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.device] = []

    def open_session(prepared: Any, run: Any, attempt: int, device: torch.device, *_: Any) -> Any:
        given.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(winner, "open_session", open_session)
    monkeypatch.setattr(trial_context, "open_session", open_session)
    prepared = prepare(recipe)
    with pytest.raises(KeyboardInterrupt):
        winner.keep_winner(prepared, METRIC, SearchDirectory(tmp_path), {"id": "0000", "parameters": {}})
    trials = trial_context.TrialContext(prepared, [], tmp_path / "trials.jsonl", METRIC, keep=1)
    directory = RunDirectory(tmp_path / "trial")
    directory.create()
    with pytest.raises(KeyboardInterrupt), trials.session({}, directory):
        pass
    # As `torch.cuda.set_device` reads it.
    assert [torch.cuda._utils._get_device_index(device) for device in given] == [0, 0]


def test_a_training_that_wants_no_gpu_takes_none(write_recipe: WriteRecipe, gpu: None, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(train={"epochs": 1}), [NO_GPU])
    assert not local_machine(recipe).is_gpu
    assert train(recipe, tmp_path / "run").result["status"] == "finished"


def test_a_search_that_wants_no_gpu_takes_none(write_recipe: WriteRecipe, gpu: None, tmp_path: Path) -> None:
    space = "search.space={train.learning_rate: {choice: [1.0e-3, 2.0e-3]}}"
    recipe = load_recipe(write_recipe(train={"epochs": 1}, transfer={"freeze": "all"}), [NO_GPU, space])
    assert search(recipe, tmp_path / "search").counts == {"finished": 2}


def test_deepspeed_that_would_take_a_gpu_all_the_same_is_refused(write_recipe: WriteRecipe, gpu: None) -> None:
    recipe = load_recipe(write_recipe(), [NO_GPU, "scale.zero_stage=2"])
    with pytest.raises(ClusterError, match=r"gpus_per_worker[\s\S]*DeepSpeed[\s\S]*export CUDA_VISIBLE_DEVICES="):
        check_gpu(recipe)


@pytest.mark.parametrize("verb", ["train", "search"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_gpu_whose_driver_is_too_old_is_refused(
    verb: str, workers: int, write_recipe: WriteRecipe, old_driver: None, tmp_path: Path, ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = tmp_path / "run"
    assert main([verb, str(write_recipe()), f"scale.workers={workers}", "--output", str(place)]) == 3
    told = capsys.readouterr().err
    assert "a GPU that PyTorch cannot use: The NVIDIA driver on your system is too old (found version 12020)\n" in told
    assert "set scale.gpus_per_worker to 0" in told
    assert not place.exists()


def test_a_trained_model_does_not_go_to_the_cpu_silently(old_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"driver on your system is too old[\s\S]*export CUDA_VISIBLE_DEVICES="):
        choose_inference_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # As the remedy has it.
    assert choose_inference_device() == torch.device("cpu")


def test_following_the_remedy_trains_on_the_cpu(write_recipe: WriteRecipe, old_driver: None) -> None:
    assert choose_device(load_recipe(write_recipe(), [NO_GPU])) == torch.device("cpu")


def test_where_there_is_no_gpu_the_cpu_is_taken_without_a_word(recipe: Recipe) -> None:
    assert choose_device(recipe) == torch.device("cpu")


def test_processes_of_ray_that_are_given_no_gpu_see_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_environment()["env_vars"][HIDES_GPUS] == "1"
    before = class_cache.DEFAULT_ENV_VARS.copy()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with plain_actors():
        assert class_cache.DEFAULT_ENV_VARS[HIDES_GPUS] == "1"
    assert before == class_cache.DEFAULT_ENV_VARS
    monkeypatch.delenv("RAY_ADDRESS")
    with plain_actors():
        assert not class_cache.DEFAULT_ENV_VARS
    assert before == class_cache.DEFAULT_ENV_VARS
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
