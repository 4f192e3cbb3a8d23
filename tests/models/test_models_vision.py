"""Models of pictures: blocks in the order of data, and batch norms that neither move when frozen nor run away."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from orchestrator.models import (
    SourceModel,
    find_blocks,
    find_source,
    freeze_blocks,
    load_config,
    load_model,
    resolve_depth,
    set_batch_norm_momentum,
    set_head,
)
from orchestrator.recipe import Head, Recipe

INPUTS = {"pixel_values": torch.zeros(1, 3, 32, 32)}
SMALL_STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_labels": 3}
TRANSFORMER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
}
# Config, its values, the number of layers, and what the first parameter of the stem is called.
MODELS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "mobilenet-v1": ("MobileNetV1Config", {"depth_multiplier": 0.25, "num_labels": 3}, 26, "conv_stem"),
    "mobilenet-v2": ("MobileNetV2Config", {"depth_multiplier": 0.25, "num_labels": 3}, 16, "conv_stem"),
    "resnet": ("ResNetConfig", {"embedding_size": 8, **SMALL_STAGES}, 4, "embedder"),
    "convnext": ("ConvNextConfig", SMALL_STAGES, 4, "embeddings"),
    "vit": ("ViTConfig", TRANSFORMER, 3, "embeddings"),
}
every_model = pytest.mark.parametrize("name", MODELS)
WITH_BATCH_NORM = ("mobilenet-v1", "mobilenet-v2", "resnet")


def build(name: str) -> Any:
    config_name, values, _, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**values)
        return transformers.AutoModelForImageClassification.from_config(config)


def batch_norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def source_of(folder: Path) -> SourceModel:
    target = {"task": "image-classification", "data": "x"}
    return find_source(Recipe.model_validate({"name": "x", "source": {"model": str(folder)}, "target": target}))


@every_model
def test_blocks_are_found_in_the_order_of_data(name: str) -> None:
    model = build(name)
    blocks = find_blocks(model, INPUTS, frozenset())
    _, _, num_layers, stem = MODELS[name]
    assert len(blocks.layers) == num_layers
    assert stem in blocks.stem.parameters[0]
    assert all(parameter.startswith("classifier.") for parameter in blocks.head.parameters)
    counts = Counter(parameter for block in blocks.in_order() for parameter in block.parameters)
    assert counts == Counter(parameter for parameter, _ in model.named_parameters())
    called = []
    for block in blocks.layers:
        block.modules[0].register_forward_pre_hook(lambda *_, name=block.name: called.append(name))
    with torch.no_grad():
        model.eval()(**INPUTS)
    assert called == [block.name for block in blocks.layers]


@every_model
def test_a_model_without_weights_has_the_same_blocks(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
        blocks = find_blocks(model, {"pixel_values": torch.zeros(1, 3, 32, 32)}, frozenset())
    whole = find_blocks(build(name), INPUTS, frozenset())
    assert [block.parameters for block in blocks.in_order()] == [block.parameters for block in whole.in_order()]


@every_model
def test_the_head_gets_dropout_and_extra_layers(name: str) -> None:
    model = build(name)
    new = set_head(model, Head(layers=[5], dropout=0.25), frozenset())
    assert new
    blocks = find_blocks(model, INPUTS, new)
    assert new <= set(blocks.head.parameters)
    assert model.eval()(**INPUTS).logits.shape == (1, 3)


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
@pytest.mark.parametrize("depth", ["stem", 2, "all"])
def test_frozen_batch_norms_keep_their_statistics_bit_by_bit(name: str, depth: int | str) -> None:
    model = build(name)
    blocks = find_blocks(model, INPUTS, frozenset())
    frozen = freeze_blocks(model, blocks, resolve_depth(depth, len(blocks.layers)))
    before = {name: value.clone() for name, value in model.named_buffers()}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for _ in range(3):
        frozen.set_train_mode(model)
        model(torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
        optimizer.step()
    frozen_names = {name.rpartition(".")[0] for name in frozen.parameters}
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.rpartition(".")[0] in frozen_names]
    trained = {name for name in before if name.rpartition(".")[0] not in frozen_names}
    assert moved == trained
    assert bool(trained) == (depth != "all")


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
@pytest.mark.parametrize(("num_updates", "fitting"), [(3, 0.1), (60, 0.05), (100_000, 0.01)])
def test_tuned_batch_norms_get_a_momentum_that_fits_the_run(name: str, num_updates: int, fitting: float) -> None:
    model = build(name)
    declared = {module.momentum for module in batch_norms(model)}
    note = set_batch_norm_momentum(model, num_updates)
    # PyTorch's own momentum is left to those that have it.
    expected = 0.1 if name == "resnet" else fitting
    assert {module.momentum for module in batch_norms(model)} == {expected}
    assert (note is None) == (name == "resnet")
    assert note is None or all(f"{fitting:.2g} instead of the model's {value}" in note for value in declared)
    assert set_batch_norm_momentum(model, num_updates) is None


@pytest.mark.parametrize(
    ("norm", "momentum", "expected"),
    [
        (nn.BatchNorm1d(4, momentum=None), None, 0.05),
        (nn.BatchNorm2d(4, momentum=0.0), 0.0, 0.05),
        (nn.BatchNorm2d(4, momentum=0.001), 0.001, 0.05),
        (nn.BatchNorm2d(4, momentum=0.06), 0.06, 0.06),
        (nn.SyncBatchNorm(4, momentum=0.99), 0.99, 0.05),
        (nn.InstanceNorm2d(4, momentum=0.99, affine=True, track_running_stats=True), 0.99, 0.05),
        (nn.InstanceNorm2d(4, momentum=0.99, affine=True), 0.99, 0.99),
    ],
)
def test_it_is_so_for_every_norm_with_running_statistics(norm: Any, momentum: Any, expected: float) -> None:
    assert norm.momentum == momentum
    note = set_batch_norm_momentum(norm, 60)
    assert norm.momentum == expected
    assert (note is None) == (momentum == expected)


def test_of_frozen_batch_norms_nothing_is_said() -> None:
    model = build("mobilenet-v1")
    blocks = find_blocks(model, INPUTS, frozenset())
    freeze_blocks(model, blocks, resolve_depth("all", len(blocks.layers)))
    assert set_batch_norm_momentum(model, 60) is None


def test_statistics_of_an_odd_last_batch_do_not_take_over(tmp_path: Path) -> None:
    build("mobilenet-v2").save_pretrained(tmp_path)
    source = source_of(tmp_path)
    model = load_model(source, "AutoModelForImageClassification", load_config(source), False, 0).model.train()
    set_batch_norm_momentum(model, 1000)
    generator = torch.Generator().manual_seed(0)
    for scale in [1.0] * 50 + [30.0]:
        model(scale * torch.randn(8, 3, 32, 32, generator=generator))
    first = batch_norms(model)[0]
    with torch.no_grad():
        found = model.mobilenet_v2.conv_stem.first_conv.convolution(
            torch.nn.functional.pad(torch.randn(64, 3, 32, 32, generator=generator), (0, 1, 0, 1))
        )
    usual = found.var((0, 2, 3))
    # The odd batch has 900 times the variance; a hundredth of it may be in the average, all of it may not.
    assert (first.running_var < 20 * usual + 1).all()
