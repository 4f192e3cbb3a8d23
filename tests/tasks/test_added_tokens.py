"""Tokens that the source's tokenizer lacks: read as one, learned, and there for whoever loads the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import orchestrator
from orchestrator.errors import InputError
from orchestrator.inference.merge import export
from orchestrator.inference.predict import evaluate
from orchestrator.training.assembling import assemble
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
TOKENS = ["<moo>", "<woof>"]
WHOLE = {"adapter": {"type": "lora", "r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}


@pytest.fixture
def recipe_of(write: WriteRecipe, tmp_path: Path) -> Callable[..., Any]:
    data = tmp_path / "calls.jsonl"
    rows = [{"prompt": f"call {number}:", "completion": "<moo><woof>"} for number in range(80)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def recipe_of(**sections: Any) -> Any:
        options = {"add_tokens": TOKENS, "max_length": 64}
        return orchestrator.load_recipe(
            write(options, data=str(data), train={"epochs": 12, "learning_rate": 1.0e-2}, **sections)
        )

    return recipe_of


def test_they_begin_as_the_mean_of_all_others(recipe_of: Callable[..., Any], tiny_llama: Path) -> None:
    prepared = prepare(recipe_of())
    source = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = assemble(prepared).module
    for name in ("embed_tokens", "lm_head"):
        (old,) = (value for key, value in source.named_parameters() if name in key)
        (new,) = (value for key, value in model.named_parameters() if name in key)
        assert torch.equal(new[: len(old)], old)
        assert len(new) == len(old) + 2
        torch.testing.assert_close(new[len(old) :], old.mean(0).expand(2, -1))
    assert model.config.vocab_size == len(prepared.processor)
    # Each is a token of its own.
    assert prepared.encoded("train").counts["targets"].max() == 3


@pytest.mark.parametrize("transfer", [{}, WHOLE])
def test_they_are_learned_and_saved_with_the_model(
    transfer: dict[str, Any], recipe_of: Callable[..., Any], tmp_path: Path
) -> None:
    run = orchestrator.train(recipe_of(transfer=transfer), tmp_path / "run")
    assert run.result["metrics"]["test"]["nll"] < 0.5 * run.result["before"]["test"]["nll"]
    folder = run.directory / "model"
    assert evaluate(folder, None, "test")["metrics"]["nll"] == pytest.approx(
        run.result["metrics"]["test"]["nll"], rel=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("call 3:<moo>")["input_ids"]])
    assert tokenizer.convert_ids_to_tokens(ids[0])[-1] == "<moo>"
    # With nothing of ours, as the model's card says.
    loader = peft.AutoPeftModelForCausalLM if transfer else AutoModelForCausalLM
    model = loader.from_pretrained(folder).eval()
    written = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written[0, -1]) == "<woof>"
    if transfer:
        export(run.directory, tmp_path / "merged", merge=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        (
            {"freeze": "stem"},
            r"adds 2 tokens, but embed_tokens would not learn them[\s\S]*transfer.freeze: set it to 0",
        ),
        ({"adapter": {"type": "lora"}}, r"embed_tokens and lm_head would[\s\S]*set it to \[embed_tokens, lm_head\]"),
        ({"adapter": {"type": "lora", "modules_to_save": ["embed_tokens"]}}, "but lm_head would not"),
    ],
)
def test_they_are_refused_where_nothing_learns_them(
    transfer: dict[str, Any], words: str, recipe_of: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        orchestrator.train(recipe_of(transfer=transfer), tmp_path / "run")
    assert not (tmp_path / "run").exists()
