"""A shortcut is not used where the model's code fails when it is tried out; mistakes of this package are raised."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_families import Family, make
from torch import Tensor, nn

from orchestrator.models import (
    Prefix,
    PrefixUnavailable,
    TokenPooling,
    extract_prefix,
    find_token_losses,
    find_token_pooling,
    freeze_blocks,
    pool_in_last_layer,
    resolve_depth,
    return_token_losses,
)
from orchestrator.models.attempt import CallFailed, try_forward, try_gradients
from orchestrator.models.shortcuts import prefix_extraction
from orchestrator.models.shortcuts import token_pooling as pooling_module

ERRORS = (AssertionError, ZeroDivisionError, UnboundLocalError, KeyError, NotImplementedError)


class Fails(nn.Module):
    """In place of a dropout: fails from its second call on, or from another one."""

    def __init__(self, error: type[Exception], good_calls: int) -> None:
        super().__init__()
        self.error = error
        self.good_calls = good_calls

    def forward(self, values: Tensor) -> Tensor:
        self.good_calls -= 1
        if self.good_calls < 0:
            raise self.error("this layer is odd")
        return values


def make_failing(error: type[Exception], good_calls: int) -> Family:
    family = make("bert")
    freeze_blocks(family.model, family.blocks, resolve_depth(1, family.num_layers))
    family.model.bert.encoder.layer[2].output.dropout = Fails(error, good_calls)
    return family


def split(family: Family, pooling: TokenPooling | None) -> Prefix | PrefixUnavailable:
    body = family.model.base_model
    return extract_prefix(family.model, body, family.blocks, 1, family.inputs, family.extra_inputs, pooling)


# Any error in the first call, and any call with one of the errors.
@pytest.mark.parametrize(
    ("error", "good_calls"), [*((error, 0) for error in ERRORS), *((ERRORS[0], calls) for calls in (1, 2, 3))]
)
def test_a_model_that_fails_where_a_shortcut_is_tried_out_goes_on_without_it(
    error: type[Exception], good_calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    family = make_failing(error, good_calls)
    with caplog.at_level(logging.INFO, "orchestrator"):
        pooling = find_token_pooling(family.model, family.blocks, family.inputs)
        is_pooled = pooling is not None and pool_in_last_layer(family.model, family.blocks, family.inputs, pooling)
        found = split(family, pooling)
    assert not is_pooled
    assert isinstance(found, PrefixUnavailable)
    assert error.__name__ in found.reason
    assert "this layer is odd" in caplog.text
    assert "Traceback" in caplog.text
    # The model is what it was: no forward function is replaced, and no hook is left.
    assert not any("forward" in vars(module) for module in family.model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in family.model.modules())


def test_a_model_without_logits_has_no_shortcuts() -> None:
    family = make("bert")
    assert find_token_pooling(family.model.bert, family.blocks, family.inputs) is None


def test_mistakes_around_the_call_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: Any, **__: Any) -> Any:
        raise TypeError("a mistake of this package")

    family = make("bert")
    freeze_blocks(family.model, family.blocks, resolve_depth(1, family.num_layers))
    pooling = find_token_pooling(family.model, family.blocks, family.inputs)
    assert pooling is not None
    with monkeypatch.context() as patch:
        patch.setattr(pooling_module, "_matters_alone", mistake)
        with pytest.raises(TypeError, match="of this package"):
            pool_in_last_layer(family.model, family.blocks, family.inputs, pooling)
    with monkeypatch.context() as patch:
        patch.setattr(prefix_extraction, "is_close", mistake)
        with pytest.raises(TypeError, match="of this package"):
            split(family, None)


def test_a_language_model_that_reads_no_texts_of_a_few_tokens_answers_from_its_logits() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=4)
    model = transformers.GPT2LMHeadModel(config)
    return_token_losses(model)
    losses = find_token_losses(model)
    assert losses is not None
    assert not losses.is_direct
    inputs = torch.tensor([[1, 2, 3]])
    assert model(input_ids=inputs, target_ids=inputs).token_losses.shape == (1, 3, 2)


def test_gradients_that_a_models_code_prevents_are_a_failed_call() -> None:
    value = torch.ones(3, requires_grad=True)
    squared = value.exp()
    logits = squared * 2
    squared.detach().zero_()
    squared.add_(1)  # exp() needs what it returned for its backward pass.
    with pytest.raises(CallFailed):
        try_gradients(logits, [value], "a test")
    assert try_gradients(torch.ones(2), [value], "a test") == [None]


def test_an_interruption_is_no_failure_of_the_model() -> None:
    def interrupted(**_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_forward(interrupted, {}, "a test")
