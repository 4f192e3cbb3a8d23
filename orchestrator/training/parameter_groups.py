"""Parameter groups for the optimizer: what is trained, at which rate, and with or without weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from orchestrator.recipe import Recipe
from orchestrator.transfer import Method, Model, methods_of


def make_groups(model: Model, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the groups of a model's trained parameters, at the recipe's rates and those of its methods."""
    train = recipe.train
    multipliers = rate_multipliers(model, methods_of(recipe))
    parameters = dict(model.module.named_parameters())
    return parameter_groups(parameters, multipliers, train.learning_rate, train.weight_decay)


def rate_multipliers(model: Model, methods: Iterable[Method]) -> dict[str, float]:
    """Return the products of the methods' multiples of the learning rate, by the names of parameters."""
    product: dict[str, float] = {}
    for method in methods:
        for name, multiplier in method.multipliers(model).items():
            product[name] = product.get(name, 1.0) * multiplier
    return product


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], multipliers: Mapping[str, float], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return groups of everything that is trained, in a fixed order.

    Biases and the scales of norms (all parameters of one dimension) are not decayed. Each group keeps its peak rate as
    `initial_lr`, which the schedule multiplies.

    Args:
        multipliers: multiples of the rate by the names of parameters; 1 for others.
    """
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            grouped.setdefault((multipliers.get(name, 1.0), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": learning_rate * multiplier,
            "initial_lr": learning_rate * multiplier,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (multiplier, decayed), members in grouped.items()
    ]
