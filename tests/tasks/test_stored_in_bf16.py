"""Sources that are stored in bf16, trained in bf16: loaded as they are, they learn what they would from fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import orchestrator
from orchestrator.cli.main import main
from orchestrator.errors import InputError
from orchestrator.inference.merge import changed_layers, merging_each_layer
from orchestrator.inference.merge import export as export_model
from orchestrator.inference.predict import evaluate
from orchestrator.inference.trained_model import PrecisionChoice, load_adapter, load_base, load_trained_model
from orchestrator.models import find_source, load_config
from orchestrator.models.load import is_stored_in_bf16
from orchestrator.training import export
from orchestrator.training import session as sessions
from orchestrator.training.assembling import assemble
from orchestrator.training.engine import weight_formats
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
LORA = {"type": "lora", "r": 4}
WANTED: tuple[PrecisionChoice, ...] = ("auto", "fp32", "bf16")


@pytest.fixture(scope="session")
def narrow_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("narrow-llama")
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def run(recipe: Path, folder: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """All that is measured, and the weights that are left."""
    done = orchestrator.train(orchestrator.load_recipe(recipe), folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]
    (weights,) = (folder / "model").glob("*.safetensors")
    return [*scores, done.result["before"], done.result["metrics"]], load_file(weights)


@pytest.mark.parametrize(
    "sections",
    [
        {"transfer": {"adapter": LORA}},
        {"transfer": {"freeze": 2}},
        {"transfer": {"freeze": 1, "adapter": {**LORA, "modules_to_save": ["lm_head"]}}},
        {"transfer": {"freeze": 0}},
        {"transfer": {"adapter": LORA}, "scale": {"zero_stage": 2}},
        {"transfer": {"adapter": {**LORA, "init": "pissa"}}},
        {"transfer": {"adapter": {**LORA, "variant": "dora"}}},
    ],
    ids=["LoRA", "last blocks", "LoRA and output layer", "full", "LoRA, ZeRO-2", "PiSSA", "DoRA"],
)
def test_a_run_is_the_same_to_the_bit_as_from_weights_in_fp32(
    write: WriteRecipe, narrow_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    recipe = write(
        source={"model": str(narrow_llama)},
        train={"epochs": 2, "learning_rate": 1.0e-2, "precision": "bf16", "log_every": 1},
        **sections,
    )
    found, weights = run(recipe, tmp_path / "as stored")
    for module in (sessions, export):
        monkeypatch.setattr(module, "may_load_as_stored", lambda *_: False)
    expected, others = run(recipe, tmp_path / "in fp32")
    assert found == expected
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_weights_lie_in_memory_as_they_are_stored(write: WriteRecipe, narrow_llama: Path) -> None:
    recipe = orchestrator.load_recipe(write(source={"model": str(narrow_llama)}, transfer={"adapter": LORA}))
    assert weight_formats.may_load_as_stored(recipe, "bf16")
    assert not weight_formats.may_load_as_stored(recipe, "fp32")
    parts = assemble(prepare(recipe), as_stored=True)
    held = {name: value.dtype for name, value in parts.module.named_parameters()}
    assert {dtype for name, dtype in held.items() if "lora" in name} == {torch.float32}
    assert {dtype for name, dtype in held.items() if "lora" not in name} == {torch.bfloat16}


def test_a_config_that_says_bf16_of_weights_in_fp32_is_not_believed(
    write: WriteRecipe, tiny_llama: Path, narrow_llama: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "dtype": "bfloat16"}), encoding="utf-8")
    for folder, is_narrow in ((tmp_path, False), (narrow_llama, True), (tiny_llama, False)):
        source = find_source(orchestrator.load_recipe(write(source={"model": str(folder)})))
        assert is_stored_in_bf16(source, load_config(source)) == is_narrow


@pytest.mark.parametrize("transfer", [{"adapter": LORA}, {"freeze": 2}], ids=["LoRA", "last blocks"])
def test_a_trained_model_is_used_in_the_precision_that_is_asked_for(
    write: WriteRecipe, narrow_llama: Path, tmp_path: Path, transfer: dict[str, Any]
) -> None:
    recipe = write(
        source={"model": str(narrow_llama)},
        transfer=transfer,
        train={"epochs": 1, "learning_rate": 1.0e-2, "precision": "bf16"},
    )
    done = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    expected = done.result["metrics"]["test"]["nll"]
    scores = {wanted: evaluate(tmp_path / "run", None, "test", precision=wanted)["metrics"] for wanted in WANTED}
    # A model that was trained whole is written in bf16 too, which rounds its norms.
    assert scores["bf16"]["nll"] == pytest.approx(expected, rel=1e-5 if "adapter" in transfer else 1e-4)
    assert scores["fp32"]["nll"] == pytest.approx(expected, rel=1e-2)
    assert scores["fp32"]["nll"] != scores["bf16"]["nll"]
    assert scores["auto"] == scores["fp32"]  # There is no GPU.
    trained = load_trained_model(tmp_path / "run", "bf16")
    multiplying = [part.weight.dtype for part in trained.model.modules() if isinstance(part, torch.nn.Linear)]
    assert set(multiplying) == {torch.bfloat16}
    # What it writes goes the same way.
    (answer,) = trained.task.generate(trained.model, trained.processor, trained_examples(recipe), 4)["prediction"][:1]
    assert isinstance(answer, str)


def trained_examples(recipe: Path) -> Any:
    return prepare(orchestrator.load_recipe(recipe)).examples["test"].slice(0, 1)


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        {**LORA, "modules_to_save": ["lm_head"]},
        {**LORA, "variant": "dora"},
        {**LORA, "init": "pissa"},
        {**LORA, "quantize": "nf4"},
    ],
    ids=["LoRA", "LoRA and output layer", "DoRA", "PiSSA", "nf4"],
)
def test_an_adapter_is_merged_in_fp32_and_written_in_the_format_of_its_source(
    write: WriteRecipe, narrow_llama: Path, tmp_path: Path, adapter: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if "quantize" in adapter:
        pytest.importorskip("bitsandbytes")
    recipe = write(
        source={"model": str(narrow_llama)},
        transfer={"adapter": adapter},
        train={"epochs": 1, "learning_rate": 1.0e-2, "precision": "fp32"},
    )
    orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    # Peft's own sum, in fp32, and all of it.
    wide = load_trained_model(tmp_path / "run", "fp32", as_stored=False)
    for layer in changed_layers(wide.model.get_base_model()).values():
        assert all(value.dtype != torch.bfloat16 for value in layer.parameters())
    if "quantize" in adapter:
        base, _ = load_base(wide.folder, wide.description, wide.task.auto_class)
        wide.model = load_adapter(base.dequantize(torch.float32), wide.folder)
    expected = wide.model.merge_and_unload().state_dict()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge"]) == 0
    assert "rounding changed outputs by up to" in capsys.readouterr().out
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "The adapter is merged; the weights are in bfloat16, as the source's; rounding changed" in card
    moved = export_model(tmp_path / "run", tmp_path / "again", merge=True)
    assert moved is not None
    assert 0 < moved < 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


def test_merging_holds_no_second_copy_in_fp32(write: WriteRecipe, narrow_llama: Path, tmp_path: Path) -> None:
    recipe = write(source={"model": str(narrow_llama)}, transfer={"adapter": LORA}, train={"steps": 3})
    orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    model = load_trained_model(tmp_path / "run", "fp32", torch.device("cpu"), as_stored=True).model
    assert {value.dtype for name, value in model.named_parameters() if "lora" not in name} == {torch.bfloat16}
    with merging_each_layer(model):
        assert {value.dtype for name, value in model.named_parameters() if "lora" not in name} == {torch.bfloat16}


def test_bf16_is_refused_where_the_hardware_lacks_it(
    write: WriteRecipe, narrow_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(source={"model": str(narrow_llama)}, train={"steps": 1, "precision": "fp32"})
    orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    monkeypatch.setattr("orchestrator.inference.trained_model.has_bf16", lambda _: False)
    with pytest.raises(InputError, match=r"does not compute bf16 in hardware(.|\n)*leave it out"):
        load_trained_model(tmp_path / "run", "bf16")
