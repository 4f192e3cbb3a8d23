"""The resources of workers, and how many of them the nodes of a cluster hold. A worker does not span nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.errors import ClusterError, Problem
from orchestrator.recipe import Recipe

Nodes = Sequence[Mapping[str, float]]
"""The resources of each node, as Ray names them."""
KINDS = ("CPU", "GPU")


def count_room(each: Mapping[str, float], nodes: Nodes) -> int:
    """Return how many workers with the resources `each` fit onto the nodes."""
    wanted = {kind: number for kind, number in each.items() if number}
    return sum(min(int(node.get(kind, 0) // number) for kind, number in wanted.items()) for node in nodes)


def gpus_of_worker(recipe: Recipe, nodes: Nodes) -> int:
    """Return the GPUs of each worker; `auto` is one if any node has one."""
    if recipe.scale.gpus_per_worker == "auto":
        return int(any(node.get("GPU", 0) >= 1 for node in nodes))
    return recipe.scale.gpus_per_worker


def minimum_resources(recipe: Recipe, nodes: Nodes) -> dict[str, int]:
    """Return the CPUs and GPUs that each worker has at least."""
    cpus = 1 if recipe.scale.cpus_per_worker == "auto" else recipe.scale.cpus_per_worker
    return {"CPU": cpus, "GPU": gpus_of_worker(recipe, nodes)}


def worker_resources(recipe: Recipe, nodes: Nodes) -> dict[str, int]:
    """Return the CPUs and GPUs of each worker of a training.

    `cpus_per_worker: auto` is the most CPUs that all workers can have on these nodes, or all that fit onto them.
    """
    each = minimum_resources(recipe, nodes)
    workers = min(recipe.scale.workers, count_room(each, nodes))
    if recipe.scale.cpus_per_worker == "auto" and workers:
        most = int(max(node.get("CPU", 0) for node in nodes))
        sizes = ({**each, "CPU": cpus} for cpus in range(most, 0, -1))
        return next(size for size in sizes if count_room(size, nodes) >= workers)
    return each


def refuse_without_room(
    recipe: Recipe, workers: int, each: Mapping[str, float], nodes: Nodes, is_trial: bool = False
) -> None:
    """Refuse workers that do not fit onto the nodes.

    Args:
        each: CPUs and GPUs of each worker.
        is_trial: whether they are those of a search's trial, which does not wait for nodes.

    Raises:
        ClusterError: there is no room for them; the message names the resources of the nodes.
    """
    room = count_room(each, nodes)
    if room >= workers:
        return
    have = "; ".join(", ".join(f"{node.get(kind, 0):g} {kind}" for kind in KINDS) for node in nodes)
    needs = " and ".join(f"{number:g} {kind}" for kind, number in each.items() if number)
    size = f"{workers} worker{'s' if workers > 1 else ''} with {needs} each"
    size = f"a trial has {size}, which do not fit" if is_trial else f"{size} do not fit"
    what = f"{size}: the cluster has room for {room} ({len(nodes)} node{'s' if len(nodes) != 1 else ''}: {have})"
    remedy = f"set scale.workers to {room} or less" if room else "lower scale.cpus_per_worker or scale.gpus_per_worker"
    if room and each.get("GPU"):
        remedy += ", or scale.gpus_per_worker to 0 to use no GPU"
    remedy += ", or give the cluster more nodes"
    if not is_trial:
        # A run that waits needs to know the resources to wait for.
        known = f", scale.gpus_per_worker to {each['GPU']}" if recipe.scale.gpus_per_worker == "auto" else ""
        remedy += f"; where an autoscaler does, set scale.wait_for_nodes to true{known}"
    raise ClusterError(str(Problem(what, recipe.origin.where("scale.workers"), remedy)))
