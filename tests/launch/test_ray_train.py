"""One worker or two, whatever the cut and the ZeRO stage: the same curve, every example counted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator import load_recipe, train
from orchestrator.errors import ClusterError, ModelError, RunFailed
from orchestrator.launch import train as run
from orchestrator.launch.cluster import make_scaling_config
from orchestrator.runs.directory import RunDirectory
from orchestrator.training import assembling as assemble
from orchestrator.training.prepare import Prepared

# 57 examples: the last of each epoch's 8 batches holds a single one, so that one of two workers has none.
CURVE = [
    "target.limit.train=57",
    "train.steps=16",
    "train.log_every=1",
    "train.evaluate_every=8",
    "transfer.head.dropout=0",
    "train.learning_rate=3e-4",
]


@pytest.fixture(scope="module")
def still_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without dropout, so that the cut of a batch does not matter."""
    folder = tmp_path_factory.mktemp("still") / "bert"
    folder.mkdir()
    for file in tiny_bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def one_worker(
    still_bert: Path, small_data: Path, write_toy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("one-worker")
    recipe = write_toy(folder / "recipe.yaml", still_bert, small_data)
    return train(load_recipe(recipe, CURVE), folder / "run").directory


def losses(directory: Path, split: str) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == split]


def check_same_curve(one_worker: Path, directory: Path, *overrides: str, tolerance: float = 1e-5) -> None:
    train(load_recipe(one_worker.parent / "recipe.yaml", [*CURVE, *overrides]), directory)
    assert len(losses(directory, "train")) == 16
    for split in ("train", "select", "test"):
        assert losses(directory, split) == pytest.approx(losses(one_worker, split), rel=tolerance), split


@pytest.mark.parametrize(
    "overrides",
    [["train.micro_batch_size=2"], ["scale.engine=deepspeed"], ["scale.zero_stage=1"], ["scale.zero_stage=3"]],
    ids=" ".join,
)
def test_one_worker_has_the_same_curve_however_it_computes(
    one_worker: Path, tmp_path: Path, overrides: list[str]
) -> None:
    check_same_curve(one_worker, tmp_path / "run", *overrides)


def test_two_workers_have_the_curve_of_one(one_worker: Path, tmp_path: Path, ray_cluster: None) -> None:
    check_same_curve(one_worker, tmp_path / "run", "scale.workers=2", "train.micro_batch_size=2")
    rows = pq.read_table(tmp_path / "run" / "predictions.parquet")
    alone = pq.read_table(one_worker / "predictions.parquet")
    assert rows["source"].to_pylist() == alone["source"].to_pylist()
    assert len(set(rows["source"].to_pylist())) == 30


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_deepspeed_workers_have_the_curve_of_one(
    one_worker: Path, tmp_path: Path, ray_cluster: None, stage: int
) -> None:
    overrides = ["scale.workers=2", "scale.engine=deepspeed", f"scale.zero_stage={stage}"]
    check_same_curve(one_worker, tmp_path / "run", *overrides, tolerance=1e-4)


def test_more_workers_than_the_cluster_holds_are_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, ray_cluster: None
) -> None:
    recipe = load_recipe(write_recipe(), ["scale.workers=8", "scale.cpus_per_worker=1"])
    with pytest.raises(ClusterError, match=r"room for 4 \(1 node: 4 CPU[\s\S]*set scale.workers to 4 or less"):
        train(recipe, tmp_path / "run")


def test_a_run_may_wait_for_nodes_that_are_not_there_yet(write_recipe: Callable[..., Path], ray_cluster: None) -> None:
    wanted = ["scale.workers=8", "scale.cpus_per_worker=1", "scale.gpus_per_worker=1"]
    with pytest.raises(ClusterError, match="8 workers with 1 CPU and 1 GPU each do not fit"):
        make_scaling_config(load_recipe(write_recipe(), wanted))
    size = make_scaling_config(load_recipe(write_recipe(), [*wanted, "scale.wait_for_nodes=true"]))
    assert (size.num_workers, size.resources_per_worker) == (8, {"CPU": 1, "GPU": 1})


def test_what_a_worker_finds_wrong_is_said_once_and_not_tried_again(
    write_recipe: Callable[..., Path], tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of an architecture whose structure only shows when it is loaded, which the workers do.
    monkeypatch.setattr(assemble, "check_structure", lambda _: None)
    recipe = load_recipe(write_recipe(), ["scale.workers=2", "transfer.freeze=7"])
    with pytest.raises(ModelError, match="freeze depth is 7, but the model has 2 layers"):
        train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "logs" / "worker-0.log").exists()


def test_what_the_first_worker_alone_cannot_do_ends_the_run_at_once(
    write_recipe: Callable[..., Path], tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_workers = run.run_workers

    def without_place_for_metrics(prepared: Prepared, directory: RunDirectory, *others: Any) -> None:
        directory.metrics.mkdir()
        run_workers(prepared, directory, *others)

    monkeypatch.setattr(run, "run_workers", without_place_for_metrics)
    with pytest.raises(RunFailed, match=r"Is a directory: '.*/metrics\.jsonl'; the checkpoints are whole") as caught:
        train(load_recipe(write_recipe(), ["scale.workers=2"]), tmp_path / "run")
    assert "failed more than" not in str(caught.value)


@pytest.mark.slow
def test_an_elastic_run_has_the_same_curve_with_as_many_workers_as_there_is_room_for(
    one_worker: Path, tmp_path: Path, ray_cluster: None
) -> None:
    # The cluster has 4 cores, so there is room for two; what they left is gone on with by one.
    directory = tmp_path / "run"
    check_same_curve(one_worker, directory, "scale.workers=[1, 4]", "scale.cpus_per_worker=2", "train.keep=2")
    assert json.loads((directory / "run.json").read_text())["world_size"] == 2
    (directory / "result.json").unlink()
    (directory / "checkpoints" / "step-00000016" / "COMMITTED").unlink()
    check_same_curve(one_worker, directory, "scale.workers=1", "scale.min_workers=1")
    record = json.loads((directory / "run.json").read_text())
    assert record["world_size"] == 1
    assert "workers from step 9 on: 1; before: 2" in record["notes"]
