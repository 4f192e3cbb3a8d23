"""Adapters that begin elsewhere than at zero: on another adapter, and with what they take out of the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import InputError, RunFailed
from orchestrator.inference.merge import export
from orchestrator.inference.predict import evaluate
from orchestrator.training.assembling import assemble
from orchestrator.training.export import refuse_untrained
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
LORA = {"type": "lora", "r": 4}
TRAIN = {"epochs": 1, "learning_rate": 1.0e-2, "precision": "fp32"}
IDS = torch.tensor([[5, 60, 7, 8, 90, 10]])


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chats: Path) -> Any:
    """A LoRA on the tiny Llama."""
    folder = tmp_path_factory.mktemp("first")
    text = f"""
name: first
source: {{model: {tiny_llama}}}
target: {{task: causal-lm, data: {chats}, options: {{max_length: 512}}}}
transfer: {{adapter: {{type: lora, r: 4, variant: rslora}}}}
train: {{epochs: 1, learning_rate: 1.0e-2, precision: fp32}}
"""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return orchestrator.train(orchestrator.load_recipe(folder / "recipe.yaml"), folder / "run")


def train_on(model: Path, write: WriteRecipe, folder: Path, adapter: dict[str, Any] | None, **sections: Any) -> Any:
    transfer = {} if adapter is None else {"adapter": adapter}
    recipe = write(source={"model": str(model)}, transfer=transfer, train=TRAIN, **sections)
    return orchestrator.train(orchestrator.load_recipe(recipe), folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_an_adapter_goes_on_from_an_adapter_and_says_both(first_run: Any, write: WriteRecipe, tmp_path: Path) -> None:
    source = first_run.directory / "model"
    run = train_on(source, write, tmp_path / "run", {**LORA, "r": 2, "targets": ["q_proj", "up_proj"]})
    reached = first_run.result["metrics"]["test"]["nll"]
    assert run.result["before"]["test"]["nll"] == pytest.approx(reached, rel=1e-5)
    assert run.result["metrics"]["test"]["nll"] < reached
    # Loaded by peft alone, onto the model that the first adapter was made for.
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run.directory / "model")
    ranks = {
        len(value)
        for key, value in load_file(run.directory / "model/adapter_model.safetensors").items()
        if "lora_A" in key
    }
    assert ranks == {4, 6}
    export(run.directory, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-5, rtol=1e-4)
    scored = evaluate(run.directory, None, "test")["metrics"]["nll"]
    assert scored == pytest.approx(run.result["metrics"]["test"]["nll"], rel=1e-5)
    # And once more.
    third = train_on(run.directory / "model", write, tmp_path / "third", LORA)
    assert third.result["before"]["test"]["nll"] == pytest.approx(scored, rel=1e-5)
    assert evaluate(third.directory, None, "test")["metrics"]["nll"] == pytest.approx(
        third.result["metrics"]["test"]["nll"], rel=1e-5
    )


def test_full_tuning_goes_on_from_an_adapter_too(first_run: Any, write: WriteRecipe, tmp_path: Path) -> None:
    run = train_on(first_run.directory / "model", write, tmp_path / "run", None)
    assert run.result["before"]["test"]["nll"] == pytest.approx(first_run.result["metrics"]["test"]["nll"], rel=1e-5)
    assert evaluate(run.directory, None, "test")["metrics"]["nll"] == pytest.approx(
        run.result["metrics"]["test"]["nll"], rel=1e-5
    )
    AutoModelForCausalLM.from_pretrained(run.directory / "model")


def test_preferences_are_held_against_the_model_with_the_first_adapter(
    first_run: Any, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rows = [{"prompt": f"is {n} a number?", "chosen": " yes" * (n % 3 + 1), "rejected": " no"} for n in range(60)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    target = {"task": "preference", "data": str(data), "options": {"max_length": 48}}
    source = {"model": str(first_run.directory / "model")}
    recipe = write_recipe(source=source, target=target, transfer={"adapter": LORA}, train=TRAIN)
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    assert run.result["before"]["test"]["margin"] == 0
    found = evaluate(run.directory, None, "test")["metrics"]
    assert found == pytest.approx(run.result["metrics"]["test"], rel=1e-4, abs=1e-6)
    assert found["margin"] != 0


def test_an_adapter_that_cannot_be_gone_on_from_is_refused(
    first_run: Any, write: WriteRecipe, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source = first_run.directory / "model"
    with pytest.raises(InputError, match=r"4 bits cannot hold[\s\S]*export --merge"):
        train_on(source, write, tmp_path / "run", {**LORA, "quantize": "nf4"})
    dora = train_on(tiny_of(source), write, tmp_path / "dora", {**LORA, "variant": "dora"})
    with pytest.raises(InputError, match=r"lora_magnitude_vector.*not a plain LoRA[\s\S]*export --merge"):
        train_on(dora.directory / "model", write, tmp_path / "run", LORA)
    lost = tmp_path / "lost"
    shutil.copytree(source, lost)
    config = json.loads((lost / "adapter_config.json").read_text(encoding="utf-8"))
    (lost / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(InputError, match=r"adapter_config.json.*recipe.yaml.*/nowhere does not exist"):
        train_on(lost, write, tmp_path / "run", LORA)
    (lost / "adapter_model.safetensors").write_bytes(b"0")
    with pytest.raises(InputError, match="damaged or cut short"):
        train_on(lost, write, tmp_path / "run", LORA)
    rows = "".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(80))
    (tmp_path / "labels.jsonl").write_text(rows, encoding="utf-8")
    labels = {"task": "text-classification", "data": str(tmp_path / "labels.jsonl")}
    with pytest.raises(InputError, match=r"only language models go on from one[\s\S]*export --merge"):
        prepared = prepare(orchestrator.load_recipe(write_recipe(source={"model": str(source)}, target=labels)))
        assemble(prepared)
    assert not (tmp_path / "run").exists()


def tiny_of(adapter: Path) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return Path(config["base_model_name_or_path"])


def test_a_run_is_not_resumed_on_another_adapter(first_run: Any, write: WriteRecipe, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(first_run.directory / "model", copied)
    train_on(copied, write, tmp_path / "run", LORA)
    config = json.loads((copied / "adapter_config.json").read_text(encoding="utf-8"))
    (copied / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    with pytest.raises(InputError, match="source"):
        train_on(copied, write, tmp_path / "run", LORA)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_an_adapter_begins_with_the_principal_parts_of_the_weights(
    variant: str, write: WriteRecipe, tmp_path: Path, tiny_llama: Path
) -> None:
    zero = train_on(tiny_llama, write, tmp_path / "zero", {**LORA, "variant": variant})
    run = train_on(tiny_llama, write, tmp_path / "run", {**LORA, "variant": variant, "init": "pissa"})
    assert run.result["before"]["test"]["nll"] == pytest.approx(zero.result["before"]["test"]["nll"], rel=1e-5)
    assert run.result["metrics"]["test"]["nll"] < run.result["before"]["test"]["nll"] - 0.1
    assert run.result["metrics"]["test"]["nll"] != pytest.approx(zero.result["metrics"]["test"]["nll"], rel=1e-3)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run.directory / "model")
    assert loaded.peft_config["default"].r == 8
    export(run.directory, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-5, rtol=1e-4)
    scored = evaluate(run.directory, None, "test")["metrics"]["nll"]
    assert scored == pytest.approx(run.result["metrics"]["test"]["nll"], rel=1e-5)
    # One goes on from it as from any other.
    after = train_on(run.directory / "model", write, tmp_path / "after", {**LORA, "init": "pissa"})
    assert after.result["before"]["test"]["nll"] == pytest.approx(scored, rel=1e-5)


def test_principal_parts_that_learned_nothing_are_not_written(write: WriteRecipe) -> None:
    recipe = orchestrator.load_recipe(write(transfer={"adapter": {**LORA, "init": "pissa"}}))
    parts = assemble(prepare(recipe))
    with pytest.raises(RunFailed, match="the adapter is as it was before training"):
        refuse_untrained(parts, dict(parts.module.named_parameters()))
    for name, weight in parts.module.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    refuse_untrained(parts, dict(parts.module.named_parameters()))
