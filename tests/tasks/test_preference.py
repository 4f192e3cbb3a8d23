"""Preference tuning: the loss of the paper, the source as its reference, what a run learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import orchestrator
from orchestrator.inference.predict import evaluate
from orchestrator.tasks.base import Batch
from orchestrator.tasks.preference import PreferenceOptions, PreferenceTuning
from orchestrator.training import evaluation
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]


@pytest.fixture
def recipe_of(write_recipe: WriteRecipe, tiny_gpt2: Path, tmp_path: Path) -> Callable[..., Path]:
    """Uneven answers; the chosen one says yes."""
    rows = [
        {"prompt": f"is {number} a number?", "chosen": " yes" * (number % 3 + 1), "rejected": " no, never"}
        for number in range(60)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(**sections: Any) -> Path:
        target = {"task": "preference", "data": str(data), "options": {"max_length": 48}}
        return write_recipe(source={"model": str(tiny_gpt2)}, target=target, **sections)

    return write


def test_the_loss_is_that_of_the_paper() -> None:
    task = PreferenceTuning(PreferenceOptions(beta=0.5))
    losses = torch.tensor([[1.0, 2.0], [3.0, 0.5], [4.0, 4.0], [1.0, 1.0]])  # Two chosen answers, two rejected ones.
    outputs = SimpleNamespace(token_losses=torch.stack([losses, torch.zeros_like(losses)], -1))
    reference = torch.tensor([[-4.0, -6.0], [-3.0, -3.0]])
    gains = torch.tensor([(-3.0 + 4.0) - (-8.0 + 6.0), (-3.5 + 3.0) - (-2.0 + 3.0)])
    expected = -torch.log(torch.sigmoid(0.5 * gains)).sum()
    batch = Batch({}, {"reference": reference})
    torch.testing.assert_close(task.loss(outputs, batch, {"targets": 4}), expected.double() / 4)
    metrics = task.metrics(
        {name: values.numpy() for name, values in task.predict(outputs, batch).items()},
        {"reference": reference.numpy()},
    )
    assert metrics == {"accuracy": 0.5, "margin": pytest.approx(float(0.5 * gains.mean()))}


def test_only_answers_count_each_with_its_end(recipe_of: Callable[..., Path]) -> None:
    prepared = prepare(orchestrator.load_recipe(recipe_of()))
    segments = prepared.task.segments(prepared.encoded("train"), 0, prepared.processor)
    learned = [text for text, is_learned in segments if is_learned]
    assert learned[0].startswith(" yes")
    assert learned == [learned[0], " no, never<|endoftext|>"]
    assert learned[0].endswith("<|endoftext|>")


@pytest.mark.parametrize("transfer", [{}, {"adapter": {"type": "lora", "r": 4}}])
def test_it_learns_to_prefer_and_begins_at_its_source(
    transfer: dict[str, Any], recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_of(transfer=transfer, train={"epochs": 3, "learning_rate": 5.0e-3, "log_every": 1})
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-2)  # Nothing is gained yet, dropout aside.
    assert losses[-1] < losses[0]
    assert run.result["before"]["test"]["margin"] == pytest.approx(0.0, abs=1e-4)
    assert run.result["metrics"]["test"]["accuracy"] == 1.0
    assert run.result["metrics"]["test"]["margin"] > 0.0
    scored = evaluate(run.directory, None, "test")["metrics"]
    for name, value in run.result["metrics"]["test"].items():
        assert scored[name] == pytest.approx(value, rel=1e-3), name


def test_what_the_source_makes_of_the_pairs_is_computed_once(
    recipe_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []
    predict_share = evaluation.predict_share

    def count(*arguments: Any) -> Any:
        asked[-1] += 1
        return predict_share(*arguments)

    monkeypatch.setattr(evaluation, "predict_share", count)
    results = []
    for name in ("first", "second"):
        asked.append(0)
        recipe = recipe_of(train={"epochs": 1, "learning_rate": 4.0e-3})
        results.append(orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / name).result["metrics"])
    assert asked[0] - asked[1] == 3
    assert results[0] == results[1]


def test_frozen_blocks_of_pairs_are_computed_each_time_and_that_is_said(
    recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_of(transfer={"freeze": 1}, train={"epochs": 2})
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    assert any("an example is several texts" in note for note in run.notes)
