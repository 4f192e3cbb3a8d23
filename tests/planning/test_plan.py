"""What a plan says is what a training takes, from shapes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, MixtralConfig

import orchestrator
from orchestrator import load_recipe
from orchestrator.cli.main import main
from orchestrator.errors import InputError, ModelError
from orchestrator.planning import EFFICIENCY, cpu_machine, measuring, parse_machine
from orchestrator.planning.measuring import PassSettings, measure
from orchestrator.planning.plan import TrainingPlan, plan
from orchestrator.planning.plan_input import open_plan_input
from orchestrator.planning.sharding_options import SPARE
from orchestrator.planning.simulation import ResourceTracker, fake_weights, simulate
from orchestrator.planning.workload import measure_workload
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.tasks.base import Batch
from orchestrator.training.assembling import assemble
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
HUB = {"model": "nobody/nothing-at-all"}


def write_config(folder: Path, layers: int = 2) -> Path:
    """The config of a Llama without weights."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.save_pretrained(folder)
    return folder


def language_recipe(config: Path, **sections: Any) -> Recipe:
    data = {
        "name": "planned",
        "source": {**HUB, "config": str(config)},
        "target": {"task": "causal-lm", "data": "nobody/data", "options": {"form": "text", "max_length": 32}},
        **sections,
    }
    return parse_recipe(yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("dtype", "precision", "stage", "loading", "written"),
    [
        ("bfloat16", "bf16", 0, 2, 2),
        ("bfloat16", "fp32", 0, 4 * 8, 2),
        ("bfloat16", "fp32", 3, 4, 2),
        ("float16", "bf16", 2, 4 * 8, 2),
        ("float32", "fp32", 0, 4, 4),
    ],
)
def test_a_plan_tells_the_main_memory_of_loading_and_writing_a_model(
    dtype: str, precision: str, stage: int, loading: int, written: int, tmp_path: Path
) -> None:
    path = write_config(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": dtype}))
    recipe = language_recipe(
        tmp_path, train={"precision": precision, "steps": 2}, scale={"workers": 16, "zero_stage": stage}
    )
    machine = parse_machine("2x8xH100-80GB")
    found = plan(recipe, machine)
    assert found.loading_bytes == loading * found.total
    assert found.model_bytes == written * found.total


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump({**recipe.model_dump(), **sections}))


@pytest.mark.parametrize("freeze", [0, 1])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_a_pass_without_values_holds_what_one_with_values_does(
    model: str, freeze: int, write_recipe: WriteRecipe, request: pytest.FixtureRequest
) -> None:
    source = {"model": str(request.getfixturevalue(model))}
    recipe = load_recipe(write_recipe(source=source, transfer={"freeze": freeze}, train={"precision": "fp32"}))
    prepared = prepare(recipe)
    encoded = prepared.encoded("train")
    rows = np.argsort(-encoded.lengths)[:24]
    arrays, totals = encoded.batch(rows), encoded.totals(rows)
    parts = assemble(prepared)
    parts.frozen.set_train_mode(parts.module)
    inputs, targets = (
        {name: torch.from_numpy(values) for name, values in each.items()} for each in (arrays.inputs, arrays.targets)
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepared.task.loss(parts.module(**inputs), Batch(inputs, targets), totals).backward()
    held, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    with fake_weights(parts.module):
        found = simulate(parts, prepared.task, arrays, totals, autocast=False)
    trained = sum(value.numel() for value in parts.module.parameters() if value.requires_grad)
    assert found.gradients == 4 * trained
    assert found.with_gradients == pytest.approx(most, rel=0.03)


def test_operations_are_those_of_the_matrix_products(write_recipe: WriteRecipe, tiny_bert: Path) -> None:
    plan_input = open_plan_input(load_recipe(write_recipe(train={"precision": "fp32"})))
    recipe = plan_input.prepared.recipe
    load = measure_workload(plan_input, recipe, 8, False, "cpu", False)
    found = measure(plan_input, recipe, load, PassSettings(False, "fp32", False))
    config = json.loads((tiny_bert / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    of_layer = 4 * width**2 + 2 * width * inner
    # Two for a multiplication with addition; the last layer computes most for one position alone.
    assert 2 * of_layer < found.forward.linear < 2 * of_layer * config["num_hidden_layers"]
    assert found.whole.linear == pytest.approx(3 * found.forward.linear, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_planned_in_any_precision_by_those_that_a_token_is_sent_to(precision: str, tmp_path: Path) -> None:
    hidden, inner, sent_to = 32, 64, 2
    MixtralConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
        num_experts_per_tok=sent_to,
    ).save_pretrained(tmp_path)
    recipe = language_recipe(tmp_path, train={"steps": 1, "precision": precision, "global_batch_size": 4})
    plan_input = open_plan_input(recipe)
    workload = measure_workload(plan_input, recipe, 4, False, "cpu", False)
    found = measure(plan_input, recipe, workload, PassSettings(False, precision, precision == "bf16"))  # type: ignore[arg-type]
    of_experts = sent_to * 3 * 2 * hidden * inner
    assert of_experts < found.forward.linear < 1.6 * of_experts
    assert found.whole.linear == pytest.approx(3 * found.forward.linear, rel=0.05)
    assert plan(recipe, parse_machine("H100")).total > 8 * 3 * hidden * inner


def test_frozen_blocks_are_planned_as_stored_where_a_run_stores_them(write_recipe: WriteRecipe) -> None:
    def plan_of(name: str, **sections: Any) -> TrainingPlan:
        return plan(load_recipe(write_recipe(f"{name}.yaml", **sections)), parse_machine("A100"))

    stored = {"head": {"transfer": {"freeze": "all"}}, "layer": {"transfer": {"freeze": 1}}}
    assert all(plan_of(name, **sections).cache_bytes for name, sections in stored.items())
    computed = {
        "nothing-frozen": {"transfer": {"freeze": 0}},
        "once": {"transfer": {"freeze": 1}, "train": {"epochs": 1}},
        "forbidden": {"transfer": {"freeze": 1}, "train": {"cache_prefix": False}},
        "zero-3": {"transfer": {"freeze": 1}, "scale": {"zero_stage": 3}},
    }
    assert {name: plan_of(name, **sections).cache_bytes for name, sections in computed.items()} == dict.fromkeys(
        computed
    )


def test_what_moves_more_than_it_computes_counts_by_its_bytes() -> None:
    balance, width = 10.0, 64

    def count(work: Any) -> float:
        with FakeTensorMode(allow_non_fake_inputs=True), ResourceTracker(0, balance) as tally:
            numbers = torch.ones(width, width)
            before = tally.operations
            work(numbers)
            return tally.operations - before

    assert count(lambda numbers: numbers.view(-1).unsqueeze(0)) == 0
    assert count(lambda numbers: numbers.relu()) == balance * 2 * 4 * width**2
    assert count(lambda numbers: numbers @ numbers) == max(2 * width**3, balance * 3 * 4 * width**2)
    with FakeTensorMode(allow_non_fake_inputs=True), ResourceTracker(0) as tally:
        torch.ones(width, width).relu()
        assert tally.operations == 0


@pytest.mark.parametrize(
    "transfer",
    [
        {"freeze": 7},
        {"freeze": 20, "adapter": {"type": "lora", "r": 4}},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"freeze": "all"}, marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_left_out_are_worked_out(
    transfer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = language_recipe(write_config(tmp_path, 24), transfer=transfer, train={"steps": 1, "global_batch_size": 4})
    plan_input = open_plan_input(recipe)
    load = measure_workload(plan_input, recipe, 4, True, "cuda", True)
    some = measure(plan_input, recipe, load, PassSettings(True, "bf16", True))
    monkeypatch.setattr(measuring, "LAYERS_SIMULATED", 100)
    every = measure(plan_input, recipe, load, PassSettings(True, "bf16", True))
    assert some.size == every.size
    for name in ("activations", "with_gradients", "gradients", "operations", "frozen_operations"):
        assert getattr(some.first, name) == pytest.approx(getattr(every.first, name), rel=1e-3), name


def test_a_large_model_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)
    recipe = language_recipe(
        tmp_path,
        transfer={"adapter": {"type": "lora", "r": 16}},
        train={"steps": 10, "global_batch_size": 64, "gradient_checkpointing": True, "precision": "bf16"},
        scale={"workers": 64, "zero_stage": 3},
    )
    found = plan(recipe, parse_machine("8x8xH100-80GB"))
    assert found.total - found.trained == 70_553_706_496
    assert found.chosen.memory.parts["weights"] == -(-2 * found.total // 64)
    assert found.chosen.fits
    fits = {(option.zero_stage, option.offload): option.fits for option in found.options}
    assert fits[3, "none"]
    assert not fits[2, "none"]


@pytest.mark.parametrize("name", ["llama70b-config.json", "config.json", "llama.txt"])
def test_a_config_may_have_any_name(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "model") / "config.json"
    moved = shutil.copy(config, tmp_path / name)
    found = plan(language_recipe(moved, train={"steps": 1}), parse_machine("T4"))
    assert found.total == plan(language_recipe(config.parent, train={"steps": 1}), parse_machine("T4")).total


@pytest.mark.parametrize(("text", "words"), [("[]", "odd.json holds no JSON object"), ("{", "odd.json cannot be read")])
def test_a_config_that_is_none_is_refused_by_its_name(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(InputError, match=words):
        plan(language_recipe(tmp_path / "odd.json"), parse_machine("T4"))


def test_the_pace_is_that_of_the_precision(tmp_path: Path) -> None:
    recipe = language_recipe(write_config(tmp_path), train={"steps": 1})
    # A T4 has no bf16, and in fp32 an eighth of what its data sheet tells of fp16.
    assert plan(recipe, parse_machine("T4")).compute_cost.rate == EFFICIENCY * 8.1e12
    assert plan(recipe, parse_machine("A100")).compute_cost.rate == EFFICIENCY * 312e12
    in_fp32 = changed(recipe, train={"steps": 1, "precision": "fp32"})
    assert plan(in_fp32, parse_machine("A100")).compute_cost.rate == EFFICIENCY * 19.5e12


def test_following_the_advice_makes_it_fit(tmp_path: Path) -> None:
    train = {"steps": 1, "global_batch_size": 64}
    recipe = language_recipe(write_config(tmp_path), train=train, scale={"workers": 2})
    total = plan(recipe, parse_machine("2xT4")).chosen.memory.total
    small = replace(parse_machine("2xT4"), memory=int(0.996 * total / (1 - SPARE)))
    before = plan(recipe, small)
    assert not before.chosen.fits
    assert before.advice
    after = plan(advised(before), small)
    assert after.chosen.fits
    assert not after.advice


def advised(found: TrainingPlan) -> Recipe:
    data = found.recipe.model_dump()
    for place, value in found.advice.items():
        section, key = place.split(".")
        data[section][key] = value
    return changed(found.recipe, **data)


def test_nothing_is_advised_where_nothing_helps(tmp_path: Path) -> None:
    recipe = language_recipe(write_config(tmp_path), train={"steps": 1})
    found = plan(recipe, replace(parse_machine("T4"), memory=2**20))
    assert (found.chosen.fits, found.advice) == (False, {})


def test_more_workers_than_places_do_not_fit(tmp_path: Path) -> None:
    recipe = language_recipe(write_config(tmp_path), train={"steps": 1}, scale={"workers": 2})
    assert not plan(recipe, parse_machine("H100")).chosen.fits
    assert plan(recipe, parse_machine("2xH100")).chosen.fits


def test_a_model_out_of_reach_is_told_with_what_a_plan_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = language_recipe(write_config(tmp_path))
    with pytest.raises(ModelError, match=r"set source\.config to a copy of its config\.json"):
        plan(changed(recipe, source=HUB))
    with pytest.raises(InputError, match=r"nowhere/config\.json cannot be read"):
        plan(changed(recipe, source={**HUB, "config": str(tmp_path / "nowhere")}))


def test_without_data_the_number_of_examples_is_asked_for(tmp_path: Path) -> None:
    recipe = language_recipe(write_config(tmp_path), train={"epochs": 3, "global_batch_size": 10})
    found = plan(recipe, parse_machine("H100"))
    assert found.steps is None
    assert found.compute_cost.seconds is None
    assert any("give --examples N" in note for note in found.notes)
    found = plan(recipe, parse_machine("H100"), num_examples=95)
    assert found.steps == 30
    assert found.compute_cost.seconds == pytest.approx(30 * found.compute_cost.seconds_a_step)


def test_a_model_that_looks_into_its_inputs_is_planned_from_its_config_too(
    write_recipe: WriteRecipe, tmp_path: Path, tiny_gpt2: Path
) -> None:
    shutil.copy(tiny_gpt2 / "config.json", tmp_path)
    near = load_recipe(write_recipe(source={"model": str(tiny_gpt2)}))
    far = load_recipe(write_recipe("far.yaml", source={"model": str(tiny_gpt2), "config": str(tmp_path)}))
    found, expected = plan(far, parse_machine("H100")), plan(near, parse_machine("H100"))
    assert (found.total, found.trained) == (expected.total, expected.trained)


def test_examples_that_are_at_hand_are_counted_without_the_model(
    write_recipe: WriteRecipe, tmp_path: Path, tiny_bert: Path
) -> None:
    shutil.copy(tiny_bert / "config.json", tmp_path)
    near = load_recipe(write_recipe(train={"epochs": 1}))
    far = load_recipe(write_recipe("far.yaml", train={"epochs": 1}, source={**HUB, "config": str(tmp_path)}))
    found, expected = plan(far, parse_machine("H100")), plan(near, parse_machine("H100"))
    assert (found.steps, found.total) == (expected.steps, expected.total)
    with pytest.raises(InputError, match="-1 examples are too few"):
        plan(far, num_examples=-1)


def test_the_pace_of_a_run_is_what_it_computed_in_its_time(
    write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(train={"epochs": 2}), tmp_path / "run"
    assert main(["train", str(recipe), "--output", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["peak_bytes"] > 10**8
    capsys.readouterr()
    assert main(["plan", str(recipe), "--from", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["effort"]["basis"] == f"the throughput of {run}"
    # The same recipe takes as long as it did.
    assert found["effort"]["seconds"] == pytest.approx(result["seconds"], rel=0.01)
    assert main(["plan", str(recipe), "--from", str(tmp_path)]) == 2
    assert "there is no finished run" in capsys.readouterr().err


def test_workers_without_gpus_share_the_memory_of_their_node(tmp_path: Path) -> None:
    machine = cpu_machine("two nodes", 2, 8, 10**9)
    recipe = language_recipe(write_config(tmp_path), train={"steps": 1})
    rooms = [plan(changed(recipe, scale={"workers": number}), machine).room for number in (1, 2, 4)]
    assert rooms == [pytest.approx((1 - SPARE) * each) for each in (10**9, 10**9, 5 * 10**8)]


def test_a_number_format_that_the_machine_lacks_is_told(tmp_path: Path) -> None:
    recipe = language_recipe(write_config(tmp_path), train={"steps": 1, "precision": "bf16"})
    assert "a T4-16GB does not compute bf16 in hardware" in " ".join(plan(recipe, parse_machine("T4")).notes)


def test_python_plans_as_the_command_does(write_recipe: WriteRecipe) -> None:
    found = orchestrator.plan(load_recipe(write_recipe()), on="A100-40GB")
    assert (found.machine.name, found.chosen.fits) == ("A100-40GB", True)


def test_the_plan_is_told_part_by_part(write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(transfer={"freeze": 1}))
    assert main(["plan", recipe, "--on", "2x8xA100-40GB"]) == 0
    told = capsys.readouterr().out
    for words in ("2 machines with 8 places each (A100-40GB)", "fits", "stored features", "as in the recipe"):
        assert words in told
    assert main(["plan", recipe, "--on", "8xZ80"]) == 2
    assert "is not a shape such as" in capsys.readouterr().err
