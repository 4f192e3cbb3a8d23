"""The Ray cluster that a run is on: the one that is named, or one of this machine's own; and what it has room for."""

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
from orchestrator.launch.placement import minimum_resources, refuse_without_room, worker_resources
from orchestrator.recipe import Recipe

SECONDS_FOR_FIRST_PROCESSES = 10.0
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
HIDES_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Has Ray's processes that are given no GPU see none; by itself Ray lets them see all of their node."""
SECONDS_BETWEEN_LOOKS_FOR_MORE = 120.0
"""An elastic run that finds room for more workers begins again from its last checkpoint."""


def make_scaling_config(recipe: Recipe) -> Any:
    """How many workers of which size.

    Raises:
        ClusterError: the cluster cannot hold them, and the recipe does not wait for one that can.
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
        elastic_resize_monitor_interval_s=SECONDS_BETWEEN_LOOKS_FOR_MORE,
    )


def cluster_nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def has_cluster() -> bool:
    """Whether this process is told of a Ray cluster, or is in one already."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


@contextlib.contextmanager
def ray_session(recipe: Recipe) -> Iterator[Callable[[], None]]:
    """The Ray cluster for the run: the one that this process or RAY_ADDRESS names, else a new one on this machine.

    It starts in the background; call what is yielded to wait for it. A new one ends with the run. A single worker
    needs none.
    """
    if recipe.scale.workers == 1:
        refuse_missing_gpu(recipe)
        yield lambda: None
        return
    with ray_cluster(recipe.scale.workers) as wait_for_cluster:
        yield wait_for_cluster


@contextlib.contextmanager
def ray_cluster(num_processes: int, preload: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
    """The same for so many processes, also for one.

    Args:
        preload: modules that the processes of a new cluster import before they are given work.
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
    import ray

    options: dict[str, Any] = {}
    # How often a process that waits for Ray looks whether a signal came; else two of them within a second are one.
    os.environ.setdefault("RAY_get_check_signal_interval_milliseconds", "100")
    if not os.environ.get("RAY_ADDRESS"):
        # More workers than cores share them. Nobody takes nodes away from a cluster of this one machine.
        os.environ.setdefault(WATCHER, "0")
        os.environ.setdefault(HIDES_GPUS, "1")
        # Otherwise Ray connects to any cluster that somebody has started on this machine.
        options = {"address": "local", "num_cpus": max(num_processes, os.cpu_count() or 1), "include_dashboard": False}
        if preload:
            options["_system_config"] = {"preload_python_modules": list(preload)}
    logging.getLogger("ray").setLevel(logging.ERROR)  # What it says on starting is not about the run.
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    if options and preload:
        wait_for_processes(options["num_cpus"])


def wait_for_processes(count: int) -> None:
    """Wait until Ray knows its first processes: work that comes earlier is given to new ones, which import again."""
    from ray._private.state import workers

    until = time.monotonic() + SECONDS_FOR_FIRST_PROCESSES
    while len(workers()) < count and time.monotonic() < until:
        time.sleep(0.05)


def refuse_missing_gpu(recipe: Recipe) -> None:
    """Raise ClusterError where the one worker, which is this process, is to have a GPU and there is none for it."""
    import torch

    refuse_gpu_here(recipe)
    if recipe.scale.gpus_per_worker == 1 and not torch.cuda.is_available():
        where, remedy = recipe.origin.where("scale.gpus_per_worker"), "set it to auto or 0, or use a machine with a GPU"
        raise ClusterError(str(Problem("gpus_per_worker is 1, and this machine has no GPU", where, remedy)))


def refuse_gpu_here(recipe: Recipe) -> None:
    """Raise ClusterError where this machine is to compute, and its GPU cannot be used as the recipe wants."""
    # On another cluster this process only waits for the workers.
    if recipe.scale.workers == 1 or not os.environ.get("RAY_ADDRESS"):
        from orchestrator.training.engine.devices import refuse_unusable_gpu

        refuse_unusable_gpu(recipe)


def refuse_dead_address(address: str) -> None:
    """Raise ClusterError where nobody listens at `host:port`: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=3.0).close()
    except OSError as error:
        what = f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}"
        raise ClusterError(f"{what}\n    -> start it, correct the address, or unset RAY_ADDRESS") from None


def has_notices() -> bool:
    """Whether anybody takes nodes away: not from a cluster of this one machine."""
    return os.environ.get(WATCHER, "1") != "0"


def remove_orphaned_groups(others: Container[bytes] = ()) -> bool:
    """Give back what this job's dead actors had reserved: Ray itself does when the whole job has ended.

    Args:
        others: placement groups to leave alone.

    Returns:
        Whether there are groups still whose makers live.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    found = [(group, is_orphan) for group, is_orphan in find_placement_groups() if group not in others]
    for group, is_orphan in found:
        if is_orphan:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))
    return not all(is_orphan for _, is_orphan in found)


def find_placement_groups() -> list[tuple[bytes, bool]]:
    """The placement groups that actors of this job have made, and whether their maker is dead.

    `ray.util.placement_group_table` does not tell who made a group, so Ray's own table is read.
    """
    import ray
    from ray._private.state import state as ray_state
    from ray.core.generated import gcs_pb2

    job = ray.get_runtime_context().get_job_id()
    found = []
    for entry in ray_state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        is_there = group.state != gcs_pb2.PlacementGroupTableData.REMOVED
        if is_there and group.creator_job_id.hex() == job and is_actor(group.creator_actor_id):
            found.append((group.placement_group_id, group.creator_actor_dead))
    return found


def is_actor(id: bytes) -> bool:
    """Whether this is an actor's id; that of a process that is none has nothing but its job at the end."""
    import ray

    return bool(id) and not ray.ActorID(id).is_nil()
