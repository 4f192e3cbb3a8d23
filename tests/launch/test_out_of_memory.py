"""A pass that does not fit into memory makes passes smaller and does not end the run."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import orchestrator
from orchestrator.errors import RunFailed
from orchestrator.launch import ray_train as worker
from orchestrator.launch.out_of_memory import is_out_of_memory
from orchestrator.training import loop

WriteRecipe = Callable[..., Path]
FIRST_FAILURE = 5
TRAIN = {"epochs": 2, "global_batch_size": 16, "precision": "fp32", "save_every": 2, "log_every": 1}


def tokens_of_largest_pass(engine: Any, loader: Any, plan: Any, rows: Any) -> int:
    hands = [mine for dealt in loop.cut(engine, loader, plan, rows) for mine in dealt if len(mine)]
    return max(len(mine) * int(loader.encoded.lengths[mine].max()) for mine in hands)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has passes of more than so many tokens ask for more memory than there is, from some step on."""

    def limit(number: int) -> None:
        take_step = loop.take_step

        def take(engine: Any, task: Any, loader: Any, plan: Any, index: int, rows: Any, *others: Any) -> Any:
            if index >= FIRST_FAILURE and tokens_of_largest_pass(engine, loader, plan, rows) > number:
                torch.empty(2**50)
            return take_step(engine, task, loader, plan, index, rows, *others)

        monkeypatch.setattr(loop, "take_step", take)

    return limit


def train_losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_a_run_goes_on_with_smaller_passes_and_learns_the_same(
    write_recipe: WriteRecipe, tmp_path: Path, fits: Callable[[int], None]
) -> None:
    # Without dropout, which is drawn for each pass.
    transfer = {"freeze": "all", "head": {"dropout": 0.0}}
    recipe = orchestrator.load_recipe(write_recipe(train={**TRAIN, "cache_prefix": False}, transfer=transfer))
    orchestrator.train(recipe, tmp_path / "undisturbed")
    fits(40)
    found = orchestrator.train(recipe, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["tokens_per_pass"] <= 40
    assert [note.partition(" did not fit into memory")[1] != "" for note in found.notes] == [True, True]
    expected = train_losses(tmp_path / "undisturbed")
    assert train_losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len(expected) == found.result["steps"]


@pytest.mark.parametrize("scale", ["scale.engine=torch", "scale.zero_stage=2", "scale.zero_stage=3"])
def test_a_run_that_begins_again_holds_nothing_of_what_did_not_fit(
    scale: str, write_recipe: WriteRecipe, tmp_path: Path, fits: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, weakref.ref[Any]]] = []
    left: list[str] = []
    fits(40)
    take_step = loop.take_step

    def note(engine: Any, *others: Any) -> tuple[float, float]:
        if not begun or begun[-1]["engine"]() is not engine:
            left.extend(name for each in begun for name, reference in each.items() if reference() is not None)
            held = {"engine": engine, "model": engine.module, "optimizer": engine.optimizer}
            begun.append({name: weakref.ref(each) for name, each in held.items()})
        return take_step(engine, *others)

    monkeypatch.setattr(loop, "take_step", note)
    orchestrator.train(orchestrator.load_recipe(write_recipe(train=TRAIN), [scale]), tmp_path / "run")
    assert len(begun) == 3
    assert left == []


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"micro_batch_size": 8}, "a pass over 8 examples does not fit[\\s\\S]*micro_batch_size: auto"),
        ({}, "a pass over 1 example does not fit[\\s\\S]*set train.gradient_checkpointing"),
    ],
)
def test_where_passes_cannot_be_smaller_the_run_ends_with_what_to_do(
    train: dict[str, Any], words: str, write_recipe: WriteRecipe, tmp_path: Path, fits: Callable[[int], None]
) -> None:
    fits(0)
    recipe = orchestrator.load_recipe(write_recipe(train={**TRAIN, **train}))
    with pytest.raises(RunFailed, match=words):
        orchestrator.train(recipe, tmp_path / "run")
    assert any((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.fixture
def in_workers(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> Callable[[int], None]:
    """Has the second of two workers run out of memory in passes of more than so many tokens, from some step on."""

    def limit(number: int) -> None:
        train_on_worker = worker.train_on_worker

        def work(config: dict[str, Any]) -> Any:
            # In the worker's process, which does not know this file.
            from orchestrator.launch import import_ahead

            import_ahead.wait()
            from orchestrator.training import loop

            take_step = loop.take_step

            def take(engine: Any, task: Any, loader: Any, plan: Any, index: int, rows: Any, *others: Any) -> Any:
                hands = [dealt[1] for dealt in loop.cut(engine, loader, plan, rows) if len(dealt[1])]
                largest = max(len(mine) * int(loader.encoded.lengths[mine].max()) for mine in hands)
                if engine.rank == 1 and index >= 5 and largest > number:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return take_step(engine, task, loader, plan, index, rows, *others)

            loop.take_step = take
            return train_on_worker(config)

        monkeypatch.setattr(worker, "train_on_worker", work)

    return limit


def test_several_workers_begin_again_with_smaller_passes_and_it_is_no_failure(
    write_recipe: WriteRecipe, tmp_path: Path, in_workers: Callable[[int], None]
) -> None:
    in_workers(30)
    scale = {"workers": 2, "max_failures": 0}
    recipe = orchestrator.load_recipe(write_recipe(train={**TRAIN, "cache_prefix": False}, scale=scale))
    found = orchestrator.train(recipe, tmp_path / "run")
    assert found.result["status"] == "finished"
    assert len(found.notes) >= 1
    assert all("did not fit into memory" in note for note in found.notes)
    assert not dist.is_initialized()


def test_where_passes_of_one_worker_cannot_be_smaller_none_waits_for_the_others(
    write_recipe: WriteRecipe, tmp_path: Path, in_workers: Callable[[int], None]
) -> None:
    in_workers(30)
    train = {**TRAIN, "cache_prefix": False, "micro_batch_size": 8}
    recipe = orchestrator.load_recipe(write_recipe(train=train, scale={"workers": 2}))
    with pytest.raises(RunFailed, match="a pass over 8 examples does not fit"):
        orchestrator.train(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["notes"] == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.3\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        dist.DistBackendError("Last error:\nCuda failure 'out of memory'"),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_running_out_of_memory_is_known_in_the_words_of_every_library(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        ValueError("CUDA error: out of memory"),
    ],
)
def test_failures_of_the_same_libraries_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
