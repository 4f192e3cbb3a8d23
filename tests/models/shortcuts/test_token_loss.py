"""Losses at the targets instead of logits: the same numbers and gradients, whatever a model does with its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from orchestrator.models.shortcuts import token_loss
from orchestrator.models.shortcuts.token_loss import IGNORED, return_token_losses

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
    if name.startswith("logits are bent"):
        # As Gemma has it, the small logits of random weights are bent by less than a thousandth.
        bend = 2.0 if name == "logits are bent" else 30.0
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=bend))
    tied = name == "tied"
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    targets = ids.roll(-1, 1)
    targets[torch.rand(targets.shape) < 0.4] = IGNORED
    targets[:, -1] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "target_ids": targets}


def expected_losses(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    plain = {name: value for name, value in inputs.items() if name != "target_ids"}
    logits = model(**plain).logits.float()
    targets = inputs["target_ids"]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    hits = (logits.argmax(-1) == targets).float()
    return torch.stack([losses.view_as(targets), hits], -1)


@pytest.mark.parametrize("name", ["untied", "tied", "gpt2", "logits are bent", "logits are bent a little"])
def test_losses_and_gradients_are_those_of_the_logits(
    name: str, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "LOGITS_PER_CHUNK", 4 * VOCABULARY)  # Several parts, the last one short.
    reference, model = build(name), build(name)
    return_token_losses(model)
    expected, found = expected_losses(reference, inputs), model(**inputs).token_losses
    assert found.shape == (3, 9, 2)
    torch.testing.assert_close(found, expected)
    # Every target with a weight of its own, as in preference losses.
    weights = torch.rand(3, 9)
    (expected[..., 0] * weights).sum().backward()
    (found[..., 0] * weights).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    for key, value in reference.named_parameters():
        torch.testing.assert_close(gradients[key], value.grad)


@pytest.mark.parametrize("name", ["untied", "tied", "gpt2"])
def test_logits_of_all_targets_never_exist_together(
    name: str, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    return_token_losses(model)
    monkeypatch.setattr(token_loss, "losses_of_logits", lambda *_: pytest.fail("there were logits"))
    model(**inputs).token_losses.sum().backward()


def test_models_that_bend_their_logits_a_little_are_known() -> None:
    model = build("logits are bent a little")
    before = model.state_dict()["lm_head.weight"].clone()
    found = token_loss._TokenLosses(model)
    found.install()
    assert not found.is_direct
    assert torch.equal(model.state_dict()["lm_head.weight"], before)


def test_without_targets_the_model_is_as_it_was(inputs: dict[str, torch.Tensor]) -> None:
    reference, model = build("untied"), build("untied")
    return_token_losses(model)
    del inputs["target_ids"]
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    assert model.state_dict().keys() == reference.state_dict().keys()


def test_frozen_output_layers_get_no_gradient(inputs: dict[str, torch.Tensor]) -> None:
    model = build("untied")
    return_token_losses(model)
    model.lm_head.weight.requires_grad_(False)
    model(**inputs).token_losses.sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_it_is_so_in_bf16(inputs: dict[str, torch.Tensor]) -> None:
    reference, model = build("untied"), build("untied")
    return_token_losses(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = expected_losses(reference, inputs), model(**inputs).token_losses
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[..., 0], expected[..., 0], rtol=2e-2, atol=2e-2)
    found[..., 0].sum().backward()
    expected[..., 0].sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, reference.lm_head.weight.grad, rtol=0.1, atol=0.1)


def test_it_is_so_under_an_adapter(inputs: dict[str, torch.Tensor]) -> None:
    import peft

    reference, model = build("untied"), build("untied")
    return_token_losses(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, config)
    torch.testing.assert_close(wrapped(**inputs).token_losses, expected_losses(reference, inputs))


def test_a_batch_without_a_target_has_no_loss(inputs: dict[str, torch.Tensor]) -> None:
    model = build("untied")
    return_token_losses(model)
    inputs["target_ids"] = torch.full_like(inputs["target_ids"], IGNORED)
    found = model(**inputs).token_losses
    assert not found.any()
    found.sum().backward()
    assert not model.lm_head.weight.grad.any()
