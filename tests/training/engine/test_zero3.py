"""ZeRO-3: one worker loads the model, the others hold their share alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from orchestrator import load_recipe, models
from orchestrator.distributed import Exchange
from orchestrator.errors import ModelError, Problem
from orchestrator.training.engine import zero3 as spreading
from orchestrator.training.engine.deepspeed_config import deepspeed_config
from orchestrator.training.engine.zero3 import assemble_for_sharding, shard_parameters
from orchestrator.training.prepare import prepare

WORKERS = 2


def work(rank: int, folder: Path, recipe_path: Path) -> None:
    """One of two workers: writes the checksums of what it sees of the spread model, and how much of it it holds."""
    os.environ.update({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{WORKERS}"})
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORKERS), rank=rank, world_size=WORKERS)
    import deepspeed

    recipe = load_recipe(recipe_path)
    prepared = prepare(recipe)
    if rank > 0:
        load_model = models.load.load_model

        def only_outlines(*given: Any, from_scratch: bool = False, **named: Any) -> Any:
            assert from_scratch, "this worker is not to load the weights"
            return load_model(*given, from_scratch=True, **named)

        models.load_model = only_outlines
    exchange = Exchange()
    parts = assemble_for_sharding(prepared, exchange)
    whole = {name: value.detach().clone() for name, value in parts.module.named_parameters()} if rank == 0 else {}
    shard_parameters(parts, recipe, deepspeed_config(recipe, "fp32", 8, 1000), torch.device("cpu"), exchange)
    assert not any(value.is_meta for value in parts.module.buffers())
    held = sum(value.ds_tensor.numel() for value in parts.module.parameters())
    total = sum(value.ds_numel for value in parts.module.parameters())
    for name, value in parts.module.named_parameters():
        with deepspeed.zero.GatheredParameters(value):
            if rank == 0:
                assert torch.equal(value.detach(), whole[name]), name
    trained = sorted(name for name, value in parts.module.named_parameters() if value.requires_grad)
    groups = [[value.ds_id for value in group["params"]] for group in parts.groups]
    found = {"held": held, "total": total, "trained": trained, "groups": groups}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}])
def test_others_than_the_first_worker_hold_their_share_alone(
    adapter: Any, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    transfer = {"freeze": "stem", "adapter": adapter, "layer_decay": 0.9}
    recipe = write_recipe(transfer=transfer, scale={"zero_stage": 3, "workers": WORKERS})
    multiprocessing.spawn(work, (tmp_path, recipe), nprocs=WORKERS)  # type: ignore[no-untyped-call]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORKERS))
    assert first["trained"] == second["trained"]
    assert first["groups"] == second["groups"]
    assert first["total"] == second["total"]
    for found in (first, second):
        # A share is rounded up for each weight.
        assert found["held"] < 0.52 * found["total"]


def fail_to_load(rank: int, folder: Path, recipe_path: Path) -> None:
    """One of two workers, of which the first cannot load the model: each writes what it is told."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORKERS), rank=rank, world_size=WORKERS)
    prepared = prepare(load_recipe(recipe_path))

    def refuse(*_: Any) -> None:
        raise ModelError(Problem("a weight is missing", "model.safetensors", "download it again"))

    if rank == 0:
        spreading.assemble = refuse  # type: ignore[assignment]
    with Exchange() as exchange:
        try:
            assemble_for_sharding(prepared, exchange)
        except ModelError as error:
            (folder / f"{rank}.txt").write_text(str(error), encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_model_that_the_first_worker_cannot_load_is_refused_by_all(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(scale={"zero_stage": 3, "workers": WORKERS})
    multiprocessing.spawn(fail_to_load, (tmp_path, recipe), nprocs=WORKERS)  # type: ignore[no-untyped-call]
    for rank in range(WORKERS):
        told = (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
        assert told == "model.safetensors: a weight is missing\n    -> download it again"
