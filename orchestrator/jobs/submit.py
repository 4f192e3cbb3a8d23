"""Submit a recipe to a cluster."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, Problem
from orchestrator.jobs.client import TAG, Cluster, Job
from orchestrator.jobs.upload import RECIPE_FILE, pack
from orchestrator.recipe import Recipe
from orchestrator.recipe.worker_resources import minimum_resources, refuse_without_room
from orchestrator.storage import is_url, join, split

SECONDS_TO_SAVE = 60
"""Until Ray kills a job that is to stop; its default of 3 seconds is too short to save a checkpoint."""


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has accepted."""

    job: Job
    is_new: bool
    """False if the same job was already running."""
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
    """Send a recipe to the cluster, which trains it or runs its search.

    The same recipe with the same files is the same job: if it is running, it is not sent again, and if it has ended, it
    is sent as its next attempt, which resumes in the same run directory.

    Args:
        verb: `train` or `search`.
        version: of this package.
        shared: folders that every node has under the same path.
        variables: names of environment variables to pass to the job.
        pictures: paths of pictures that data files name, by the folder of the data files.

    Raises:
        InputError: something cannot be sent, or not every node has the storage.
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
    """Return the run directory as the nodes see it; raises InputError if it is a folder of one node alone."""
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
    """Return the resources of the job's own process: those of a worker if it is the only one, otherwise none.

    Raises:
        ClusterError: the cluster has no room for the workers.
    """
    nodes, scale = cluster.nodes(), recipe.scale
    each = minimum_resources(recipe, nodes)
    if not scale.wait_for_nodes:
        refuse_without_room(recipe, scale.min_workers or scale.workers, each, nodes)
    if scale.workers > 1 or verb == "search":
        return {}
    return {"entrypoint_num_cpus": each["CPU"], "entrypoint_num_gpus": each["GPU"]}
