"""LoRA on mixtures of experts: their stacked weights are reached, or the user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import orchestrator
from orchestrator import models
from orchestrator.errors import InputError
from orchestrator.inference.merge import export
from orchestrator.inference.predict import evaluate
from orchestrator.launch.train import check
from orchestrator.recipe import Adapter

WriteRecipe = Callable[..., Path]
IDS = torch.tensor([[5, 30, 7, 8, 20, 10]])
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    # Its last layer is no mixture, and has linear modules that go by the names of experts' in older versions.
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [2]},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        **LATENT,
    },
    "granitemoe": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
}


def build(name: str, vocab_size: int = 40) -> Any:
    config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name], "vocab_size": vocab_size})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_above_the_boundary_gets_an_adapter_which_plain_peft_loads_and_merges(
    name: str, variant: Any, tmp_path: Path
) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "source")
    blocks = models.find_blocks(model, {"input_ids": IDS}, frozenset())
    depth = models.resolve_depth(1, 3, "transfer.freeze")
    models.freeze_blocks(model, blocks, depth)
    above = {module for block in blocks.layers[1:] for module in block.modules}
    names = {module: name for name, module in model.named_modules()}
    # Routers are left alone, also one that is made from a linear module.
    linear = {f"{names[module]}.weight" for module in above if type(module) is torch.nn.Linear}
    stacked = {name for name, value in model.named_parameters() if value.dim() == 3 and "layers.0." not in name}
    wrapped = models.add_adapter(model, blocks, depth, Adapter(type="lora", r=2, variant=variant), trains_head=False)
    before = logits_of(wrapped)
    for key, value in wrapped.named_parameters():
        if value.requires_grad:
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))) / 4
    expected = logits_of(wrapped)
    assert (expected - before).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path / "adapter")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    loaded = peft.PeftModel.from_pretrained(source, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=1e-4)
    # Merged, every matrix has changed and nothing else.
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-4)
    old = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "source").named_parameters())
    changed = {name for name, value in merged.named_parameters() if not torch.equal(value, old[name])}
    assert changed == linear | stacked


@pytest.fixture(scope="session", params=["qwen3_moe", "mixtral"])
def tiny_mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    folder = tmp_path_factory.mktemp("tiny-mixture")
    tokenizer.save_pretrained(folder)
    build(request.param, len(tokenizer)).save_pretrained(folder)
    return folder


def recipe_of(write: WriteRecipe, source: Path, adapter: dict[str, Any], **sections: Any) -> Any:
    train = {"epochs": 1, "learning_rate": 1.0e-2, "log_every": 1, **sections.pop("train", {})}
    transfer = {"freeze": 1, "adapter": {"type": "lora", "r": 2, **adapter}}
    recipe = write(source={"model": str(source)}, transfer=transfer, train=train, **sections)
    return orchestrator.load_recipe(recipe)


def losses_of(run: Any) -> list[float]:
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_experts_learn_and_what_is_saved_says_the_same_in_plain_peft_and_merged(
    write: WriteRecipe, tiny_mixture: Path, tmp_path: Path
) -> None:
    run = orchestrator.train(recipe_of(write, tiny_mixture, {}), tmp_path / "run")
    folder = run.directory / "model"
    scored = evaluate(folder, None, "test")["metrics"]["nll"]
    assert scored == pytest.approx(run.result["metrics"]["test"]["nll"], rel=1e-5)
    assert scored < run.result["before"]["test"]["nll"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert any("experts" in name for name in config["target_parameters"])
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    export(run.directory, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(loaded), atol=1e-5, rtol=1e-4)
    # Another run goes on from the merged model, not from an adapter whose changes are not of linear modules.
    with pytest.raises(InputError, match="changes weights of experts"):
        orchestrator.train(recipe_of(write, folder, {}), tmp_path / "on")


@pytest.mark.parametrize(
    "scale", [{"engine": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)], ids=["zero 0", "zero 1", "zero 2"]
)
def test_other_engines_learn_experts_as_pytorch_does(
    scale: dict[str, Any], write: WriteRecipe, tiny_mixture: Path, tmp_path: Path
) -> None:
    plain = losses_of(orchestrator.train(recipe_of(write, tiny_mixture, {}), tmp_path / "plain"))
    other = losses_of(orchestrator.train(recipe_of(write, tiny_mixture, {}, scale=scale), tmp_path / "other"))
    assert other == pytest.approx(plain, rel=1e-5)


def test_stored_features_and_checkpointing_leave_the_losses_of_experts_as_they_are(
    write: WriteRecipe, tiny_mixture: Path, tmp_path: Path
) -> None:
    found = [
        losses_of(orchestrator.train(recipe_of(write, tiny_mixture, {}, train=train), tmp_path / str(number)))
        for number, train in enumerate(
            [{"cache_prefix": False}, {"cache_prefix": True}, {"cache_prefix": False, "gradient_checkpointing": True}]
        )
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    ("adapter", "scale", "why"),
    [
        ({"dropout": 0.1}, {}, "transfer.adapter.dropout: 0.1"),
        ({"variant": "dora"}, {}, "transfer.adapter.variant: dora"),
        ({"init": "pissa"}, {}, "transfer.adapter.init: pissa"),
        ({"quantize": "nf4"}, {}, "transfer.adapter.quantize: nf4"),
        ({}, {"zero_stage": 3}, "scale.zero_stage: 3"),
    ],
)
def test_where_peft_does_not_reach_experts_the_user_is_told_and_the_rest_is_trained(
    adapter: dict[str, Any],
    scale: dict[str, Any],
    why: str,
    write: WriteRecipe,
    tiny_mixture: Path,
    tmp_path: Path,
) -> None:
    recipe = recipe_of(write, tiny_mixture, adapter, scale=scale)
    told = [problem for problem in check(recipe).warnings if "leaves out the experts" in problem.what]
    assert len(told) == 1
    assert why in str(told[0])
    run = orchestrator.train(recipe, tmp_path / "run")
    assert any("leaves out the experts" in text for text in run.result.get("warnings", []) or map(str, run.warnings))
    assert evaluate(run.directory, None, "test")["metrics"]["nll"] == pytest.approx(
        run.result["metrics"]["test"]["nll"], rel=1e-4
    )


def test_nobody_is_told_where_experts_are_reached_or_there_are_none(
    write: WriteRecipe, tiny_mixture: Path, tiny_llama: Path
) -> None:
    for source, adapter in (
        (tiny_mixture, {}),
        (tiny_llama, {"dropout": 0.1}),
        (tiny_mixture, {"targets": ["q_proj"]}),
    ):
        warnings = check(recipe_of(write, source, adapter)).warnings
        assert not any("experts" in problem.what for problem in warnings)
