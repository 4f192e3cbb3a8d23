"""A head that reads one position: found without names, and the last layer computes no more than that position needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_families import (
    LENGTHS,
    Family,
    agree,
    all_agree,
    gradients_of,
    make,
    make_inputs,
    make_texts,
    turn_dropout_off,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models import (
    TokenPooling,
    adapted_blocks,
    add_adapter,
    find_token_pooling,
    freeze_blocks,
    pool_in_last_layer,
    resolve_depth,
)
from orchestrator.recipe import Adapter

READ = {
    "bert": "first",
    "roberta": "first",
    "distilbert": "first",
    "electra": "first",
    "deberta": "first",
    "deberta-first-version": "first",
    "modernbert": "first",
    "xlm": "first",
    "gpt2": "last",
    "llama": "last",
    "qwen3": "last",
    "bart": "last",
    "vit": "first",
    "mobilenet": None,
    "resnet": None,
    "swin": None,
    "squeezebert": None,
    "xlnet": None,
}
# Layers that are shared, or spread over parallel lists, are left as they are.
LEFT_AS_THEY_ARE = ("xlm",)
POOLED = [name for name, position in READ.items() if position is not None and name not in LEFT_AS_THEY_ARE]


def pooling_of(family: Family) -> TokenPooling:
    pooling = find_token_pooling(family.model, family.blocks, family.inputs)
    assert pooling is not None
    return pooling


def has_been_changed(model: nn.Module) -> bool:
    replaced = any("forward" in vars(module) for module in model.modules())
    return replaced or any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", READ)
def test_the_position_that_the_head_reads_is_found(name: str) -> None:
    family = make(name)
    pooling = find_token_pooling(family.model, family.blocks, family.inputs)
    assert (pooling.position if pooling else None) == READ[name]
    assert not has_been_changed(family.model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mobilenet"])
def test_finding_it_leaves_modes_gradients_and_random_streams_as_they_were(name: str) -> None:
    family = make(name)
    family.model.train()
    modes = [module.training for module in family.model.modules()]
    before = torch.random.get_rng_state()
    pooling = find_token_pooling(family.model, family.blocks, family.inputs)
    if pooling is not None:
        pool_in_last_layer(family.model, family.blocks, family.inputs, pooling)
    assert [module.training for module in family.model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in family.model.parameters())


def test_a_head_that_reads_the_mean_of_all_positions_has_none() -> None:
    family = make("modernbert", classifier_pooling="mean")
    assert find_token_pooling(family.model, family.blocks, family.inputs) is None


def test_texts_of_a_single_token_tell_nothing() -> None:
    family = make("bert")
    assert find_token_pooling(family.model, family.blocks, make_texts((1, 1))) is None


def test_the_last_position_is_each_texts_own() -> None:
    pooling = pooling_of(make("gpt2"))
    pooling.locate_last_tokens(make_texts(LENGTHS))
    values = torch.arange(9.0).expand(4, 9)[..., None]
    assert pooling.select(values * torch.ones(4, 9, 1)).flatten().tolist() == [length - 1 for length in LENGTHS]
    heads = torch.arange(9.0).view(1, 1, 9, 1) * torch.ones(4, 2, 9, 1)
    assert pooling.select(heads, dim=2).shape == (4, 2, 1, 1)
    assert pooling.select(heads, dim=2)[:, 0].flatten().tolist() == [length - 1 for length in LENGTHS]
    pooling.locate_last_tokens({"input_ids": torch.ones(2, 5, dtype=torch.long)})
    assert pooling.select(torch.arange(5.0).view(1, 5, 1) * torch.ones(2, 5, 1)).flatten().tolist() == [4, 4]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", POOLED)
def test_logits_and_gradients_stay_when_the_last_layer_computes_one_position(name: str, checkpointing: bool) -> None:
    family = make(name)
    turn_dropout_off(family.model)
    freeze_blocks(family.model, family.blocks, resolve_depth(1, family.num_layers))
    if checkpointing:
        family.model.gradient_checkpointing_enable({"use_reentrant": False})
    reference = copy.deepcopy(family.model).train()
    assert pool_in_last_layer(family.model, family.blocks, family.inputs, pooling_of(family))
    family.model.train()
    # Other texts than those that it was tried out on, one after the other: nothing of one may reach the next.
    for lengths in (LENGTHS, (3, 5), (6, 6, 2)):
        inputs = make_inputs(name, lengths)
        logits, gradients = gradients_of(family.model, inputs)
        expected_logits, expected = gradients_of(reference, inputs)
        assert agree(logits, expected_logits)
        assert len(expected) > 10
        assert all_agree(gradients, expected)
        family.model.eval()
        assert agree(family.model(**inputs).logits, logits)
        family.model.train()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_adapters_that_do_nothing_yet_are_not_taken_for_parts_that_matter_nowhere(name: str) -> None:
    family = make(name)
    turn_dropout_off(family.model)
    depth = resolve_depth(1, family.num_layers)
    freeze_blocks(family.model, family.blocks, depth)
    model = add_adapter(family.model, family.blocks, depth, Adapter(type="lora", r=2, dropout=0.0))
    blocks = adapted_blocks(model, family.blocks)
    reference = copy.deepcopy(model).train()
    pooling = find_token_pooling(model, blocks, family.inputs)
    assert pooling is not None
    assert pool_in_last_layer(model, blocks, family.inputs, pooling)
    model.train()
    # Their second matrices begin as zeros; this is what they may have learned.
    generator = torch.Generator().manual_seed(3)
    for (path, value), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if "lora_B" in path:
            value.data.normal_(0.0, 0.1, generator=generator)
            other.data.copy_(value)
    logits, gradients = gradients_of(model, family.inputs)
    expected_logits, expected = gradients_of(reference, family.inputs)
    assert agree(logits, expected_logits)
    assert all_agree(gradients, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_batch_without_a_mask_is_read_to_its_end(name: str) -> None:
    family = make(name)
    reference = copy.deepcopy(family.model)
    assert pool_in_last_layer(family.model, family.blocks, family.inputs, pooling_of(family))
    family.model(**family.inputs)
    ids = {"input_ids": torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(2))}
    assert agree(family.model(**ids).logits, reference(**ids).logits)


def flops_of(layer: nn.Module, family: Family) -> int:
    """Floating-point operations of a layer in a forward pass."""
    (name,) = [name for name, module in family.model.named_modules() if module is layer]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        family.model(**family.inputs)
    (found,) = [counts for path, counts in counter.get_flop_counts().items() if path.partition(".")[2] == name]
    return sum(found.values())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "qwen3", "vit"])
def test_the_last_layer_computes_little_more_than_keys_and_values(name: str) -> None:
    family = make(name)
    last, others = family.blocks.layers[-1].elements[0], family.blocks.layers[:-1]
    before = flops_of(last, family)
    assert pool_in_last_layer(family.model, family.blocks, family.inputs, pooling_of(family))
    assert 0 < flops_of(last, family) < 0.45 * before
    assert flops_of(others[-1].elements[0], family) == before


class CountsPositions(nn.Module):
    """In place of a dropout: multiplies each position by its number, which a single position cannot know."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.arange(values.shape[1], dtype=values.dtype)[:, None]


class WantsSeveral(nn.Module):
    """In place of a dropout: refuses a single position."""

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[1] < 2:
            raise ValueError("too few positions")
        return values


@pytest.mark.parametrize("odd", [CountsPositions, WantsSeveral])
def test_a_layer_that_one_position_does_not_suffice_is_left_as_it_was(odd: type[nn.Module]) -> None:
    family = make("gpt2")
    family.model.transformer.h[-1].mlp.dropout = odd()
    reference = copy.deepcopy(family.model)
    pooling = pooling_of(family)
    assert not pool_in_last_layer(family.model, family.blocks, family.inputs, pooling)
    assert not has_been_changed(family.model)
    logits, gradients = gradients_of(family.model, family.inputs)
    expected_logits, expected = gradients_of(reference, family.inputs)
    assert torch.equal(logits, expected_logits)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", LEFT_AS_THEY_ARE)
def test_a_layer_that_is_spread_over_the_model_is_left_as_it_was(name: str) -> None:
    family = make(name)
    assert not pool_in_last_layer(family.model, family.blocks, family.inputs, pooling_of(family))
    assert not has_been_changed(family.model)


def test_a_layer_that_all_depths_share_is_left_as_it_was() -> None:
    family = make("albert")
    expected = family.model(**family.inputs).logits
    assert not pool_in_last_layer(family.model, family.blocks, family.inputs, pooling_of(family))
    assert torch.equal(family.model(**family.inputs).logits, expected)


def test_a_model_with_token_pooling_can_be_saved_as_it_was(tmp_path: Any) -> None:
    family = make("bert")
    assert pool_in_last_layer(family.model, family.blocks, family.inputs, pooling_of(family))
    family.model.save_pretrained(tmp_path)
    again = type(family.model).from_pretrained(tmp_path)
    assert agree(again(**family.inputs).logits, family.model(**family.inputs).logits)
