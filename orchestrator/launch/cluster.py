"""The Ray cluster of a run: an existing one, or a new one on this machine; and the workers that it has room for."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from orchestrator.errors import ClusterError, Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.worker_resources import minimum_resources, refuse_without_room, worker_resources

SECONDS_FOR_FIRST_PROCESSES = 10.0
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
HIDES_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Hides GPUs from Ray's processes that get none; by default they see all GPUs of their node."""
SECONDS_BETWEEN_RESIZES = 120.0
"""How often an elastic run checks for room for more workers; if there is, it resumes from its last checkpoint."""


def make_scaling_config(recipe: Recipe) -> Any:
    """Return Ray Train's `ScalingConfig` for the recipe's workers.

    Raises:
        ClusterError: the cluster has no room for them, and the recipe does not wait for nodes.
    """
    from ray.train import ScalingConfig

    scale, nodes = recipe.scale, cluster_nodes()
    if not scale.wait_for_nodes:
        refuse_without_room(recipe, scale.min_workers or scale.workers, minimum_resources(recipe, nodes), nodes)
    each = worker_resources(recipe, nodes)
    return ScalingConfig(
        num_workers=scale.workers if scale.min_workers is None else (scale.min_workers, scale.workers),
        use_gpu=each["GPU"] > 0,
        resources_per_worker={kind: number for kind, number in each.items() if number},
        elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
    )


def cluster_nodes() -> list[dict[str, float]]:
    """Return the resources of each living node of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def has_cluster() -> bool:
    """Whether RAY_ADDRESS names a Ray cluster, or this process is connected to one already."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


@contextlib.contextmanager
def ray_session(recipe: Recipe) -> Iterator[Callable[[], None]]:
    """Connect to the Ray cluster of RAY_ADDRESS, or start one on this machine that ends with the run.

    It starts in the background; call the yielded function to wait for it. A single worker needs no cluster.
    """
    if recipe.scale.workers == 1:
        refuse_missing_gpu(recipe)
        yield lambda: None
        return
    with ray_cluster(recipe.scale.workers) as wait_for_cluster:
        yield wait_for_cluster


@contextlib.contextmanager
def ray_cluster(num_processes: int, preload: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
    """Connect to a Ray cluster or start one, also for a single process.

    Args:
        num_processes: cores that a new cluster has at least.
        preload: modules that the processes of a new cluster import before they get work.
    """
    import ray

    if ray.is_initialized():
        yield lambda: None
        return
    refuse_dead_address(os.environ.get("RAY_ADDRESS", ""))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="start-ray") as pool:
        starting = pool.submit(start_ray, num_processes, preload)
        try:
            yield starting.result
        finally:
            wait([starting])
            ray.shutdown()


def start_ray(num_processes: int, preload: Sequence[str] = ()) -> None:
    """Connect this process to Ray; the arguments are those of `ray_cluster`."""
    import ray

    options: dict[str, Any] = {}
    # How often a process that waits for Ray checks for signals; by default, two of them within a second count as one.
    os.environ.setdefault("RAY_get_check_signal_interval_milliseconds", "100")
    if not os.environ.get("RAY_ADDRESS"):
        # If there are more workers than cores, they share them. A cluster of this machine alone loses no nodes.
        os.environ.setdefault(WATCHER, "0")
        os.environ.setdefault(HIDES_GPUS, "1")
        # Without `local`, Ray connects to any cluster that runs on this machine.
        options = {"address": "local", "num_cpus": max(num_processes, os.cpu_count() or 1), "include_dashboard": False}
        if preload:
            options["_system_config"] = {"preload_python_modules": list(preload)}
    logging.getLogger("ray").setLevel(logging.ERROR)  # Its messages at the start do not concern the run.
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    if options and preload:
        wait_for_processes(options["num_cpus"])


def wait_for_processes(count: int) -> None:
    """Wait for Ray's first processes: work that comes earlier goes to new ones, which import everything again."""
    from ray._private.state import workers

    until = time.monotonic() + SECONDS_FOR_FIRST_PROCESSES
    while len(workers()) < count and time.monotonic() < until:
        time.sleep(0.05)


def refuse_missing_gpu(recipe: Recipe) -> None:
    """Raise ClusterError if this process, the only worker, is to use a GPU that does not exist."""
    import torch

    refuse_gpu_here(recipe)
    if recipe.scale.gpus_per_worker == 1 and not torch.cuda.is_available():
        where, remedy = recipe.origin.where("scale.gpus_per_worker"), "set it to auto or 0, or use a machine with a GPU"
        raise ClusterError(str(Problem("gpus_per_worker is 1, and this machine has no GPU", where, remedy)))


def refuse_gpu_here(recipe: Recipe) -> None:
    """Raise ClusterError if this machine computes, and its GPU cannot be used as the recipe asks."""
    # With another cluster, this process only waits for the workers.
    if recipe.scale.workers == 1 or not os.environ.get("RAY_ADDRESS"):
        from orchestrator.training.engine.devices import check_gpu

        check_gpu(recipe)


def refuse_dead_address(address: str) -> None:
    """Raise ClusterError if nothing listens at `host:port`: Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=3.0).close()
    except OSError as error:
        what = f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}"
        raise ClusterError(f"{what}\n    -> start it, correct the address, or unset RAY_ADDRESS") from None


def has_notices() -> bool:
    """Whether Ray watches for nodes that will be taken away; not in a cluster of this machine alone."""
    return os.environ.get(WATCHER, "1") != "0"


def remove_orphaned_groups(others: Container[bytes] = ()) -> bool:
    """Remove the placement groups of this job's dead actors; Ray itself removes them when the whole job ends.

    Args:
        others: placement groups to keep.

    Returns:
        Whether there are still groups whose creators live.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    found = [(group, is_orphan) for group, is_orphan in find_placement_groups() if group not in others]
    for group, is_orphan in found:
        if is_orphan:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))
    return not all(is_orphan for _, is_orphan in found)


def find_placement_groups() -> list[tuple[bytes, bool]]:
    """Return the placement groups that actors of this job created, and whether the creator is dead.

    Ray's internal table is read, because `ray.util.placement_group_table` does not have the creators.
    """
    import ray
    from ray._private.state import state as ray_state
    from ray.core.generated import gcs_pb2

    job = ray.get_runtime_context().get_job_id()
    found = []
    for entry in ray_state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        exists = group.state != gcs_pb2.PlacementGroupTableData.REMOVED
        if exists and group.creator_job_id.hex() == job and is_actor(group.creator_actor_id):
            found.append((group.placement_group_id, group.creator_actor_dead))
    return found


def is_actor(id: bytes) -> bool:
    """Whether this is an actor's id; ids of other processes hold only their job."""
    import ray

    return bool(id) and not ray.ActorID(id).is_nil()
