"""How fast each part of the model learns: the head at its own rate, each block a little slower than the one above it.

Discriminative rates are from Howard & Ruder (2018), "Universal Language Model Fine-tuning", section 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from orchestrator.models import Blocks
from orchestrator.recipe import Transfer


def rate_multipliers(blocks: Blocks, transfer: Transfer) -> dict[str, float]:
    """For each parameter's name, what the learning rate is multiplied with.

    The head has its own multiplier. Below it the rate falls by `layer_decay` from block to block: the last layer (and
    what follows it, the tail) has the decay once, the stem below n layers has it n + 1 times.
    """
    decay = 1.0 if transfer.layer_decay is None else transfer.layer_decay
    ladder = [blocks.tail, *reversed(blocks.layers), blocks.stem]
    multipliers = dict.fromkeys(blocks.head.parameters, transfer.head.learning_rate_multiplier)
    for depth, block in enumerate(ladder):
        multipliers.update(dict.fromkeys(block.parameters, decay ** max(1, depth)))
    return multipliers


def parameter_groups(
    parameters: dict[str, nn.Parameter], multipliers: dict[str, float], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for the optimizer of everything that is trained, in a fixed order.

    Biases and the scales of norms (all parameters of one dimension) are not decayed. Each group keeps its peak rate as
    `initial_lr`, which the schedule multiplies.
    """
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            grouped.setdefault((multipliers[name], parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": learning_rate * multiplier,
            "initial_lr": learning_rate * multiplier,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (multiplier, decayed), members in grouped.items()
    ]
