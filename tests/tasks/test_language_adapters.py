"""Adapters on language models: weights in 4 bits, modules trained whole, merging, and what is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import orchestrator
from orchestrator.errors import InputError, RunFailed
from orchestrator.inference.merge import export
from orchestrator.inference.predict import evaluate
from orchestrator.inference.trained_model import load_trained_model
from orchestrator.models import quantized_layers
from orchestrator.training.assembling import assemble
from orchestrator.training.export import refuse_untrained
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
LORA = {"type": "lora", "r": 4}
IDS = torch.tensor([[5, 60, 7, 8, 90, 10]])


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama with one matrix for its embeddings and its output layer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tied-llama")
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def train(write: WriteRecipe, folder: Path, adapter: dict[str, Any], **sections: Any) -> Any:
    sections = {"train": {"epochs": 1, "learning_rate": 1.0e-2}, **sections}
    recipe = write(transfer={"adapter": {**LORA, **adapter}, **sections.pop("transfer", {})}, **sections)
    return orchestrator.train(orchestrator.load_recipe(recipe), folder)


def test_an_adapter_learns_on_weights_in_4_bits_and_merges(write: WriteRecipe, tmp_path: Path) -> None:
    run = train(write, tmp_path / "run", {"quantize": "nf4"})
    before, after = run.result["before"]["test"]["nll"], run.result["metrics"]["test"]["nll"]
    assert after < before - 0.1
    # A model of that size has 4-bit weights at their full number.
    plain = train(write, tmp_path / "plain", {})
    assert run.result["parameters"] == plain.result["parameters"]
    scored = evaluate(run.directory, None, "test")["metrics"]["nll"]
    assert scored == pytest.approx(after, rel=1e-4)
    export(run.directory, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    trained = load_trained_model(run.directory)
    assert quantized_layers(trained.model)
    with torch.no_grad():
        expected, found = trained.model(IDS).logits, merged(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_body_is_in_4_bits_and_the_head_is_whole(write: WriteRecipe) -> None:
    recipe = write(transfer={"freeze": 1, "adapter": {**LORA, "quantize": "nf4"}})
    module = assemble(prepare(orchestrator.load_recipe(recipe))).module.get_base_model()
    small = quantized_layers(module)
    assert len(small) == 3 * 7
    assert not any("lm_head" in name or "embed" in name for name in small)


def test_a_classifier_is_put_on_weights_in_4_bits(write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        source={"model": str(tiny_bert)},
        transfer={"freeze": 1, "adapter": {**LORA, "quantize": "nf4"}},
        train={"epochs": 12, "learning_rate": 1.0e-2},
    )
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    assert run.result["metrics"]["test"]["accuracy"] > 0.45
    scored = evaluate(run.directory, None, "test")["metrics"]
    assert scored["loss"] == pytest.approx(run.result["metrics"]["test"]["loss"], rel=1e-5)


def test_stored_features_of_weights_in_4_bits_are_their_own(write: WriteRecipe, tmp_path: Path) -> None:
    losses = {}
    for quantize in (None, "nf4"):
        for cached in (True, False):
            run = train(
                write,
                tmp_path / f"{quantize}-{cached}",
                {"quantize": quantize},
                transfer={"freeze": 2},
                train={"epochs": 2, "cache_prefix": cached, "log_every": 1, "learning_rate": 1.0e-2},
            )
            rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
            losses[quantize, cached] = [row["loss"] for row in rows if row["split"] == "train"]
    for quantize in (None, "nf4"):
        assert losses[quantize, True] == pytest.approx(losses[quantize, False], rel=1e-6)
    assert losses["nf4", True] != pytest.approx(losses[None, True], rel=1e-4)


def test_4_bits_are_refused_where_they_cannot_be(write: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = {"adapter": {**LORA, "quantize": "nf4"}}
    with pytest.raises(InputError, match="zero_stage` 3 cannot spread 4-bit weights"):
        orchestrator.load_recipe(write(transfer=quantized, scale={"zero_stage": 3}))
    monkeypatch.setattr("orchestrator.models.quantize.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bitsandbytes, which is not installed[\s\S]*transfer-orchestrator\[quant\]"):
        orchestrator.train(orchestrator.load_recipe(write(transfer=quantized)), Path("never"))


@pytest.mark.parametrize("tied", [False, True])
def test_modules_are_trained_whole_beside_the_adapter(
    tied: bool, write: WriteRecipe, tmp_path: Path, tiny_llama: Path, tied_llama: Path
) -> None:
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    source = tied_llama if tied else tiny_llama
    run = train(write, tmp_path / "run", {"modules_to_save": names}, source={"model": str(source)})
    start = load_file(source / "model.safetensors")
    saved = load_file(run.directory / "model" / "adapter_model.safetensors")
    for name in names:
        (kept,) = (value for key, value in saved.items() if name in key)
        (old,) = (value for key, value in start.items() if name in key)
        assert not torch.equal(kept, old)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run.directory / "model").eval()
    export(run.directory, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    scored = evaluate(run.directory, None, "test")["metrics"]["nll"]
    assert scored == pytest.approx(run.result["metrics"]["test"]["nll"], rel=1e-4)
    # The output layer learned as itself: its copy is what the losses came from.
    assert run.result["metrics"]["test"]["nll"] < run.result["before"]["test"]["nll"] - 0.3


@pytest.mark.parametrize(
    ("adapter", "freeze", "words"),
    [
        ({"modules_to_save": ["embed_token"]}, 0, "'embed_token' matches no module[\\s\\S]*did you mean embed_tokens"),
        ({"modules_to_save": ["embed_tokens"]}, 1, "'embed_tokens' matches no module above the freeze boundary"),
        ({"modules_to_save": ["q_proj"], "targets": ["q_proj"]}, 0, "is in `transfer.adapter.targets` and in"),
        ({"modules_to_save": ["norm", "norm"]}, 0, "names 'norm' 2 times"),
        ({"targets": ["q_proj", "qproj"]}, 0, "'qproj' matches no linear module"),
    ],
)
def test_names_that_fit_no_module_are_refused(
    adapter: dict[str, Any], freeze: int, words: str, write: WriteRecipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        train(write, tmp_path / "run", adapter, transfer={"freeze": freeze})
    assert not (tmp_path / "run").exists()


def test_all_linear_leaves_out_what_is_trained_whole(write: WriteRecipe) -> None:
    recipe = write(transfer={"adapter": {**LORA, "modules_to_save": ["o_proj"]}})
    module = assemble(prepare(orchestrator.load_recipe(recipe))).module
    assert not any("o_proj.lora_A" in name for name, _ in module.named_parameters())
    assert sum("o_proj.modules_to_save" in name for name, _ in module.named_parameters()) == 3


def test_an_adapter_that_learned_nothing_is_not_written(write: WriteRecipe) -> None:
    parts = assemble(prepare(orchestrator.load_recipe(write(transfer={"adapter": LORA}))))
    with pytest.raises(RunFailed, match="the adapter is as it was before training, so no model was written"):
        refuse_untrained(parts, dict(parts.module.named_parameters()))
    for name, weight in parts.module.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    refuse_untrained(parts, dict(parts.module.named_parameters()))


def test_a_merge_that_changes_what_is_computed_is_not_written(
    write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(write, tmp_path / "run", {})
    merge = BaseTuner.merge_and_unload

    def forget(self: Any) -> Any:
        merged = merge(self)
        merged.model.layers[0].self_attn.q_proj.weight.data += 0.1
        return merged

    monkeypatch.setattr(BaseTuner, "merge_and_unload", forget)
    with pytest.raises(RunFailed, match="with the adapter merged, the model's outputs differ"):
        export(run.directory, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
