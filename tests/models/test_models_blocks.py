"""Blocks are found in the order of data, and hold every parameter exactly once."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CONFIGS, EXAMPLE, build, num_layers

from orchestrator.errors import ModelError
from orchestrator.models import find_blocks


@pytest.fixture(scope="module")
def divided():
    """Every tiny model with its blocks."""
    models = {name: build(name).eval() for name in CONFIGS}
    return {name: (model, find_blocks(model, EXAMPLE, frozenset())) for name, model in models.items()}


def offenders(divided, holds):
    return [name for name, (model, blocks) in divided.items() if not holds(name, model, blocks)]


def test_every_parameter_is_in_exactly_one_block(divided):
    def holds(_, model, blocks):
        counts = Counter(parameter for block in blocks.in_order() for parameter in block.parameters)
        return counts == Counter(parameter for parameter, _ in model.named_parameters())

    assert offenders(divided, holds) == []


def test_layers_are_found_in_the_order_of_data(divided):
    def holds(name, model, blocks):
        called, names = [], [block.name for block in blocks.layers]
        hooks = [
            block.modules[0].register_forward_pre_hook(lambda *_, name=block.name: called.append(name))
            for block in blocks.layers
        ]
        with torch.no_grad():
            model(**EXAMPLE)
        for hook in hooks:
            hook.remove()
        return names == [f"layer {number + 1}" for number in range(num_layers(name))] == list(dict.fromkeys(called))

    assert offenders(divided, holds) == []


def test_embeddings_are_in_the_stem_and_the_classifier_in_the_head(divided):
    def holds(_, model, blocks):
        body = {id(parameter) for parameter in model.base_model.parameters()}
        outside = {named for named, parameter in model.named_parameters() if id(parameter) not in body}
        return model.get_input_embeddings() in blocks.stem.modules and set(blocks.head.parameters) == outside

    assert offenders(divided, holds) == []


def test_every_module_is_in_one_block_or_around_blocks(divided):
    def holds(_, model, blocks):
        counts = Counter(module for block in blocks.in_order() for module in block.modules)
        counts.update(blocks.containers)
        return counts == Counter(module for module in model.modules() if module is not model)

    assert offenders(divided, holds) == []


def test_bert_is_divided_at_the_familiar_places():
    blocks = find_blocks(build("bert"), EXAMPLE, frozenset())
    assert all(name.startswith("bert.embeddings.") for name in blocks.stem.parameters)
    for index, block in enumerate(blocks.layers):
        assert all(name.startswith(f"bert.encoder.layer.{index}.") for name in block.parameters)
    assert blocks.tail.parameters == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert blocks.head.parameters == ("classifier.weight", "classifier.bias")


def test_an_encoder_comes_before_its_decoder_with_what_runs_between_them():
    blocks = find_blocks(build("t5"), EXAMPLE, frozenset())
    assert "transformer.encoder.final_layer_norm.weight" in blocks.layers[1].parameters
    assert blocks.layers[2].parameters[0].startswith("transformer.decoder.block.0.")
    assert blocks.tail.parameters == ("transformer.decoder.final_layer_norm.weight",)
    assert blocks.stem.parameters == ("transformer.shared.weight",)


def test_embeddings_of_a_decoder_are_in_the_stem_though_they_are_called_late():
    blocks = find_blocks(build("bart"), EXAMPLE, frozenset())
    assert "model.decoder.embed_positions.weight" in blocks.stem.parameters
    assert "model.decoder.layernorm_embedding.weight" in blocks.layers[1].parameters


def test_parts_of_a_layer_in_parallel_lists_make_one_layer():
    blocks = find_blocks(build("xlm"), EXAMPLE, frozenset())
    parts = {name.split(".")[1] for name in blocks.layers[0].parameters}
    assert parts == {"attentions", "layer_norm1", "ffns", "layer_norm2"}


def test_parameters_that_the_source_lacked_are_in_the_head():
    new = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"})
    model = build("bert")
    blocks = find_blocks(model, EXAMPLE, new)
    assert set(blocks.head.parameters) == new
    assert blocks.tail.parameters == ()
    assert model.bert.pooler.dense in blocks.head.modules


def test_a_shared_parameter_belongs_to_the_earliest_of_its_blocks():
    model = build("bert")
    layers = model.bert.encoder.layer
    layers[2].output.dense.weight = layers[0].output.dense.weight
    blocks = find_blocks(model, EXAMPLE, frozenset())
    assert "bert.encoder.layer.0.output.dense.weight" in blocks.layers[0].parameters
    assert len(blocks.layers[2].parameters) == 15


def test_modes_hooks_and_random_streams_are_left_as_they_were():
    model = build("bart").train()
    model.model.encoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    find_blocks(model, EXAMPLE, frozenset())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="no layers were found in BertForSequenceClassification"):
        find_blocks(build("bert", num_hidden_layers=0), EXAMPLE, frozenset())


def test_layers_whose_calls_no_hook_sees_are_found_by_what_is_inside():
    blocks = find_blocks(build("squeezebert"), EXAMPLE, frozenset())
    assert [len(block.parameters) for block in blocks.layers] == [16, 16, 16]
    assert blocks.tail.parameters == ("transformer.pooler.dense.weight", "transformer.pooler.dense.bias")


@pytest.mark.parametrize("name", ["gpt2", "deberta", "mixtral"])
def test_an_outline_has_the_same_blocks_though_its_code_looks_at_values(name: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = build_mixture() if name == "mixtral" else build(name)
            model.config.pad_token_id = 0
            blocks = find_blocks(model, {"input_ids": EXAMPLE["input_ids"].to(device)}, frozenset())
        found.append([(block.name, block.parameters) for block in blocks.in_order()])
    assert found[0] == found[1]


def build_mixture() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
