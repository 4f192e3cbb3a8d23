"""What a run leaves: weights in the source's format, in files of a bounded size; and what a failed export leaves."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from orchestrator import load_recipe, train
from orchestrator.errors import RunFailed
from orchestrator.inference.predict import evaluate
from orchestrator.runs.directory import RunDirectory
from orchestrator.training import export, loop, results, worker, written_weights
from orchestrator.training.engine.base import in_fp32, on_cpu
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
SHORT = {"epochs": 1, "learning_rate": 1.0e-2}
FORMATS: dict[str, Callable[[str], torch.dtype]] = {
    "bf16": lambda name: torch.bfloat16,
    "fp16": lambda name: torch.float16,
    "fp32": lambda name: torch.float32,
    "mixed": lambda name: torch.float32 if "LayerNorm" in name else torch.bfloat16,
}


def copy_in(folder: Path, source: Path, dtype_for: Callable[[str], torch.dtype]) -> Path:
    """Copy a model's folder, its weights in other formats."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    save_file({name: value.to(dtype_for(name)) for name, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The trained weights of the next run in fp32, as its engine has them when the model is written."""
    found: dict[str, Tensor] = {}
    finish = worker.finish

    def look(session: Any, *others: Any) -> None:
        gather = session.engine.trained_weights

        def remember(dtype_for: Any) -> Any:
            found.update({name: value.clone() for name, value in gather(in_fp32).items()})
            return gather(dtype_for)

        session.engine.trained_weights = remember
        finish(session, *others)

    monkeypatch.setattr(worker, "finish", look)
    return found


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_is_written_in_the_format_of_its_source(
    kind: str, stage: int, write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    dtype_for = FORMATS[kind]
    source = copy_in(tmp_path / "source", tiny_bert, dtype_for)
    recipe = write_recipe(
        source={"model": str(source)}, transfer={"freeze": 1}, train=SHORT, scale={"zero_stage": stage}
    )
    train(load_recipe(recipe), tmp_path / "run")
    stored, written = load_file(source / "model.safetensors"), load_file(tmp_path / "run" / "model/model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == {name: dtype_for(name) for name in written}
    assert trained.keys() < written.keys()
    for name, value in written.items():
        expected = trained[name].to(value.dtype) if name in trained else stored[name]
        assert torch.equal(value, expected), name
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    name = str(dtype_for("")).removeprefix("torch.")
    assert config["dtype"] == name
    card = (tmp_path / "run/model/README.md").read_text(encoding="utf-8")
    assert (f"| weights | {name}" in card) == (name != "float32")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    assert model.dtype == dtype_for("")


def test_a_weight_that_fp16_cannot_hold_stays_in_fp32() -> None:
    small, large = torch.tensor([1.5, 2.0]), torch.tensor([1.5, 1e5])
    assert on_cpu(small, torch.float16).dtype == torch.float16
    assert torch.equal(on_cpu(large, torch.float16), large)
    assert on_cpu(torch.tensor([1, 2]), torch.bfloat16).dtype == torch.int64


def test_weights_are_written_in_files_of_a_bounded_size(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Tensor]
) -> None:
    monkeypatch.setattr(written_weights, "SHARD_SIZE", "20KB")
    run = train(load_recipe(write_recipe(train=SHORT)), tmp_path / "run")
    folder = run.directory / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {folder / name for name in index["weight_map"].values()}
    assert len(files) > 2
    assert all(path.stat().st_size < 25_000 for path in files)
    assert index["metadata"]["total_parameters"] == run.result["parameters"]["total"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(value, trained[name]) for name, value in model.named_parameters())
    scored = evaluate(run.directory, None, "test")["metrics"]["loss"]
    assert scored == pytest.approx(run.result["metrics"]["test"]["loss"], rel=1e-5)


def test_where_everything_is_trained_no_second_model_is_built(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("another model is built")

    monkeypatch.setattr(export, "assemble", refuse)
    for transfer in ({"freeze": 0}, {"adapter": {"type": "lora", "r": 2}}):
        recipe = write_recipe(train={**SHORT, "precision": "bf16"}, scale={"zero_stage": 3}, transfer=transfer)
        train(load_recipe(recipe), tmp_path / str(len(transfer)) / "-".join(transfer))


def write_model(folder: Path, config: Any, auto_class: str, tokenizer: Path | None) -> Path:
    """Save a model of this config with random weights, and another model's tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, auto_class)(config).save_pretrained(folder)
    if tokenizer is not None:
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_checkpointing_leaves_no_trace_in_the_config_of_a_model_without_a_cache(
    write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path
) -> None:
    size = len(transformers.AutoTokenizer.from_pretrained(tiny_bert))
    config = transformers.DistilBertConfig(vocab_size=size, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    assert not hasattr(config, "use_cache")
    source = write_model(tmp_path / "source", config, "DistilBertForMaskedLM", tiny_bert)
    train_too = {**SHORT, "gradient_checkpointing": True}
    run = train(load_recipe(write_recipe(source={"model": str(source)}, train=train_too)), tmp_path / "run")
    assert "use_cache" not in json.loads((run.directory / "model/config.json").read_text())


def decays_in_fp32(name: str) -> torch.dtype:
    return torch.float32 if name.endswith(".A_log") else torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_text_part_of_a_model_whose_whole_config_has_no_cache_is_exported(
    checkpointing: bool, write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path, small_data: Path
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    linear = {f"linear_{each}": value for each, value in [("num_key_heads", 2), ("num_value_heads", 2)]}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    size = len(transformers.AutoTokenizer.from_pretrained(tiny_bert))
    # Its tokenizer class adds a token.
    text = {**sizes, **linear, "vocab_size": size + 1, "num_hidden_layers": 4, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    assert not hasattr(config, "use_cache")
    # Its files have other names for the text part's weights than that part has.
    whole = write_model(tmp_path / "whole", config, "Qwen3_5ForConditionalGeneration", tiny_bert)
    source = copy_in(tmp_path / "source", whole, decays_in_fp32)
    recipe = write_recipe(
        source={"model": str(source)},
        target={
            "task": "causal-lm",
            "data": {"path": str(small_data)},
            "options": {"form": "text", "max_length": 32},
        },
        train={"steps": 2, "gradient_checkpointing": checkpointing},
    )
    run = train(load_recipe(recipe), tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(run.directory / "model")
    assert model.config.use_cache
    written = load_file(run.directory / "model" / "model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == {name: decays_in_fp32(name) for name in written}


def test_a_failed_export_leaves_a_run_that_the_same_command_goes_on_with(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(train=SHORT, scale={"max_failures": 0}))
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def fail(*given: Any) -> None:
            raise AttributeError("this config has no attribute that an export would want")

        patch.setattr(results, "export_model", fail)
        with pytest.raises(RunFailed, match=r"training is finished, with its best weights in (.|\n)*AttributeError"):
            train(recipe, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "failed"
    assert "the same command goes on from there without training again" in record["reason"]
    assert (tmp_path / "run" / whole.result["best_checkpoint"] / "COMMITTED").exists()
    assert whole.result["best_checkpoint"] in record["reason"]

    def refuse(*given: Any) -> None:
        raise AssertionError("a step is taken again")

    monkeypatch.setattr(loop, "take_step", refuse)
    again = train(recipe, tmp_path / "run")
    assert again.resumed
    assert again.result["metrics"] == whole.result["metrics"]
    written = load_file(tmp_path / "run/model/model.safetensors")
    expected = load_file(whole.directory / "model/model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def work(rank: int, folder: Path, recipe_path: Path) -> None:
    """One of two workers: trains, and writes how many whole parameters it held at a time while they were gathered."""
    os.environ.update({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"})
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    import deepspeed.utils

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    build_parts = deepspeed.utils.safe_get_full_fp32_param
    finish = worker.finish

    def count(parameter: Any) -> Any:
        nonlocal most
        most = max(most, sum(found() is not None for found in alive))
        whole = build_parts(parameter)
        alive.append(weakref.ref(whole))
        return whole

    def look(session: Any, *others: Any) -> None:
        weights = session.engine.trained_weights()
        assert bool(weights) == (rank == 0)
        if rank == 0:
            save_file(weights, folder / "trained.safetensors")
        deepspeed.utils.safe_get_full_fp32_param = count
        finish(session, *others)

    worker.finish = look
    prepared = prepare(load_recipe(recipe_path))
    worker.run_worker(prepared, RunDirectory(folder / "run"), 1, torch.device("cpu"), is_first=rank == 0)
    (folder / f"{rank}.json").write_text(json.dumps({"gathered": len(alive), "most": most}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("transfer", [{"freeze": 1}, {"freeze": 0}, {"adapter": {"type": "lora", "r": 2}}], ids=str)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_workers_leave_the_model_to_the_first(
    stage: int, transfer: dict[str, Any], write_recipe: WriteRecipe, tiny_bert: Path, tmp_path: Path
) -> None:
    source = copy_in(tmp_path / "source", tiny_bert, FORMATS["bf16"])
    recipe = write_recipe(
        source={"model": str(source)},
        transfer=transfer,
        train={**SHORT, "precision": "fp32"},
        scale={"workers": 2, "zero_stage": stage},
    )
    RunDirectory(tmp_path / "run").create()
    multiprocessing.spawn(work, (tmp_path, recipe), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["gathered"] == second["gathered"] > 8
    assert second["most"] <= 1
    trained = load_file(tmp_path / "trained.safetensors")
    (path,) = (tmp_path / "run/model").glob("*.safetensors")
    written = load_file(path)
    if "adapter" in transfer:
        # An adapter is nothing that the source has, so it keeps its digits.
        short = {name.replace(".default", "").replace(".modules_to_save", ""): name for name in trained}
        assert written.keys() == short.keys()
        assert all(torch.equal(value, trained[short[name]]) for name, value in written.items())
        return
    stored = load_file(source / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    for name, value in written.items():
        assert torch.equal(value, trained[name].bfloat16() if name in trained else stored[name]), name
