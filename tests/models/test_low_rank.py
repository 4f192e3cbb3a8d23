"""Low-rank changes: what an adapter says is what it adds, alone and together with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from orchestrator.errors import ModelError
from orchestrator.models.low_rank import add_lora_deltas, extend_adapter, init_pissa, read_lora_deltas

IDS = torch.tensor([[3, 9, 4, 1, 22]])
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
OTHER_TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_fc", "c_proj"]}


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24)).eval()


def adapt(name: str, model: Any, seed: int, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=targets, fan_in_fan_out=name == "gpt2", **options)
    wrapped = peft.get_peft_model(model, config).eval()
    for key, value in wrapped.named_parameters():
        if "lora_" in key:
            value.data = 0.2 * torch.randn_like(value)
    return wrapped


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("options", [{"r": 4, "lora_alpha": 6}, {"r": 3, "lora_alpha": 5, "use_rslora": True}])
def test_added_changes_compute_what_the_adapter_does(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    adapted = adapt(name, build(name), 1, TARGETS[name], **options)
    adapted.save_pretrained(tmp_path)
    plain = build(name)
    before = logits(plain)
    add_lora_deltas(plain, read_lora_deltas(tmp_path), "here")
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(plain), before, atol=1e-2)


@pytest.mark.parametrize("name", TARGETS)
def test_an_extended_adapter_is_the_sum_of_its_parts(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    adapt(name, build(name), 1, TARGETS[name], r=4, lora_alpha=6).save_pretrained(first)
    adapt(name, build(name), 2, OTHER_TARGETS[name], r=3, lora_alpha=5, use_rslora=True).save_pretrained(second)
    both = build(name)
    for folder in (first, second):
        add_lora_deltas(both, read_lora_deltas(folder), "here")
    # Modules that both change have rank 7, others 4 or 3.
    extend_adapter(second, [read_lora_deltas(first)])
    loaded = peft.PeftModel.from_pretrained(build(name), second).eval()
    torch.testing.assert_close(logits(loaded), logits(both), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(both), rtol=1e-5, atol=1e-6)
    again = build(name)
    add_lora_deltas(again, read_lora_deltas(second), "here")
    torch.testing.assert_close(logits(again), logits(both), rtol=1e-5, atol=1e-6)


def test_changes_of_another_model_are_refused(tmp_path: Path) -> None:
    adapt("llama", build("llama"), 1, TARGETS["llama"], r=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"changes model\.layers\.0.*, but its model lacks it"):
        add_lora_deltas(build("gpt2"), read_lora_deltas(tmp_path), "here")
    wider = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    with pytest.raises(ModelError, match=r"of shape \(16, 24\), but its model has it as \(32, 24\)"):
        add_lora_deltas(wider, read_lora_deltas(tmp_path), "here")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rank", [3, 40])
def test_principal_parts_are_taken_out_of_the_weights_and_nothing_else_changes(name: str, rank: int) -> None:
    plain = build(name)
    singular = {
        key: torch.linalg.svdvals(module.weight.detach()) for key, module in plain.named_modules() if is_linear(module)
    }
    expected = logits(plain)
    model = adapt(name, build(name), 1, TARGETS[name], r=rank, lora_alpha=7)
    initial_factors = init_pissa(model)
    assert len(initial_factors) == sum(name.endswith("lora_A") for name, _ in model.named_modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    for key, (first, second) in initial_factors.items():
        assert first.shape[0] == second.shape[1] == rank
        left = model.get_base_model().get_submodule(key).base_layer.weight
        # What is left has the smaller singular values alone.
        largest = float(torch.linalg.svdvals(left.detach())[0])
        values = singular[key]
        assert largest == pytest.approx(float(values[rank]) if rank < len(values) else 0.0, abs=1e-4)


def is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def test_the_decomposition_is_the_same_when_made_again() -> None:
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            model = adapt("llama", build("llama"), 1, TARGETS["llama"], r=3)
            torch.manual_seed(4)
            found.append(init_pissa(model))
        finally:
            torch.set_num_threads(before)
    for name, parts in found[0].items():
        assert all(torch.equal(one, other) for one, other in zip(parts, found[1][name], strict=True))
