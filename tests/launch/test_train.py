"""A run from recipe to result on one worker: records, resuming, starting over, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.numpy import load_file

from orchestrator import load_recipe, train
from orchestrator.errors import ClusterError, InputError, RunFailed
from orchestrator.runs.directory import RunDirectory
from orchestrator.training import hooks
from orchestrator.training.evaluation import Scored

WriteRecipe = Callable[..., Path]


def test_what_starts_a_run_imports_neither_torch_nor_ray() -> None:
    """Ray starts while the model is checked, which imports torch; recipes are refused without either."""
    code = "import sys, orchestrator.launch.train; print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def rows(directory: Path, split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


def weights_of(directory: Path) -> dict[str, Any]:
    return dict(load_file(directory / "model" / "model.safetensors"))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_toy: WriteRecipe, tiny_bert: Path, small_data: Path
) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    training = {"epochs": 40, "learning_rate": 2.0e-3, "log_every": 1}
    recipe = write_toy(folder / "recipe.yaml", tiny_bert, small_data, transfer={"freeze": 1}, train=training)
    return train(load_recipe(recipe), folder / "run").directory


def test_a_finished_run_holds_what_the_design_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "result.json",
        "predictions.parquet",
        "report.html",
        "checkpoints",
        "model",
        "logs",
    }
    assert oct(finished.stat().st_mode & 0o077) == "0o0"
    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["parameters"]["trained"] < record["parameters"]["total"]


def test_it_learns_the_toy_problem(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["metrics"]["test"]["accuracy"] > 0.8
    assert result["metrics"]["test"] == pytest.approx(
        {key: value for key, value in rows(finished, "test")[-1].items() if key in result["metrics"]["test"]}
    )


def test_frozen_blocks_are_bit_identical_after_training(finished: Path, tiny_bert: Path) -> None:
    before, after = load_file(tiny_bert / "model.safetensors"), weights_of(finished)
    frozen = [name for name in after if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))]
    assert len(frozen) == 5 + 16
    assert all((before[name] == after[name]).all() for name in frozen)
    assert any((before[name] != after[name]).any() for name in after if name.startswith("bert.encoder.layer.1."))


def test_the_recipe_as_run_runs_again_with_the_same_losses(finished: Path, tmp_path: Path) -> None:
    again = train(load_recipe(finished / "recipe.yaml"), tmp_path / "again").directory
    losses = [row["loss"] for row in rows(finished, "train")]
    assert losses
    assert [row["loss"] for row in rows(again, "train")] == losses
    assert all((value == weights_of(again)[name]).all() for name, value in weights_of(finished).items())


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    before = (finished / "result.json").stat().st_mtime_ns
    run = train(load_recipe(finished / "recipe.yaml"), finished)
    assert run.resumed
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_directory_is_refused_with_what_changed(finished: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml", ["train.learning_rate=0.5", "train.seed=3", "train.keep=5"])
    with pytest.raises(InputError) as refused:
        train(recipe, finished)
    text = str(refused.value)
    assert "has train.learning_rate: 0.002, now it is 0.5" in text, text
    assert "train.seed" in text
    assert "--fresh" in text
    assert "train.keep" not in text


def test_what_an_older_version_had_no_place_for_has_its_default(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    train(load_recipe(write_recipe(), ["train.steps=2"]), directory)
    (directory / "checkpoints" / "step-00000002" / "identity.json").unlink()  # It had no place for that, either.
    lines = (directory / "recipe.yaml").read_text().splitlines()
    (directory / "recipe.yaml").write_text("\n".join(line for line in lines if "offload:" not in line))
    assert len((directory / "recipe.yaml").read_text().splitlines()) == len(lines) - 1
    assert train(load_recipe(write_recipe(), ["train.steps=2"]), directory).resumed
    with pytest.raises(InputError, match=r"scale.offload: \"none\", now it is \"optimizer\""):
        train(
            load_recipe(write_recipe(), ["train.steps=2", "scale.offload=optimizer", "scale.zero_stage=1"]), directory
        )


def test_changed_data_are_refused(write_recipe: WriteRecipe, small_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "select", "test"):
        (data / f"{split}.jsonl").write_text((small_data / f"{split}.jsonl").read_text())
    recipe = load_recipe(write_recipe(target={"data": str(data)}), ["train.epochs=1"])
    train(recipe, tmp_path / "run")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(InputError, match="train data changed"):
        train(recipe, tmp_path / "run")


def test_a_run_goes_on_where_source_and_data_lie_elsewhere(
    write_recipe: WriteRecipe, small_data: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    first = train(load_recipe(write_recipe(), ["train.epochs=1"]), tmp_path / "run")
    for folder, name in ((small_data, "data"), (tiny_bert, "model")):
        shutil.copytree(folder, tmp_path / name)
    moved = write_recipe(source={"model": str(tmp_path / "model")}, target={"data": str(tmp_path / "data")})
    again = train(load_recipe(moved, ["train.epochs=1"]), tmp_path / "run")
    assert again.resumed
    assert again.result == first.result


def test_fresh_keeps_the_old_run_under_another_name(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(), ["train.steps=2"])
    train(recipe, tmp_path / "run")
    run = train(load_recipe(write_recipe(), ["train.steps=3"]), tmp_path / "run", fresh=True)
    assert run.result["steps"] == 3
    assert json.loads((tmp_path / "run.old-1" / "result.json").read_text())["steps"] == 2
    assert any("run.old-1" in note for note in run.notes)


def test_a_failed_first_attempt_does_not_block_a_corrected_recipe(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    bad = load_recipe(write_recipe(), ["train.learning_rate=1e+30", "train.max_grad_norm=null", "train.epochs=3"])
    with pytest.raises(RunFailed, match=r"at step \d+, so training was stopped"):
        train(bad, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "learning_rate" in record["reason"]
    assert not (tmp_path / "run" / "result.json").exists()


def test_two_commands_do_not_run_in_one_directory(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    with directory.lock(), pytest.raises(InputError, match="another command is running"):
        train(load_recipe(write_recipe()), tmp_path / "run")


def test_early_stopping_stops_and_keeps_the_best_checkpoint(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    overrides = ["train.epochs=30", "train.learning_rate=1e-7", "train.early_stopping={metric: f1_macro, patience: 2}"]
    result = train(load_recipe(write_recipe(), overrides), tmp_path / "run").result
    assert result["metric"] == "f1_macro"
    assert "did not improve for 2 evaluations" in result["stopped_early"]
    assert result["steps"] < 30 * 8
    scores = {row["step"]: (row["f1_macro"], -row["loss"]) for row in rows(tmp_path / "run", "select")}
    assert result["best_step"] == max(scores, key=lambda step: scores[step])
    assert result["metrics"]["select"]["f1_macro"] == pytest.approx(scores[result["best_step"]][0])
    assert (tmp_path / "run" / result["best_checkpoint"] / "COMMITTED").exists()


def test_only_so_many_checkpoints_are_kept_besides_the_best(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    overrides = ["train.steps=12", "train.save_every=2", "train.evaluate_every=3", "train.keep=2"]
    result = train(load_recipe(write_recipe(), overrides), tmp_path / "run").result
    kept = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {10, 12, result["best_step"]} | ({9} if result["best_step"] == 12 else set()) or kept >= {12}
    assert len(kept) <= 3
    assert result["best_step"] in kept


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    overrides = ["train.steps=12", "train.save_every=4", "train.evaluate_every=12", "train.log_every=1", "train.keep=3"]
    recipe = load_recipe(write_recipe(), overrides)
    whole = train(recipe, tmp_path / "whole").directory
    torn = train(recipe, tmp_path / "torn").directory
    (torn / "result.json").unlink()
    newest = torn / "checkpoints" / "step-00000012" / "weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run = train(recipe, torn)
    assert any("step-00000012 is damaged (weights.safetensors does not match its hash)" in note for note in run.notes)
    assert [row["loss"] for row in rows(torn, "train")] == [row["loss"] for row in rows(whole, "train")]
    assert all((value == weights_of(torn)[name]).all() for name, value in weights_of(whole).items())


@pytest.mark.parametrize(
    "overrides",
    [
        ["transfer.freeze=all"],
        ["transfer.freeze=50%", "transfer.layer_decay=0.8", "transfer.head.learning_rate_multiplier=3"],
        ["transfer.from_scratch=true"],
        ["transfer.adapter={type: lora, r: 4}", "transfer.freeze=1"],
        ["transfer.head.layers=[16]"],
        ["train.gradient_checkpointing=true"],
        ["train.precision=fp32", "train.micro_batch_size=4", "train.schedule=cosine"],
        ["target.limit={per_class: 8}", "train.epochs=1"],
        ["scale.zero_stage=2", "scale.offload=optimizer"],
        ["scale.zero_stage=3", "scale.offload=all"],
        ["scale.engine=deepspeed", "transfer.adapter={type: lora, r: 4}"],
    ],
    ids=" ".join,
)
def test_every_way_to_train_ends_with_a_model(write_recipe: WriteRecipe, tmp_path: Path, overrides: list[str]) -> None:
    linear = torch.nn.functional.linear
    run = train(load_recipe(write_recipe(), ["train.steps=4", *overrides]), tmp_path / "run")
    assert run.result["status"] == "finished"
    assert (run.directory / "model" / "README.md").read_text().startswith("---\n")
    assert yaml.safe_load((run.directory / "recipe.yaml").read_text())["name"] == "toy"
    assert 0.0 <= run.result["metrics"]["test"]["accuracy"] <= 1.0
    assert torch.nn.functional.linear is linear  # ZeRO-3 has one of its own.


def test_gradient_checkpointing_leaves_no_trace_in_the_exported_config(
    write_toy: WriteRecipe, tiny_gpt2: Path, small_data: Path, tmp_path: Path
) -> None:
    recipe = write_toy(tmp_path / "recipe.yaml", tiny_gpt2, small_data)
    found = []
    for name, checkpointing in (("with", "true"), ("without", "false")):
        given = ["train.steps=1", f"train.gradient_checkpointing={checkpointing}"]
        directory = train(load_recipe(recipe, given), tmp_path / name).directory
        found.append(json.loads((directory / "model" / "config.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["use_cache"] is True


def test_a_gpu_that_is_not_there_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ClusterError, match="this machine has no GPU"):
        train(load_recipe(write_recipe(), ["scale.gpus_per_worker=1"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fresh_does_not_move_a_run_that_is_running(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    train(load_recipe(write_recipe(), ["train.steps=1"]), tmp_path / "run")
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(InputError, match="another command is running"):
        train(load_recipe(write_recipe()), tmp_path / "run", fresh=True)


def test_without_its_best_checkpoint_a_run_ends_with_the_last_weights(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hooks.score
    scores = iter([0.9, 0.5, 0.5])

    def score_falling(*arguments: Any) -> Scored:
        scored = real(*arguments)
        return Scored({**scored.metrics, "accuracy": next(scores)}, scored.predictions)

    monkeypatch.setattr(hooks, "score", score_falling)
    recipe = load_recipe(write_recipe(), ["train.steps=12", "train.save_every=4", "train.evaluate_every=4"])
    first = train(recipe, tmp_path / "run").result
    assert first["best_step"] == 4
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / first["best_checkpoint"] / "weights.safetensors").unlink()
    run = train(recipe, tmp_path / "run")
    assert run.result["best_step"] == 12
    assert any("step 4, cannot be used (weights.safetensors is missing)" in note for note in run.notes)
