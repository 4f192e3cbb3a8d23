"""Discriminative learning rates: the head at its own, each block slower than the one above it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from method_samples import MethodSample
from torch import nn

from orchestrator.models import Block, Blocks
from orchestrator.recipe import Head, Transfer, parse_recipe
from orchestrator.training.parameter_groups import make_groups, rate_multipliers
from orchestrator.transfer.layer_rates import LayerRates, LayerRatesOptions

SAMPLE = MethodSample({"layer_decay": 0.5, "head": {"learning_rate_multiplier": 3.0}})
RECIPE = "name: x\nsource: {model: some/model}\ntarget: {task: text-classification, data: x.jsonl}\n"


def block(name: str) -> Block:
    return Block(name, (), (f"{name}.weight", f"{name}.bias"))


BLOCKS = Blocks(block("stem"), (block("one"), block("two")), block("tail"), block("head"), ())


def multipliers(**options: Any) -> dict[str, float]:
    model = SimpleNamespace(module=nn.Identity(), blocks=BLOCKS, new_parameters=frozenset())
    return rate_multipliers(model, [LayerRates(LayerRatesOptions(**options), "transfer")])


def test_each_block_is_slower_than_the_one_above_it() -> None:
    rates = multipliers(decay=0.5, head=4.0)
    found = [rates[f"{name}.weight"] for name in ("head", "tail", "two", "one", "stem")]
    assert found == [4.0, 0.5, 0.5, 0.25, 0.125]


def test_without_decay_all_but_the_head_learn_at_one_rate() -> None:
    rates = multipliers(head=2.0)
    assert {name: rate for name, rate in rates.items() if rate != 1.0} == {"head.weight": 2.0, "head.bias": 2.0}


def test_keys_of_the_recipe_imply_it() -> None:
    assert LayerRates.implied(Transfer()) is None
    assert LayerRates.implied(Transfer(layer_decay=0.5)) == LayerRatesOptions(decay=0.5)
    assert LayerRates.implied(Transfer(head=Head(learning_rate_multiplier=3.0))) == LayerRatesOptions(head=3.0)


def test_groups_hold_exactly_the_trained_parameters_and_decay_no_biases() -> None:
    module = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("stem", "one", "two", "tail", "head")})
    module["stem"].requires_grad_(False)
    model = SimpleNamespace(module=module, blocks=BLOCKS, new_parameters=frozenset())
    changes = "transfer: {layer_decay: 0.5}\ntrain: {learning_rate: 1.0e-3, weight_decay: 0.1}\n"
    groups = make_groups(model, parse_recipe(RECIPE + changes))
    parameters = dict(module.named_parameters())
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(value) for value in grouped} == {id(value) for value in parameters.values() if value.requires_grad}
    assert len(grouped) == 8
    for group in groups:
        assert group["weight_decay"] == (0.1 if all(value.ndim > 1 for value in group["params"]) else 0.0)
        assert len({value.ndim for value in group["params"]}) == 1
    rates = {id(value): group["initial_lr"] for group in groups for value in group["params"]}
    assert rates[id(parameters["one.weight"])] == pytest.approx(0.25e-3)
