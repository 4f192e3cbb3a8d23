"""Discriminative learning rates: the head at its own, each block slower than the one above it."""

from __future__ import annotations

import pytest
from torch import nn

from orchestrator.models import Block, Blocks
from orchestrator.recipe import Head, Transfer
from orchestrator.transfer.layer_rates import parameter_groups, rate_multipliers


def block(name: str) -> Block:
    return Block(name, (), (f"{name}.weight", f"{name}.bias"))


BLOCKS = Blocks(block("stem"), (block("one"), block("two")), block("tail"), block("head"), ())


def test_each_block_is_slower_than_the_one_above_it() -> None:
    rates = rate_multipliers(BLOCKS, Transfer(layer_decay=0.5, head=Head(learning_rate_multiplier=4.0)))
    found = [rates[f"{name}.weight"] for name in ("head", "tail", "two", "one", "stem")]
    assert found == [4.0, 0.5, 0.5, 0.25, 0.125]


def test_without_decay_all_but_the_head_learn_at_one_rate() -> None:
    rates = rate_multipliers(BLOCKS, Transfer(head=Head(learning_rate_multiplier=2.0)))
    assert {name: rate for name, rate in rates.items() if rate != 1.0} == {"head.weight": 2.0, "head.bias": 2.0}


def test_groups_hold_exactly_the_trained_parameters_and_decay_no_biases() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("stem", "one", "two", "tail", "head")})
    model["stem"].requires_grad_(False)
    parameters = dict(model.named_parameters())
    groups = parameter_groups(parameters, rate_multipliers(BLOCKS, Transfer(layer_decay=0.5)), 1e-3, 0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(value) for value in grouped} == {id(value) for value in parameters.values() if value.requires_grad}
    assert len(grouped) == 8
    for group in groups:
        assert group["weight_decay"] == (0.1 if all(value.ndim > 1 for value in group["params"]) else 0.0)
        assert len({value.ndim for value in group["params"]}) == 1
    rates = {id(value): group["initial_lr"] for group in groups for value in group["params"]}
    assert rates[id(parameters["one.weight"])] == pytest.approx(0.25e-3)
