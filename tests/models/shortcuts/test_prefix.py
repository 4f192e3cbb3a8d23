"""The frozen prefix: what is fed in place of the lower blocks gives what the whole model gives, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import LENGTHS, Family, agree, all_agree, gradients_of, make, make_inputs, turn_dropout_off
from torch import Tensor, nn

from orchestrator.models import (
    Block,
    Frozen,
    NoPrefix,
    Prefix,
    TokenPooling,
    adapted_blocks,
    add_adapter,
    extract_prefix,
    find_token_pooling,
    freeze_blocks,
    pool_in_last_layer,
    resolve_depth,
)
from orchestrator.recipe import Adapter

FAMILIES = (
    "bert",
    "roberta",
    "distilbert",
    "deberta",
    "deberta-with-convolution",
    "deberta-first-version",
    "modernbert",
    "gpt2",
    "llama",
    "qwen3",
    "vit",
    "mobilenet",
    "resnet",
    "swin",
)
OTHER_LENGTHS = (3, 8, 5)


def boundaries_of(family: Family) -> list[int]:
    return sorted({0, 1, family.num_layers // 2, family.num_layers, family.num_layers + 1})


def picked(family: Family) -> TokenPooling | None:
    """The position that the head reads, the last layer already computing no other."""
    pooling = find_token_pooling(family.model, family.blocks, family.inputs)
    if pooling is not None:
        pool_in_last_layer(family.model, family.blocks, family.inputs, pooling)
    return pooling


def split(family: Family, boundary: int, pooling: TokenPooling | None, model: Any = None) -> Prefix | NoPrefix:
    body = family.model.base_model
    if model is None:  # Adapters are put in after freezing.
        freeze_at(family, boundary)
    return extract_prefix(model or family.model, body, family.blocks, boundary, family.inputs, family.beside, pooling)


def prefix_of(family: Family, boundary: int, pooling: TokenPooling | None = None, model: Any = None) -> Prefix:
    found = split(family, boundary, pooling, model)
    assert isinstance(found, Prefix), found.reason
    return found


def freeze_at(family: Family, boundary: int) -> Frozen:
    depth = resolve_depth({0: "stem", family.num_layers + 1: "all"}.get(boundary, boundary), family.num_layers)
    return freeze_blocks(family.model, family.blocks, depth)


def beside_of(family: Family, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name in family.beside}


def restored(features: Tensor, inputs: dict[str, Tensor], rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and inputs of some rows as a store gives them back: cut to the longest, zeros where there is no text."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return features[rows], {name: value[rows] for name, value in inputs.items()}
    longest = int(mask[rows].sum(1).max())
    cut = {name: value[rows, :longest] for name, value in inputs.items()}
    ragged = features.dim() == 3 and features.shape[1] == mask.shape[1]
    return features[rows, :longest] * cut["attention_mask"][..., None] if ragged else features[rows], cut


def is_as_it_was(model: nn.Module) -> bool:
    replaced = any("forward" in vars(module) for module in model.modules())
    return not replaced and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "whole"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_fed_with_features_has_the_logits_and_gradients_of_the_whole(name: str, pooled: bool) -> None:
    for boundary in boundaries_of(make(name)):
        family, reference = make(name), make(name)
        prefix = prefix_of(family, boundary, picked(family) if pooled else None)
        inputs = make_inputs(name, OTHER_LENGTHS)
        features = prefix.compute(inputs, [boundary])[boundary]
        for each in (family, reference):
            turn_dropout_off(each.model)
            freeze_at(each, boundary).set_train_mode(each.model)
        for rows in ([0, 1, 2], [2, 0]):
            some, cut = restored(features, inputs, rows)
            logits, gradients = gradients_of(family.model, {**beside_of(family, cut), "features": some})
            expected_logits, expected = gradients_of(reference.model, cut)
            assert agree(logits, expected_logits), boundary
            assert expected
            assert all_agree(gradients, expected), boundary


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_it_is_so_with_gradient_checkpointing(name: str) -> None:
    for boundary in boundaries_of(make(name)):
        family, reference = make(name), make(name)
        family.model.gradient_checkpointing_enable({"use_reentrant": False})
        prefix = prefix_of(family, boundary, picked(family))
        for each in (family, reference):
            turn_dropout_off(each.model)
            freeze_at(each, boundary).set_train_mode(each.model)
        # Two batches, the first one's backward pass after its features have been replaced by the second one's.
        for lengths in (OTHER_LENGTHS, LENGTHS):
            inputs = make_inputs(name, lengths)
            family.model.eval()
            features = prefix.compute(inputs, [boundary])[boundary]
            freeze_at(family, boundary).set_train_mode(family.model)
            found = gradients_of(family.model, {**beside_of(family, inputs), "features": features})
            expected = gradients_of(reference.model, inputs)
            assert agree(found[0], expected[0]), boundary
            assert all_agree(found[1], expected[1]), boundary


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {}),
        ("gpt2", {}),
        ("vit", {"hidden_dropout_prob": 0.1}),
        ("mobilenet", {"classifier_dropout_prob": 0.5}),
    ],
)
def test_the_dropout_of_what_is_trained_is_drawn_the_same(name: str, changes: dict[str, Any]) -> None:
    for boundary in boundaries_of(make(name))[:-2]:
        family, reference = make(name, **changes), make(name, **changes)
        prefix = prefix_of(family, boundary, picked(family))
        picked(reference)
        features = prefix.compute(family.inputs, [boundary])[boundary]
        logits = []
        for each, fed in ((family, {**family.beside, "features": features}), (reference, reference.inputs)):
            freeze_at(each, boundary).set_train_mode(each.model)
            torch.manual_seed(7)
            logits.append(each.model(**fed).logits.detach())
        assert agree(*logits), boundary
        assert not agree(family.model(**family.inputs).logits, logits[0]), "nothing was dropped"


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "vit", "mobilenet"])
def test_several_boundaries_in_one_pass_are_those_of_passes_of_their_own(name: str) -> None:
    family = make(name)
    pooling = picked(family)
    boundaries = boundaries_of(family)
    prefix = prefix_of(family, boundaries[-1], pooling)
    together = prefix.compute(family.inputs, boundaries)
    assert sorted(together) == boundaries
    for boundary in boundaries:
        assert torch.equal(prefix.compute(family.inputs, [boundary])[boundary], together[boundary])


@pytest.mark.parametrize("name", ["bert", "deberta", "modernbert", "gpt2", "llama", "vit", "mobilenet", "resnet"])
def test_going_on_from_a_shallower_boundary_gives_what_starting_at_the_inputs_does(name: str) -> None:
    family = make(name)
    pooling = picked(family)
    boundaries = boundaries_of(family)
    prefix = prefix_of(family, boundaries[-1], pooling)
    together = prefix.compute(family.inputs, boundaries)
    for start in boundaries[:-1]:
        deeper = [boundary for boundary in boundaries if boundary > start]
        # A pass from the inputs in between: what is left of it must not be taken for what is fed.
        prefix.compute(make_inputs(name, OTHER_LENGTHS), [boundaries[-1]])
        found = prefix.compute(family.beside, deeper, start, together[start])
        assert sorted(found) == deeper
        for boundary in deeper:
            assert agree(found[boundary], together[boundary]), (start, boundary)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "mobilenet", "resnet"])
def test_fed_frozen_layers_compute_nothing(name: str) -> None:
    for boundary in boundaries_of(make(name)):
        family = make(name)
        prefix = prefix_of(family, boundary)
        features = prefix.compute(family.inputs, [boundary])[boundary]
        family.model(**family.inputs)
        counters = [Counter(block) for block in (family.blocks.stem, *family.blocks.layers)]
        family.model(**family.beside, features=features)
        computed = [counter.calls > 0 for counter in counters]
        assert computed == [number > boundary for number in range(len(computed))], boundary


@pytest.mark.parametrize("name", FAMILIES)
def test_called_without_features_the_model_is_what_it_was(name: str) -> None:
    family, reference = make(name), make(name)
    boundary = family.num_layers + 1
    freeze_at(reference, boundary)
    prefix = prefix_of(family, boundary)
    features = prefix.compute(family.inputs, [boundary])[boundary]
    family.model(**family.beside, features=features)
    logits, gradients = gradients_of(family.model, family.inputs)
    expected_logits, expected = gradients_of(reference.model, reference.inputs)
    assert torch.equal(logits, expected_logits)
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
    prefix.remove()
    assert is_as_it_was(family.model)
    assert torch.equal(family.model(**family.inputs).logits, expected_logits)


def test_features_of_a_head_that_reads_one_position_hold_that_position() -> None:
    family = make("gpt2")
    pooling = picked(family)
    prefix = prefix_of(family, 4, pooling)
    assert prefix.is_pooled(4)
    found = prefix.compute(family.inputs, [1, 2, 3, 4])
    assert [tuple(found[boundary].shape) for boundary in (1, 2, 3, 4)] == [(4, 9, 16)] * 2 + [(4, 1, 16)] * 2
    assert not prefix_of(make("gpt2"), 2).is_pooled(2)
    assert not prefix_of(make("modernbert", classifier_pooling="mean"), 4).is_pooled(4)


@pytest.mark.parametrize("freeze", [1, 2])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_with_an_adapter_above_the_boundary_is_fed(name: str, freeze: int) -> None:
    def adapted() -> tuple[Family, Any, Frozen]:
        family = make(name)
        turn_dropout_off(family.model)
        depth = resolve_depth(freeze, family.num_layers)
        frozen = freeze_blocks(family.model, family.blocks, depth)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wrapped = add_adapter(family.model, family.blocks, depth, Adapter(type="lora", r=2))
            for parameter in wrapped.parameters():  # Adapters start at zero, which would hide a mistake.
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        family.blocks = adapted_blocks(wrapped, family.blocks)
        return family, wrapped, frozen

    family, wrapped, frozen = adapted()
    _, reference, _ = adapted()
    pooling = find_token_pooling(wrapped, family.blocks, family.inputs)
    assert pooling is not None
    assert pool_in_last_layer(wrapped, family.blocks, family.inputs, pooling)
    prefix = prefix_of(family, freeze, pooling, wrapped)
    features = prefix.compute(family.inputs, [freeze])[freeze]
    frozen.set_train_mode(wrapped)
    logits, gradients = gradients_of(wrapped, {**family.beside, "features": features})
    expected_logits, expected = gradients_of(reference.train(), family.inputs)
    assert agree(logits, expected_logits)
    assert any("lora_" in name for name in expected)
    assert all_agree(gradients, expected)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_is_fed_and_a_decoder_that_reads_it_is_refused_untouched(name: str) -> None:
    for boundary in (0, 1, 2):
        family, reference = make(name), make(name)
        prefix = prefix_of(family, boundary)
        features = prefix.compute(family.inputs, [boundary])[boundary]
        fed = family.model(**family.inputs, features=features).logits
        assert agree(fed, reference.model(**family.inputs).logits)
    family, reference = make(name), make(name)
    refused = split(family, 3, None)
    assert isinstance(refused, NoPrefix)
    assert "hand on more than hidden states" in refused.reason
    freeze_at(reference, 3)
    check_untouched(family, reference)


@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        ("albert", 0),
        ("squeezebert", 0),
        ("squeezebert", 2),
        ("beit", 1),
        ("xlnet", 0),
        ("xlnet", 1),
        ("xlnet", 3),
        ("xlnet", 4),
    ],
)
def test_a_model_that_cannot_be_fed_is_refused_with_a_reason_and_left_as_it_was(name: str, boundary: int) -> None:
    family, reference = make(name), make(name)
    refused = split(family, boundary, None)
    assert isinstance(refused, NoPrefix)
    assert refused.reason.startswith(("its layers", "its code calls layers", "what its layers hand on"))
    freeze_at(reference, boundary)
    check_untouched(family, reference)


@pytest.mark.parametrize(
    "trained", ["classifier.bias", "bert.pooler.dense.bias", "bert.encoder.layer.0.output.dense.bias"]
)
def test_what_is_trained_below_the_boundary_is_no_fixed_function_of_the_examples(trained: str) -> None:
    family = make("bert")
    freeze_at(family, 4)
    family.model.get_parameter(trained).requires_grad_(True)
    inputs = family.inputs
    found = extract_prefix(family.model, family.model.base_model, family.blocks, 4, inputs, family.beside, None)
    if trained.startswith("classifier."):
        assert isinstance(found, Prefix)
    else:
        assert found == NoPrefix("something is trained that its frozen blocks depend on")
        assert is_as_it_was(family.model)


def test_a_refusal_leaves_a_last_layer_that_computes_one_position() -> None:
    family, reference = make("bert"), make("bert")
    pooling = picked(family)
    picked(reference)
    family.beside = {}  # Without a mask, padding is read too.
    assert isinstance(split(family, 1, pooling), NoPrefix)
    freeze_at(reference, 1)
    assert torch.equal(family.model(**family.inputs).logits, reference.model(**family.inputs).logits)
    assert sum("forward" in vars(module) for module in family.model.modules()) == sum(
        "forward" in vars(module) for module in reference.model.modules()
    )


class Counter:
    """Counts how often what a block's weights make is new: features that are handed on instead are no work."""

    def __init__(self, block: Block) -> None:
        self.calls = 0
        for module in block.modules:
            if "forward" not in vars(module) and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def check_untouched(family: Family, reference: Family) -> None:
    assert is_as_it_was(family.model)
    logits, gradients = gradients_of(family.model, family.inputs)
    expected_logits, expected = gradients_of(reference.model, reference.inputs)
    assert torch.equal(logits, expected_logits)
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
