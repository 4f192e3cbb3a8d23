"""Texts in one row without padding: each is computed as if it stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from orchestrator.models import attend_within_sequences, return_token_losses, takes_packed_sequences

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
DRY = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": None}),
    "mistral, window": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "gemma3, window": (
        "Gemma3",
        {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3", {**GROUPED, "pad_token_id": 0}),
    "olmo2": ("Olmo2", GROUPED),
    "gpt2": ("GPT2", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **DRY}),
}
LENGTHS = [9, 1, 14, 6]


def build(name: str) -> Any:
    family, sizes = MODELS[name]
    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    model_name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes))
    for parameter in model.parameters():  # So that attention looks at some tokens more than at others.
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def texts() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(1, 40, (length,)) for length in LENGTHS]


def row() -> dict[str, Tensor]:
    ids = texts()
    targets = torch.cat([torch.cat([text[1:], torch.tensor([-100])]) for text in ids])
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "text_lengths": torch.tensor(LENGTHS),
        "target_ids": targets[None],
    }


def gradients(model: Any) -> list[Tensor]:
    found = [value.grad for value in model.parameters() if value.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_texts_alone(name: str, recomputes: bool) -> None:
    model = build(name)
    alone = [torch.zeros(())]
    for text in texts():
        logits = model(input_ids=text[None]).logits[0, :-1]
        alone.append(torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum"))
    sum(alone).backward()  # type: ignore[union-attr]
    expected = gradients(model)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return_token_losses(model)
    attend_within_sequences(model)
    losses = model(**row()).token_losses[0, :, 0]
    losses.sum().backward()
    ends = torch.tensor(LENGTHS).cumsum(0)
    sums = [losses[end - length : end].sum() for end, length in zip(ends.tolist(), LENGTHS, strict=True)]
    torch.testing.assert_close(torch.stack(sums), torch.stack(alone[1:]), rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_padded_batches_and_writing_stay_as_they_were(name: str) -> None:
    ids = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    found = []
    for changed in (False, True):
        model = build(name).eval()
        if changed:
            attend_within_sequences(model)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            written = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append((logits, written))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_model_that_attends_otherwise_is_left_alone() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    attend_within_sequences(model)
    assert model.config._attn_implementation == "eager"
    assert not takes_packed_sequences(model)
    changed = build("llama")
    attend_within_sequences(changed)
    assert takes_packed_sequences(changed)


def test_a_model_that_drops_the_lengths_on_the_way_is_found_out() -> None:
    model = build("llama")
    return_token_losses(model)
    attend_within_sequences(model)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, given: (args, {k: v for k, v in given.items() if k != "text_lengths"}), with_kwargs=True
        )
    with pytest.raises(ValueError, match="did not pass the lengths"):
        model(**row())


FALCON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
CHOOSING = {
    **SIZES,
    **LATENT,
    "num_key_value_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 3,
    "mlp_layer_types": ["dense", "dense"],
}


@pytest.mark.parametrize(("family", "sizes"), [("Falcon", FALCON), ("DeepseekV32", CHOOSING)])
def test_a_model_that_asks_what_its_attention_is_called_computes_as_before(family: str, sizes: dict[str, Any]) -> None:
    found = []
    for changed in (False, True):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        if changed:
            return_token_losses(model)
            attend_within_sequences(model)
        with torch.no_grad():
            found.append(model(input_ids=texts()[2][None]).logits)
    assert torch.equal(*found)
    if takes_packed_sequences(model):
        with pytest.raises(ValueError, match="selects the tokens that it attends to"):
            model(**row())


def test_a_saved_config_does_not_know_of_it(tmp_path: Any) -> None:
    model = build("llama")
    attend_within_sequences(model)
    model.save_pretrained(tmp_path)
    assert "texts_in_a_row" not in (tmp_path / "config.json").read_text()
