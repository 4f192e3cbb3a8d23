"""What a job runs on the cluster: look whether the nodes can do it, then the command itself in this process's place."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError, OrchestratorError
from orchestrator.jobs.client import SENDING
from orchestrator.jobs.fetch import send
from orchestrator.jobs.upload import ENVIRONMENT_FILE
from orchestrator.storage import RemoteFolder, credentials, is_url, split

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "ray", "datasets")
SECONDS_FOR_NODES = 60.0


def main(arguments: list[str]) -> int:
    """Run a verb of the command line here; returns an exit code where it does not get there."""
    verb, target, *rest = arguments
    try:
        if verb == SENDING:
            print(send(target, tuple(rest)))
            return 0
        environment = Path(ENVIRONMENT_FILE)
        if environment.exists():
            os.environ.update(json.loads(environment.read_text(encoding="utf-8")))
        look_at_nodes(split(rest[rest.index("--output") + 1])[0])
    except OrchestratorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.flush()
    # In this process's place, so that the signals of the cluster reach it.
    return os.execv(sys.executable, [sys.executable, "-m", "orchestrator.cli.main", *arguments])


def look_at_nodes(storage: str) -> None:
    """Have every node tell its packages, and write to the storage.

    Raises:
        ClusterError: nodes that differ in their packages, or do not see the same storage.
    """
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ModuleNotFoundError:
        what = (
            f"the `python` of the node's PATH, {sys.executable}, has no Ray, so it is not the one that runs the cluster"
        )
        raise ClusterError(f"{what}\n    -> activate the cluster's environment before `ray start`") from None
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        with marked(storage) as mark:
            look = ray.remote(num_cpus=0)(look_around)
            asked = [
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    storage, mark, credentials()
                )
                for node in nodes
            ]
            found = ray.get(asked, timeout=SECONDS_FOR_NODES)
    finally:
        ray.shutdown()
    compare([node["NodeManagerAddress"] for node in nodes], found, storage)


STORAGE_REMEDY = "\n    -> set scale.storage to a folder that all nodes share, and may write to"


@contextlib.contextmanager
def marked(storage: str) -> Iterator[str]:
    """A new file in the storage, by its name.

    Raises:
        ClusterError: it cannot be written.
    """
    mark = f".seen-{uuid.uuid4().hex}"
    try:
        if is_url(storage):
            RemoteFolder(storage).write(mark, b"")
        else:
            Path(storage).mkdir(parents=True, exist_ok=True)
            Path(storage, mark).touch()
    except OSError as error:
        what = f"{storage} cannot be written by the job: {error.strerror or error}"
        raise ClusterError(f"{what}{STORAGE_REMEDY}") from None
    try:
        yield mark
    finally:
        if is_url(storage):
            RemoteFolder(storage).delete(mark)
        else:
            Path(storage, mark).unlink(missing_ok=True)


def sees(storage: str, mark: str) -> bool:
    """Whether this node sees a file of the storage, and may write there."""
    if not is_url(storage):
        return Path(storage, mark).exists() and os.access(storage, os.W_OK)
    with contextlib.suppress(OSError):
        folder = RemoteFolder(storage)
        folder.write(mark, b"")
        return folder.read(mark) is not None
    return False


def look_around(storage: str, mark: str, keys: dict[str, str]) -> dict[str, Any]:
    """What a node has: versions of packages, and whether it sees a file of the storage."""
    os.environ.update(keys)
    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {"versions": versions, "sees": sees(storage, mark)}


def compare(addresses: list[str], found: list[dict[str, Any]], storage: str) -> None:
    """Raise ClusterError with everything that differs between the nodes."""
    problems = [
        f"the node {address} does not see {storage}, or may not write there{STORAGE_REMEDY}"
        for address, each in zip(addresses, found, strict=True)
        if not each["sees"]
    ]
    for name in found[0]["versions"]:
        versions = {address: each["versions"][name] for address, each in zip(addresses, found, strict=True)}
        if len({*versions.values()}) > 1 or "missing" in versions.values():
            told = ", ".join(f"{address} has {value}" for address, value in versions.items())
            problems.append(f"{name} is not the same on all nodes: {told}\n    -> install one version on every node")
    if problems:
        raise ClusterError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
