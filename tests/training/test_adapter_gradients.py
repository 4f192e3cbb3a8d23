"""What gets no gradient is told at the first step; only a training in which nothing does is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from orchestrator import load_recipe, train
from orchestrator.errors import RunFailed
from orchestrator.training.adapter_gradients import AdapterGradients
from orchestrator.training.hooks import TrainingState
from orchestrator.training.loop import Step

WriteRecipe = Callable[..., Path]


class Experts(nn.Module):
    """Two linear experts, of which the second reads nothing unless it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor, second: bool = False) -> Tensor:
        found: Tensor = self.second(inputs) if second else self.first(inputs)
        return found


class Alone:
    """An engine of one worker, as far as it is asked."""

    rank, device = 0, torch.device("cpu")

    def sum_over_workers(self, value: Tensor) -> Tensor:
        return value

    def run_on_first_worker(self, action: Callable[[], None]) -> None:
        action()


def step(loss: float, norm: float) -> Step:
    return Step(number=1, epoch=0.1, loss=loss, gradient_norm=norm, learning_rate=0.1, num_examples=1)


@pytest.fixture
def watched() -> tuple[Any, AdapterGradients, list[str]]:
    model = peft.get_peft_model(Experts(), peft.LoraConfig(target_modules=["first", "second"], r=2))
    notes: list[str] = []
    return model, AdapterGradients(Alone(), model, notes.append), notes  # type: ignore[arg-type]


def test_modules_without_a_gradient_are_told_once(watched: tuple[Any, AdapterGradients, list[str]]) -> None:
    model, reached, notes = watched
    reached.after_step(step(0.0, 0.0), TrainingState())  # A batch without anything to learn decides nothing.
    assert notes == []
    for _ in range(2):
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        reached.after_step(step(float(loss.detach()), 1.0), TrainingState())
    (note,) = notes
    assert "1 of the 2 modules" in note
    assert "(second)" in note


def test_a_gradient_of_any_pass_counts(watched: tuple[Any, AdapterGradients, list[str]]) -> None:
    model, reached, notes = watched
    for second in (False, True):
        model(torch.ones(1, 4), second=second).sum().backward()
    reached.after_step(step(1.0, 1.0), TrainingState())
    assert notes == []


def test_a_training_in_which_nothing_gets_a_gradient_is_refused(
    watched: tuple[Any, AdapterGradients, list[str]],
) -> None:
    _, reached, _ = watched
    with pytest.raises(RunFailed, match="no trained parameter gets a gradient"):
        reached.after_step(step(1.0, 0.0), TrainingState())


@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_that_get_no_gradient_by_design_destroy_no_training(
    stage: int, write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path
) -> None:
    # The head reads the first token alone, which in the last layer goes through the projections of global attention.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    config = transformers.LongformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        attention_window=[8, 8],
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LongformerForMaskedLM(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    recipe = write_recipe(
        source={"model": str(tmp_path / "source")},
        transfer={"adapter": {"type": "lora", "r": 2}},
        train={"steps": 3},
        scale={"zero_stage": stage},
    )
    run = train(load_recipe(recipe), tmp_path / "run")
    (note,) = [note for note in run.notes if "no gradient" in note]
    assert "3 of the" in note
    assert "encoder.layer.1.attention.self.query" in note
    assert json.loads((run.directory / "result.json").read_text())["status"] == "finished"
    assert (run.directory / "model" / "adapter_model.safetensors").exists()
