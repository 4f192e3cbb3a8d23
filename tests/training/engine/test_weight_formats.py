"""Frozen weights held in bf16: nothing that the model computes changes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import orchestrator
from orchestrator.inference.trained_model import prepare_for_inference
from orchestrator.models import quantized_layers
from orchestrator.recipe import parse_recipe
from orchestrator.training.assembling import assemble
from orchestrator.training.engine.build import build_engine
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16
from orchestrator.training.prepare import prepare

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
IDS = {"input_ids": torch.tensor([[1, 2, 3, 1, 7]])}
MODELS: dict[str, Any] = {
    "llama": lambda: Llama(LlamaConfig(**SIZES)),
    "llama, tied": lambda: Llama(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=16)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]().eval()
    for number, parameter in enumerate(model.parameters()):
        # Away from what initialisation leaves at 0 and 1; the first half is frozen.
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(number > len(list(model.parameters())) // 2)
    return model


def test_what_stays_in_fp32_does_not_keep_the_file_that_it_was_read_from(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    model = Llama.from_pretrained(tmp_path)
    model.requires_grad_(False)
    maps = Path("/proc/self/maps")
    is_mapped = str(tmp_path) in maps.read_text()
    cast_frozen_to_bf16(model)
    gc.collect()
    assert str(tmp_path) not in maps.read_text(), f"it was mapped before: {is_mapped}"


def answers(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**IDS).logits.float()
    logits.square().sum().backward()
    return logits.detach(), [value.grad.clone() for value in model.parameters() if value.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_stored_in_bf16", [False, True])
def test_outputs_and_gradients_stay_the_same_to_the_bit(name: str, is_stored_in_bf16: bool) -> None:
    model = build(name)
    if is_stored_in_bf16:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    expected, gradients = answers(model)
    assert cast_frozen_to_bf16(model) != is_stored_in_bf16  # Whether digits were lost.
    narrow = [value for value in model.parameters() if value.dtype == torch.bfloat16]
    assert narrow
    assert not any(value.requires_grad for value in narrow)
    found, others = answers(model)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_an_embedding_follows_only_where_it_loses_nothing() -> None:
    for is_stored_in_bf16 in (False, True):
        model = build("llama")
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        if is_stored_in_bf16:
            weight.data = weight.data.bfloat16().float()
        cast_frozen_to_bf16(model)
        assert weight.dtype == (torch.bfloat16 if is_stored_in_bf16 else torch.float32)


@pytest.mark.parametrize(
    ("transfer", "is_narrow", "is_rebuilt"),
    [
        ({"freeze": "stem"}, True, True),
        ({"adapter": {"type": "lora"}}, True, False),
        ({"adapter": {"type": "lora", "variant": "dora"}}, False, False),
    ],
)
def test_engines_hold_frozen_weights_so_but_not_under_dora(
    transfer: dict[str, Any], is_narrow: bool, is_rebuilt: bool
) -> None:
    recipe = parse_recipe(
        f"name: a\nsource: {{model: ./m}}\ntarget: {{task: causal-lm, data: ./d}}\ntransfer: {transfer}".replace(
            "'", ""
        )
    )
    model = build("llama")
    groups = [{"params": [value for value in model.parameters() if value.requires_grad], "lr": 0.1, "initial_lr": 0.1}]
    with build_engine(model, groups, recipe, "bf16") as engine:
        assert any(value.dtype == torch.bfloat16 for value in model.parameters()) == is_narrow
        assert engine.rounds_weights == is_rebuilt
    with build_engine(
        build("llama"), [{**groups[0], "params": [nn.Parameter(torch.zeros(1))]}], recipe, "fp32"
    ) as engine:
        assert all(value.dtype == torch.float32 for value in engine.module.parameters())


# Each engine with each variant and precision; the other task, whose layers are the same, with PyTorch and in inference.
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("task", "variant", "scale"),
    [
        *(
            ("causal-lm", variant, scale)
            for variant in ("lora", "dora")
            for scale in (
                {"engine": "torch"},
                *({"engine": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)),
                None,
            )
        ),
        ("text-classification", "lora", {"engine": "torch"}),
        ("text-classification", "lora", None),
    ],
)
def test_weights_in_4_bits_are_multiplied_in_the_precision_of_the_run(
    task: str,
    variant: str,
    precision: Any,
    scale: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
    small_data: Path,
    tiny_bert: Path,
    tiny_gpt2: Path,
) -> None:
    """In training with each engine, and in inference (`scale` is None)."""
    source = tiny_bert if task == "text-classification" else tiny_gpt2
    adapter = {"type": "lora", "r": 2, "quantize": "nf4"} | ({"variant": "dora"} if variant == "dora" else {})
    recipe = orchestrator.load_recipe(
        write_recipe(
            source={"model": str(source)},
            target={"task": task, "data": str(small_data), "options": {"max_length": 32}},
            transfer={"adapter": adapter},
            train={"precision": precision},
            scale=scale or {},
        )
    )
    parts = assemble(prepare(recipe))
    formats = []
    multiply = bitsandbytes.matmul_4bit

    def record(given: Tensor, *others: Any, **named: Any) -> Tensor:
        formats.append(given.dtype)
        return multiply(given, *others, **named)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", record)
    if scale is None:
        prepare_for_inference(parts.module, recipe, precision, torch.device("cpu"))(**IDS)
    else:
        with build_engine(parts.module, parts.groups, recipe, precision) as engine:
            engine.model(**IDS)
    assert len(formats) == len(quantized_layers(parts.module))
    assert set(formats) == {torch.bfloat16 if precision == "bf16" else torch.float32}
