"""What workers tell each other: values, and errors that one of them alone has met."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from orchestrator.distributed import TIMEOUT, Exchange
from orchestrator.errors import ModelError, OrchestratorError, Problem, RunFailed

WORKERS = 2


def raise_error(error: Exception) -> None:
    raise error


def outcome_of(work: Callable[[Exchange], object]) -> str:
    """Work with an exchange of its own; returns what was raised out of it."""
    try:
        with Exchange() as exchange:
            work(exchange)
    except (OrchestratorError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def leave_alone(exchange: Exchange) -> None:
    """The second worker gives up where the first goes on."""
    if exchange.rank == 1:
        raise RunFailed("no space on the second machine")
    exchange.broadcast("something")


def end_alone(exchange: Exchange) -> None:
    if exchange.rank == 1:
        raise RunFailed("at the very end")


def work(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    found: dict[str, Any] = {}
    with Exchange() as exchange:
        backend = exchange._group._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        found["waits long"] = backend.options._timeout == TIMEOUT
        found["agree"] = [exchange.agree(None), exchange.agree("here" if rank == 1 else None)]
        found["broadcast"] = exchange.broadcast(f"of {rank}")
        found["gather"] = exchange.gather(f"of {rank}")
        found["run_on_first"] = exchange.run_on_first(lambda: f"done by {rank}")
    model_error = ModelError(Problem("no such layer", "recipe.yaml:3", "name another"))
    found["disk"] = outcome_of(lambda exchange: exchange.run_on_first(lambda: raise_error(OSError(28, "disk full"))))
    found["bug"] = outcome_of(lambda exchange: exchange.run_on_first(lambda: raise_error(ValueError("a bug"))))
    found["model"] = outcome_of(lambda exchange: exchange.run_on_first(lambda: raise_error(model_error)))
    found["leaves"] = outcome_of(leave_alone)
    found["ends"] = outcome_of(end_alone)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the values that each of two workers received."""
    folder = tmp_path_factory.mktemp("exchange")
    multiprocessing.spawn(work, (folder,), nprocs=WORKERS)  # type: ignore[no-untyped-call]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORKERS)]


def test_values_reach_those_that_they_are_for(told: list[dict[str, Any]]) -> None:
    for found in told:
        assert found["agree"] == [None, "here"]
        assert found["broadcast"] == "of 0"
        assert found["run_on_first"] == "done by 0"
    assert [found["gather"] for found in told] == [["of 0", "of 1"], []]


def test_workers_wait_for_each_other_longer_than_a_collective_may_take(told: list[dict[str, Any]]) -> None:
    assert all(found["waits long"] for found in told)


def test_what_only_the_first_worker_does_fails_on_all(told: list[dict[str, Any]]) -> None:
    full = "RunFailed: [Errno 28] disk full; the checkpoints are whole"
    assert [found["disk"] for found in told] == [full, full]
    assert [found["bug"] for found in told] == ["ValueError: a bug", "RunFailed: worker 0 failed: ValueError: a bug"]
    wrong = "ModelError: recipe.yaml:3: no such layer\n    -> name another"
    assert [found["model"] for found in told] == [wrong, wrong]


@pytest.mark.parametrize(("how", "words"), [("leaves", "no space on the second machine"), ("ends", "at the very end")])
def test_a_worker_that_gives_up_is_not_waited_for(how: str, words: str, told: list[dict[str, Any]]) -> None:
    assert [found[how] for found in told] == [f"RunFailed: {words}"] * WORKERS


def test_one_worker_alone_needs_no_process_group() -> None:
    with Exchange() as exchange:
        assert (exchange.rank, exchange.size) == (0, 1)
        assert exchange.run_on_first(lambda: 5) == 5
        assert exchange.gather(1) == [1]
        with pytest.raises(OSError, match="as it is"):
            exchange.run_on_first(lambda: raise_error(OSError("as it is")))
