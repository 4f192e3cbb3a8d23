"""Hand a recipe over to a cluster."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError, InputError, Problem
from orchestrator.jobs.client import TAG, Cluster, Job
from orchestrator.jobs.upload import RECIPE_FILE, pack
from orchestrator.recipe import Recipe
from orchestrator.storage import is_url, join, split

SECONDS_TO_SAVE = 60
"""From the wish that a job stops until Ray kills it; Ray's own 3 seconds are too few for a checkpoint."""


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has."""

    job: Job
    is_new: bool
    """False where the same was running already."""
    num_files: int
    num_bytes: int


def submit(
    recipe: Recipe,
    cluster: Cluster,
    verb: str,
    version: str,
    *,
    shared: Sequence[Path] = (),
    variables: Sequence[str] = (),
    pictures: Mapping[Path, Sequence[Path]] | None = None,
) -> Submitted:
    """Send a recipe and have the cluster train it, or search.

    The same recipe with the same files is the same job: where it runs already it is not sent again, and where it has
    ended it is sent as its next attempt, which goes on in the same run directory.

    Args:
        verb: `train` or `search`.
        version: of this package.
        shared: folders that every node sees under the same path.
        variables: names of environment variables that the job is to have.
        pictures: those that data files in a folder name, by the folder.

    Raises:
        InputError: what cannot be sent; storage that not every node would see.
        ClusterError: the cluster is too small, or refuses the job.
    """
    directory = run_directory(recipe, cluster, verb)
    needs = entrypoint_resources(recipe, cluster, verb)
    with tempfile.TemporaryDirectory(prefix="orchestrator-job-") as folder:
        seen = [*(home.absolute() for home in shared), Path(directory).parent]
        upload = pack(recipe, Path(folder), seen, variables, pictures or {})
        base = f"{split(directory)[1]}-{upload.digest[:8]}"
        attempts = re.compile(rf"{base}(-\d+)?")
        earlier = [job for job in cluster.jobs() if attempts.fullmatch(job.id)]
        alive = [job for job in earlier if not job.is_over]
        if alive:
            return Submitted(alive[0], False, upload.num_files, upload.num_bytes)
        job_id = f"{base}-{len(earlier) + 1}" if earlier else base
        command = ["python", "-m", "orchestrator.jobs.on_cluster", verb, RECIPE_FILE, "--output", directory]
        metadata = {TAG: version, "verb": verb, "name": recipe.name, "directory": directory}
        environment = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE)}}
        cluster.submit(job_id, shlex.join(command), metadata, runtime_env=environment, **needs)
    return Submitted(cluster.job(job_id), True, upload.num_files, upload.num_bytes)


def run_directory(recipe: Recipe, cluster: Cluster, verb: str) -> str:
    """Where the run will be, as the nodes see it; raises InputError where that would be a folder of one node alone."""
    name = recipe.name if verb == "train" else f"{recipe.name}-search"
    if is_url(recipe.scale.storage):
        return join(recipe.scale.storage, name)
    storage = Path(recipe.scale.storage)
    if storage.is_absolute():
        return str(storage / name)
    if cluster.is_here:
        return str((Path.cwd() / storage / name).absolute())
    what = f"scale.storage is {recipe.scale.storage!r}, a folder that only one node of the cluster would see"
    remedy = "set scale.storage to the full path of a folder that all nodes share, or to s3://, gs:// or abfs://"
    raise InputError(Problem(what, recipe.origin.where("scale.storage"), remedy))


def entrypoint_resources(recipe: Recipe, cluster: Cluster, verb: str) -> dict[str, Any]:
    """What the job's own process asks for: nothing where workers do the work, else what one worker needs.

    Raises:
        ClusterError: the cluster has not what the workers need.
    """
    nodes = cluster.nodes()
    scale = recipe.scale
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = (1 if has_gpus else 0) if scale.gpus_per_worker == "auto" else scale.gpus_per_worker
    cpus = 1 if scale.cpus_per_worker == "auto" else scale.cpus_per_worker
    if not scale.wait_for_nodes:
        refuse_too_small(scale.min_workers or scale.workers, {"CPU": cpus, "GPU": gpus}, nodes, recipe)
    if scale.workers > 1 or verb == "search":
        return {}
    return {"entrypoint_num_cpus": cpus, "entrypoint_num_gpus": gpus}


def refuse_too_small(workers: int, each: dict[str, int], nodes: Sequence[dict[str, float]], recipe: Recipe) -> None:
    """Raise ClusterError where the nodes cannot hold so many workers; it names what they have."""
    wanted = {kind: number for kind, number in each.items() if number}
    room = sum(min(int(node.get(kind, 0) // number) for kind, number in wanted.items()) for node in nodes)
    if room >= workers:
        return
    have = "; ".join(", ".join(f"{int(node.get(kind, 0))} {kind}" for kind in ("CPU", "GPU")) for node in nodes)
    needs = " and ".join(f"{number} {kind}" for kind, number in wanted.items())
    where = recipe.origin.where("scale.workers")
    remedy = f"set scale.workers to {room} or less" if room else "lower scale.cpus_per_worker or scale.gpus_per_worker"
    raise ClusterError(
        f"{where}: {workers} workers with {needs} each do not fit: the cluster has {len(nodes)} nodes ({have})\n"
        f"    -> {remedy}, or give the cluster more nodes; where an autoscaler does, set scale.wait_for_nodes to true"
    )
