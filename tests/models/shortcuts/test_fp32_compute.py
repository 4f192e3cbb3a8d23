"""Weights held in bf16 that compute in fp32: the numbers of a model that is held in fp32."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from orchestrator.models import Fp32ComputeMode, load_config, load_model, open_folder

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "t5": lambda: T5ForSequenceClassification(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
}
IDS = torch.tensor([[5, 2, 3, 7, 1]])


def narrow_and_wide(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    narrow = MODELS[name]().eval().bfloat16()
    return narrow, copy.deepcopy(narrow).float()


def answers(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    logits = model(input_ids=IDS).logits
    return logits, list(torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_bf16_computes_what_it_would_in_fp32(name: str) -> None:
    narrow, wide = narrow_and_wide(name)
    expected, gradients = answers(wide)
    assert not torch.equal(narrow(input_ids=IDS).logits.float(), expected)
    with Fp32ComputeMode():
        found, others = answers(narrow)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for mine, other in zip(others, gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:  # Rounded once for each of its uses.
            assert float((mine.float() - other).abs().max()) <= 2**-7 * float(other.abs().max())
    assert {value.dtype for value in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", MODELS)
def test_no_wide_copy_of_a_weight_waits_for_the_backward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, _ = narrow_and_wide(name)
    copies: list[StorageWeakRef] = []
    widen = Tensor.float

    def note(value: Tensor) -> Tensor:
        wide = widen(value)
        if isinstance(value, nn.Parameter):
            copies.append(StorageWeakRef(wide.untyped_storage()))
        return wide

    monkeypatch.setattr(Tensor, "float", note)
    with Fp32ComputeMode():
        logits = narrow(input_ids=IDS).logits
        assert len(copies) > 10
        assert all(copy.expired() for copy in copies)
        assert torch.autograd.grad(logits.sum(), list(narrow.parameters()), allow_unused=True)[0] is not None


def test_what_is_written_is_written_to_the_weights_themselves() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    with Fp32ComputeMode(), torch.no_grad():
        assert weight.dtype == torch.float32  # So it says.
        weight.mul_(torch.full((2, 2), 3.0))
        weight[0] = torch.zeros(2)
        weight += torch.ones(2, 2)
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [[1.0, 1.0], [4.0, 4.0]]


def write_adapter(model: Any, folder: Path) -> Path:
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8)])
def test_a_model_loaded_as_it_is_stored_is_the_one_that_is_loaded_in_fp32(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = open_folder(tmp_path, "here")
    wide, narrow = (
        load_model(source, "AutoModelForCausalLM", load_config(source), False, 0, as_stored=as_stored).model
        for as_stored in (False, True)
    )
    assert {value.dtype for value in narrow.parameters()} == {torch.bfloat16}
    # What an adapter adds must not be rounded.
    on_adapter = replace(source, adapter=str(write_adapter(wide, tmp_path / "adapter")))
    summed = load_model(on_adapter, "AutoModelForCausalLM", load_config(source), False, 0, as_stored=True).model
    assert {value.dtype for value in summed.parameters()} == {torch.float32}
    for (name, value), other in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(value.float(), other), name
    # Also those that bf16 would have rounded when the model was made.
    for (name, value), other in zip(narrow.named_buffers(), wide.buffers(), strict=True):
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name
