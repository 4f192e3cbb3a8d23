"""Workers are counted by the nodes that they fit on, as Ray places them; what can never be placed is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from orchestrator import load_recipe
from orchestrator.cli.main import main
from orchestrator.errors import ClusterError
from orchestrator.launch import cluster
from orchestrator.launch.cluster import make_scaling_config
from orchestrator.recipe import Recipe
from orchestrator.recipe.worker_resources import count_room, worker_resources

WriteRecipe = Callable[..., Path]
HEAD, GPUS, CPUS = {"CPU": 96.0}, {"CPU": 96.0, "GPU": 8.0}, {"CPU": 32.0}


@pytest.fixture
def make(write_recipe: WriteRecipe) -> Callable[..., Recipe]:
    path = write_recipe(train={"global_batch_size": 480})
    return lambda **scale: load_recipe(path, [f"scale.{name}={value}" for name, value in scale.items()])


@pytest.mark.parametrize(
    ("scale", "nodes", "cpus", "gpus"),
    [
        # The cores of the head node are of no use to workers with GPUs.
        ({"workers": 32}, [HEAD, *[GPUS] * 4], 12, 1),
        ({"workers": 4}, [HEAD, *[{"CPU": 96.0, "GPU": 1.0}] * 4], 96, 1),
        ({"workers": 4}, [GPUS], 24, 1),
        # Without GPUs all nodes are alike, and no worker spans two of them.
        ({"workers": 3}, [CPUS, CPUS], 16, 0),
        ({"workers": 2}, [CPUS, {"CPU": 8.0}], 16, 0),
        ({"workers": 2}, [{"memory": 1.0}, CPUS], 16, 0),
        ({"workers": 4, "gpus_per_worker": 0}, [GPUS], 24, 0),
        # As many of an elastic training as there is room for now.
        ({"workers": "[2, 32]"}, [HEAD, GPUS], 12, 1),
        # None yet.
        ({"workers": 4, "wait_for_nodes": "true", "gpus_per_worker": 1}, [HEAD], 1, 1),
    ],
)
def test_workers_share_the_cores_of_the_nodes_that_they_fit_on(
    scale: dict[str, Any], nodes: list[dict[str, float]], cpus: int, gpus: int, make: Callable[..., Recipe]
) -> None:
    assert worker_resources(make(**scale), nodes) == {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("scale", "nodes", "words"),
    [
        # Their cores and GPUs in all would do.
        ({"workers": 4, "cpus_per_worker": 24, "gpus_per_worker": 1}, [HEAD, {"CPU": 8.0, "GPU": 4.0}], "room for 0"),
        (
            {"workers": 5, "cpus_per_worker": 20},
            [CPUS] * 4,
            r"4 \(4 nodes: 32 CPU, 0 GPU; [\s\S]*to 4 or less",
        ),
        ({"workers": "[3, 8]", "cpus_per_worker": 20}, [CPUS] * 2, "3 workers with 20 CPU each do not fit"),
        # Rather than leave GPUs alone without a word.
        ({"workers": 4}, [{"CPU": 96.0, "GPU": 2.0}], "4 workers with 1 CPU and 1 GPU each do not fit"),
    ],
)
def test_workers_that_can_never_be_placed_are_refused(
    scale: dict[str, Any],
    nodes: list[dict[str, float]],
    words: str,
    make: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "cluster_nodes", lambda: nodes)
    with pytest.raises(ClusterError, match=words):
        make_scaling_config(make(**scale))
    gpus = scale.get("gpus_per_worker", int(any("GPU" in node for node in nodes)))
    assert make_scaling_config(make(**{**scale, "wait_for_nodes": "true", "gpus_per_worker": gpus})).use_gpu is (
        gpus == 1
    )


@pytest.mark.parametrize("verb", ["train", "search"])
def test_the_command_says_so_with_its_exit_code(
    verb: str, write_recipe: WriteRecipe, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ["scale.workers=2", "scale.cpus_per_worker=3"]
    assert main([verb, str(write_recipe()), *scale, "--output", str(tmp_path / "run")]) == 3
    assert "the cluster has room for 1 (1 node: 4 CPU, 0 GPU)" in capsys.readouterr().err


def test_the_room_is_what_ray_can_place(ray_cluster: None) -> None:
    nodes = cluster.cluster_nodes()
    assert count_room({"CPU": 3, "GPU": 0}, nodes) == 1
    for number, fits in ((1, True), (2, False)):
        group = placement_group([{"CPU": 3}] * number)
        assert group.wait(1 if not fits else 30) is fits
        remove_placement_group(group)
    assert ray.is_initialized()
