"""Bodies and heads of models whose `base_model` is the model itself, or whose head is inside their body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator.errors import ModelError
from orchestrator.models import (
    find_blocks,
    find_body,
    freeze_blocks,
    load_config,
    load_model,
    open_folder,
    resolve_depth,
    set_head,
    set_padding_token,
)
from orchestrator.models.head import find_output_layer
from orchestrator.models.quantize import layers_outside_body
from orchestrator.recipe import Head

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
STAGES = {
    "embedding_size": 8,
    "stem_channels": [3, 8, 8],
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "stage_in_channels": [8, 8],
    "stage_mid_channels": [8, 8],
    "stage_out_channels": [8, 16],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 3],
    "stage_numb_of_layers": [1, 1],
}
LATENTS = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 2}
ATTENTION = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 40}
PICTURES = {"pixel_values": torch.zeros(1, 3, 32, 32)}
TEXTS = {"input_ids": torch.tensor([[1, 2, 3, 1]])}
Example = tuple[str, str, dict[str, Any], dict[str, torch.Tensor], str, str]
# The auto class, the config and its values, inputs, the names of the body (empty: the model) and of the output layer.
MODELS: dict[str, Example] = {
    "siglip": ("ImageClassification", "Siglip", {"vision_config": VISION}, PICTURES, "vision_model", "classifier"),
    "clip": ("ImageClassification", "CLIP", {"vision_config": VISION}, PICTURES, "vision_model", "classifier"),
    "hgnet": ("ImageClassification", "HGNetV2", STAGES, PICTURES, "", "fc"),
    "perceiver": (
        "SequenceClassification",
        "Perceiver",
        {**LATENTS, **ATTENTION},
        TEXTS,
        "perceiver",
        "perceiver.decoder.decoder.final_layer",
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, **changes: Any) -> Any:
    auto_class, family, values, *_ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**values, "num_labels": 3, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"AutoModelFor{auto_class}").from_config(config)


@every_model
def test_body_and_output_layer_are_told_apart(name: str) -> None:
    model = build(name)
    _, _, _, inputs, body, output = MODELS[name]
    assert find_body(model) is model.get_submodule(body)
    assert find_output_layer(model) == (output, model.get_submodule(output))
    assert layers_outside_body(model) == [output]
    blocks = find_blocks(model, inputs, frozenset())
    assert blocks.head.parameters == (f"{output}.weight", f"{output}.bias")
    assert len(blocks.layers) >= 2


@every_model
def test_all_but_the_head_can_be_frozen(name: str) -> None:
    model = build(name)
    blocks = find_blocks(model, MODELS[name][3], frozenset())
    freeze_blocks(model, blocks, resolve_depth("all", len(blocks.layers)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(blocks.head.parameters)


@every_model
def test_extra_layers_go_before_the_output_layer(name: str) -> None:
    model = build(name)
    output = MODELS[name][5]
    new = set_head(model, Head(layers=[8], dropout=0.5), frozenset())
    assert new and all(parameter.startswith(f"{output}.") for parameter in new)
    assert set(find_blocks(model, MODELS[name][3], new).head.parameters) == new
    assert find_output_layer(model)[0] == output
    assert set_head(model, Head(layers=[], dropout=0.5), new) == {f"{output}.weight", f"{output}.bias"}


@every_model
def test_weights_for_other_labels_give_a_new_head_alone(name: str, tmp_path: Path) -> None:
    auto_class = f"AutoModelFor{MODELS[name][0]}"
    output = MODELS[name][5]
    build(name, num_labels=5).save_pretrained(tmp_path)
    source = open_folder(tmp_path, "source.model")
    config = load_config(source, num_labels=3)
    loaded = load_model(source, auto_class, config, from_scratch=False, seed=0)
    assert loaded.new_parameters == {f"{output}.weight", f"{output}.bias"}


def test_weights_of_another_body_are_refused_in_a_model_without_base_model(tmp_path: Path) -> None:
    build("siglip").save_pretrained(tmp_path)
    source = open_folder(tmp_path, "source.model")
    config = load_config(source)
    config.vision_config.intermediate_size = 48
    with pytest.raises(ModelError, match=r"mlp\.fc1\.(bias|weight) of .* by config\.json"):
        load_model(source, "AutoModelForImageClassification", config, from_scratch=False, seed=0)


def test_a_model_without_an_output_for_each_label_has_no_head(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(ModelError, match="has no output layer for 2 labels"):
        find_output_layer(model)


@pytest.mark.parametrize("size", [30, 50])
def test_tokens_are_counted_where_the_embedding_of_tokens_is_not_told(size: int, tmp_path: Path) -> None:
    build("perceiver").save_pretrained(tmp_path)
    source = open_folder(tmp_path, "source.model")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words(size), pad_token="0")
    if size > 40:
        with pytest.raises(ModelError, match="has 50 tokens, its model embeds 40"):
            set_padding_token(build("perceiver"), tokenizer, source)
    else:
        set_padding_token(build("perceiver"), tokenizer, source)


def words(size: int) -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="0"))
