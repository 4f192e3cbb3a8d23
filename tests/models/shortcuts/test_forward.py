"""A function around a module's forward function: it sees each call, copies have their own, and removing it restores."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.shortcuts.forward import wrap_forward


def double(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return 2 * original(*args, **kwargs)


def add_one(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return 1 + original(*args, **kwargs)


def test_functions_are_nested_and_removed_in_reverse_order() -> None:
    layer, values = nn.Linear(3, 2), torch.ones(1, 3)
    plain = layer(values)
    removals = [wrap_forward(layer, double), wrap_forward(layer, add_one)]
    assert torch.equal(layer(values), 1 + 2 * plain)
    assert torch.equal(layer.forward(values), 1 + 2 * plain), "hooks are not needed"
    removals[1]()
    assert torch.equal(layer(values), 2 * plain)
    removals[0]()
    assert torch.equal(layer(values), plain)
    assert "forward" not in vars(layer)


def test_a_copy_computes_with_its_own_weights() -> None:
    layer, values = nn.Linear(3, 2), torch.ones(1, 3)
    wrap_forward(layer, double)
    wrap_forward(layer, add_one)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(layer(values), torch.ones(1, 2))
    assert torch.equal(other(values), 1 + 2 * nn.functional.linear(values, other.weight, other.bias))


def test_the_signature_stays() -> None:
    layer = nn.Bilinear(3, 2, 1)
    before = inspect.signature(layer.forward)
    wrap_forward(layer, double)
    wrap_forward(layer, add_one)
    assert inspect.signature(layer.forward) == before


def test_a_forward_function_that_is_no_method_of_the_module_is_called_too() -> None:
    def forward(values: Tensor) -> Tensor:
        return values + 3

    layer = nn.Linear(3, 2)
    layer.forward = forward
    remove = wrap_forward(layer, double)
    assert torch.equal(layer(torch.zeros(1)), torch.full((1,), 6.0))
    remove()
    assert layer.forward is forward
