"""A pass that does not fit into memory makes passes smaller and does not end the run."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.errors import RunFailed
from orchestrator.training import loop
from orchestrator.training.out_of_memory import is_out_of_memory

WriteRecipe = Callable[..., Path]
FIRST_FAILURE = 5
TRAIN = {"epochs": 2, "global_batch_size": 16, "precision": "fp32", "save_every": 2, "log_every": 1}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has passes of more than so many examples ask for more memory than there is, from some step on."""

    def limit(number: int) -> None:
        take_step = loop.take_step

        def take(engine: Any, task: Any, feed: Any, plan: Any, index: int, rows: Any) -> tuple[float, float]:
            if index >= FIRST_FAILURE and plan.micro_batch_size > number:
                torch.empty(2**50)
            return take_step(engine, task, feed, plan, index, rows)

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
    fits(4)
    found = orchestrator.train(recipe, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["micro_batch_size"]) == ("finished", 4)
    assert [note.split(" ")[0] for note in found.notes] == ["16", "8"]
    expected = train_losses(tmp_path / "undisturbed")
    assert train_losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len(expected) == found.result["steps"]


@pytest.mark.parametrize("scale", ["scale.engine=torch", "scale.zero_stage=2", "scale.zero_stage=3"])
def test_a_run_that_begins_again_holds_nothing_of_what_did_not_fit(
    scale: str, write_recipe: WriteRecipe, tmp_path: Path, fits: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, weakref.ref[Any]]] = []
    left: list[str] = []
    fits(4)
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


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
