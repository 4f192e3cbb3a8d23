"""Fetch a run directory from a cluster."""

from __future__ import annotations

import base64
import io
import shlex
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from orchestrator.errors import ClusterError, InputError, Problem, RunFailed
from orchestrator.jobs.client import SENDING, TAG, Cluster, Job
from orchestrator.jobs.upload import copy_package
from orchestrator.storage import RemoteFolder, is_url

BEGIN, END = "-----BEGIN RUN-----", "-----END RUN-----"
SECONDS_FOR_SENDING = 600.0
LEFT_OUT = ("checkpoints", "trials", "logs")
"""Folders that are not fetched by default: they are large, and only needed to resume on the cluster."""


def fetch(cluster: Cluster, job: Job, target: Path, everything: bool = False) -> None:
    """Copy a job's run directory to this machine; the target appears complete or not at all.

    The directory is copied if the cluster runs on this machine, and downloaded if it is in an object store that this
    machine can read. Otherwise the cluster sends it through the log of a small job, which needs the Jobs API alone.

    Raises:
        InputError: the target exists.
        RunFailed: there is no run directory yet.
    """
    if target.exists():
        raise InputError(Problem("the folder exists already", str(target), "give another --output"))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    left_out = () if everything else LEFT_OUT
    if cluster.is_here and Path(job.directory).is_dir():
        shutil.copytree(job.directory, partial, ignore=shutil.ignore_patterns(*left_out))
    elif not (is_url(job.directory) and download(job.directory, partial, left_out)):
        data = receive(cluster, job, everything)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            archive.extractall(partial, filter="data")
    partial.rename(target)


def download(url: str, target: Path, left_out: tuple[str, ...]) -> bool:
    """Download a folder of an object store; return False if it is empty or this machine cannot read it."""
    try:
        folder = RemoteFolder(url)
        for name in {name.partition("/")[0] for name in folder.names()} - {*left_out}:
            target.mkdir(parents=True, exist_ok=True)
            folder.download(name, target / name)
    except (OSError, InputError):
        shutil.rmtree(target, ignore_errors=True)
    return target.is_dir()


def receive(cluster: Cluster, job: Job, everything: bool) -> bytes:
    """Return the directory as a compressed archive, received through the log of a job."""
    job_id = f"{job.id}-send-{time.time_ns() // 10**6}"
    left_out = () if everything else LEFT_OUT
    command = ["python", "-m", "orchestrator.jobs.on_cluster", SENDING, job.directory, *left_out]
    with tempfile.TemporaryDirectory(prefix="orchestrator-job-") as folder:
        copy_package(Path(folder))
        metadata = {TAG: "", "verb": SENDING, "name": job.name, "directory": job.directory}
        cluster.submit(job_id, shlex.join(command), metadata, runtime_env={"working_dir": folder})
    sender = cluster.wait(job_id, SECONDS_FOR_SENDING)
    text = cluster.logs(job_id)
    if sender.status != "succeeded" or END not in text:
        keys = "export the credentials here, such as AWS_ACCESS_KEY_ID; or " if is_url(job.directory) else ""
        raise RunFailed(f"the cluster has no {job.directory} to send\n    -> {keys}see: orchestrator logs {job_id}")
    return base64.b64decode(text.partition(BEGIN)[2].partition(END)[0])


def send(place: str, left_out: tuple[str, ...]) -> str:
    """Return the archive as text for the log; raises ClusterError if there is no such directory."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-send-") as folder:
        directory = Path(folder) / "run" if is_url(place) else Path(place)
        if not (download(place, directory, left_out) if is_url(place) else directory.is_dir()):
            raise ClusterError(f"{place} does not exist on this node")
        return pack_folder(directory, left_out)


def pack_folder(directory: Path, left_out: tuple[str, ...]) -> str:
    """Return a compressed archive as base64, between two marks."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted(directory.iterdir()):
            if path.name not in left_out:
                archive.add(path, path.name)
    lines = base64.encodebytes(packed.getvalue()).decode("ascii")
    return f"{BEGIN}\n{lines}{END}"
