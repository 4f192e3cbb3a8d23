"""The commands for Ray clusters: parse arguments, call the package, print the result."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import __version__
from orchestrator.cli import show
from orchestrator.errors import ClusterError, InputError, RunFailed
from orchestrator.formatting import format_bytes, format_count, format_duration
from orchestrator.storage import is_url

if TYPE_CHECKING:
    from orchestrator.jobs import Cluster, Job

SECONDS_TO_STOP = 90.0  # Includes the time to save a checkpoint.


def add_verbs(verb: Callable[..., Any], recipe: Any) -> None:
    """Add the commands to a parser.

    Args:
        verb: adds a command.
        recipe: the arguments of commands that take a recipe.
    """
    submit = verb("submit", run_submit, "Submit a recipe to a Ray cluster, which trains it.", recipe)
    submit.add_argument("--search", action="store_true", help="search instead of training")
    submit.add_argument("--follow", action="store_true", help="show the output of the job until it is over")
    text = "a folder that every node has under the same path; its files are not sent (may be given several times)"
    submit.add_argument("--shared", type=Path, action="append", default=[], metavar="FOLDER", help=text)
    text = "an environment variable to pass to the job, such as HF_TOKEN; its value is never shown"
    submit.add_argument("--env", action="append", default=[], metavar="NAME", help=text)
    add_address(submit)
    add_address(verb("jobs", run_jobs, "List the jobs of a cluster."))
    add_job(verb("status", run_status, "Show the status of a job."))
    logs = add_job(verb("logs", run_logs, "Show the output of a job."))
    logs.add_argument("--follow", action="store_true", help="follow the output until the job is over")
    add_job(verb("stop", run_stop, "Stop a job; it resumes from its last checkpoint when it is submitted again."))
    fetch = add_job(verb("fetch", run_fetch, "Copy a job's run directory to this machine."))
    fetch.add_argument("--output", type=Path, metavar="DIR", help="the new folder (default: runs/NAME)")
    fetch.add_argument("--all", action="store_true", help="also fetch checkpoints, trials and logs")


def add_address(verb: Any) -> Any:
    text = "the cluster's dashboard, http://HOST:8265 (default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or this machine)"
    verb.add_argument("--address", metavar="URL", help=text)
    verb.add_argument("--insecure", action="store_true", help="allow unencrypted connections to another machine")
    return verb


def add_job(verb: Any) -> Any:
    verb.add_argument("job", help="the job's id (`orchestrator jobs`)")
    return add_address(verb)


def reach(options: argparse.Namespace) -> Cluster:
    from orchestrator.jobs import connect

    return connect(options.address, options.insecure)


def run_submit(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from orchestrator.jobs import submit
    from orchestrator.launch.disk import refuse_disk_without_room_for_model
    from orchestrator.training.pictures import find_named_pictures

    cluster = reach(options)
    storage = Path(recipe.scale.storage).absolute()
    if not is_url(recipe.scale.storage) and (cluster.is_here or is_below(storage, options.shared)):
        refuse_disk_without_room_for_model(storage, recipe)
    verb = "search" if options.search else "train"
    pictures = find_named_pictures(recipe)
    found = submit(recipe, cluster, verb, __version__, shared=options.shared, variables=options.env, pictures=pictures)
    job = found.job
    sent = (
        f"{format_count(found.num_files, 'file')}, {format_bytes(found.num_bytes)}"
        if found.is_new
        else "nothing: the job is already running"
    )
    out = sys.stderr if options.json else sys.stdout
    show.table([("job", job.id), ("cluster", cluster.address), ("sent", sent), ("run", job.directory)], out)
    if options.follow:
        job = follow(cluster, job, out)
    else:
        print(f"see: orchestrator logs {job.id} --follow; orchestrator fetch {job.id}", file=out)
    return as_record(job)


def is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder.absolute()) for folder in folders)


def follow(cluster: Cluster, job: Job, out: Any) -> Job:
    """Show the output of a job until it is over.

    Raises:
        OrchestratorError: the job failed; the error has its exit code.
    """
    try:
        for text in cluster.follow(job.id):
            out.write(show.clean(text))
            out.flush()
    except KeyboardInterrupt:
        print(f"\nthe job goes on; see: orchestrator logs {job.id} --follow", file=sys.stderr)
        raise
    ended = cluster.job(job.id)
    if ended.status != "succeeded":
        message = f"the job {ended.id} {ended.status}"
        if ended.exit_code is None:
            message += f": {ended.message.splitlines()[0]}" if ended.message else ""
        if ended.exit_code == InputError.exit_code:
            raise InputError(message)
        raise (ClusterError if ended.exit_code == ClusterError.exit_code else RunFailed)(message)
    print(f"fetch the model with: orchestrator fetch {ended.id}", file=sys.stderr)
    return ended


def run_jobs(options: argparse.Namespace) -> dict[str, Any]:
    cluster = reach(options)
    found = cluster.jobs()
    if not options.json:
        rows = [(job.id, job.status, job.verb, since(job), job.directory) for job in found]
        show.table(rows or [(f"no jobs were submitted to {cluster.address}",)], sys.stdout)
    return {"jobs": [as_record(job) for job in found]}


def run_status(options: argparse.Namespace) -> dict[str, Any]:
    cluster = reach(options)
    job = cluster.job(options.job)
    if not options.json:
        lines = [line for line in cluster.logs(job.id).splitlines() if line.strip()]
        rows = [("job", job.id), ("status", f"{job.status}, {since(job)}"), ("run", job.directory)]
        show.table([*rows, ("last line", lines[-1] if lines else "none yet")], sys.stdout)
    return as_record(job)


def run_logs(options: argparse.Namespace) -> dict[str, Any]:
    cluster = reach(options)
    job = cluster.job(options.job)
    if options.json:
        return {**as_record(job), "logs": cluster.logs(job.id)}
    if options.follow:
        return as_record(follow(cluster, job, sys.stdout))
    sys.stdout.write(show.clean(cluster.logs(job.id)))
    return as_record(job)


def run_stop(options: argparse.Namespace) -> dict[str, Any]:
    cluster = reach(options)
    if not (job := cluster.job(options.job)).is_over:
        cluster.stop(job.id)
        job = cluster.wait(job.id, SECONDS_TO_STOP)
    if not job.is_over:
        raise RunFailed(f"the job {job.id} is still {job.status} after {SECONDS_TO_STOP:.0f} s")
    if not options.json:
        print(f"the job {job.id} has {job.status}")
    return as_record(job)


def run_fetch(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.jobs import fetch

    cluster = reach(options)
    job = cluster.job(options.job)
    target = options.output or Path("runs") / Path(job.directory).name
    target.parent.mkdir(parents=True, exist_ok=True)
    fetch(cluster, job, target, options.all)
    if not options.json:
        print(f"the run is in {target}")
    return {**as_record(job), "output": str(target)}


def since(job: Job) -> str:
    """Return how long a job has run."""
    if job.started is None:
        return "not started"
    return format_duration((job.ended or time.time()) - job.started, whole=True)


def as_record(job: Job) -> dict[str, Any]:
    return {**vars(job)}
