"""Tiny models of text and of pictures under one roof, with examples of uneven length, for what must hold of any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor, nn

from orchestrator.models import Blocks, find_blocks

LENGTHS = (7, 4, 9, 1)
ENDS = {"t5": 1, "bart": 3}  # The token whose position their heads read.
PICTURES = {
    "vit": (
        "ViTConfig",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
    ),
    "mobilenet": ("MobileNetV2Config", {"depth_multiplier": 0.25}),
    "mobilenet-v1": ("MobileNetV1Config", {"depth_multiplier": 0.25}),
    "convnext": (
        "ConvNextConfig",
        {"image_size": 32, "patch_size": 2, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]},
    ),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2},
    ),
    "beit": (
        "BeitConfig",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "use_shared_relative_position_bias": True,
        },
    ),
}


@dataclass
class Family:
    """A tiny model and what its forward pass takes."""

    model: Any
    blocks: Blocks
    inputs: dict[str, Tensor]
    extra_inputs: dict[str, Tensor]
    """What of the inputs goes along with features."""

    @property
    def num_layers(self) -> int:
        return len(self.blocks.layers)


def make(name: str, seed: int = 0, **changes: Any) -> Family:
    """A tiny classifier of this architecture with three labels, in evaluation mode."""
    inputs = make_inputs(name, LENGTHS)
    if name not in PICTURES:
        model = tiny_models.build(name, seed, **changes)
        return Family(model.eval(), find_blocks(model, tiny_models.EXAMPLE, frozenset()), inputs, inputs)
    config_name, values = PICTURES[name]
    config = getattr(transformers, config_name)(**{**values, **changes}, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageClassification.from_config(config)
    set_statistics(model, inputs)
    blocks = find_blocks(model, {"pixel_values": inputs["pixel_values"][:1]}, frozenset())
    return Family(model.eval(), blocks, inputs, {})


def set_statistics(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Give batch norms the statistics of these inputs: with those of no data nothing comes through many layers."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(**inputs)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def make_inputs(name: str, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Random texts of these lengths, or as many random pictures."""
    if name in PICTURES:
        return {"pixel_values": torch.randn(len(lengths), 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    return make_texts(lengths, ENDS.get(name))


def make_texts(lengths: tuple[int, ...], end: int | None = None) -> dict[str, Tensor]:
    """Random token ids, padded on the right.

    Args:
        end: the token that ends every text.
    """
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, tiny_models.VOCABULARY, mask.shape, generator=generator) * mask
    if end is not None:
        ids[torch.arange(len(lengths)), mask.sum(1) - 1] = end
    return {"input_ids": ids, "attention_mask": mask}


def turn_dropout_off(model: nn.Module) -> None:
    """Make training mode compute as evaluation mode does, except for batch norms."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def gradients_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a batch, and the gradient of its loss for every trained parameter that has one."""
    model.zero_grad()
    logits = model(**inputs).logits
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    named = model.named_parameters()
    return logits.detach(), {name: value.grad.clone() for name, value in named if value.grad is not None}


def agree(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors are the same, as measured against the largest value expected."""
    largest = float(expected.detach().abs().max())
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest)


def all_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    """The same for gradients; those that are zero but for rounding are measured against a hundredth of the largest."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3, "there is nothing to compare"
    return all(
        torch.allclose(
            found[name], value, rtol=tolerance, atol=tolerance * max(float(value.abs().max()), largest / 100)
        )
        for name, value in expected.items()
    )
