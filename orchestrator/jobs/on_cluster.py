"""The entrypoint of a job on the cluster: check the nodes, then replace this process by the command."""

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
    """Check the nodes, then run a command of the command line; return an exit code if the checks fail."""
    verb, target, *rest = arguments
    try:
        if verb == SENDING:
            print(send(target, tuple(rest)))
            return 0
        environment = Path(ENVIRONMENT_FILE)
        if environment.exists():
            os.environ.update(json.loads(environment.read_text(encoding="utf-8")))
        check_nodes(split(rest[rest.index("--output") + 1])[0])
    except OrchestratorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.flush()
    # It replaces this process, so that it gets the cluster's signals.
    return os.execv(sys.executable, [sys.executable, "-m", "orchestrator.cli", *arguments])


def check_nodes(storage: str) -> None:
    """Compare the packages of all nodes, and check that each of them can write to the storage.

    Raises:
        ClusterError: the nodes have different packages, or not all of them see the storage.
    """
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ModuleNotFoundError:
        what = f"the `python` of the node's PATH, {sys.executable}, has no Ray, so it is not the Python of the cluster"
        raise ClusterError(f"{what}\n    -> activate the cluster's environment before `ray start`") from None
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        with probe_file(storage) as name:
            look = ray.remote(num_cpus=0)(examine_node)
            asked = [
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    storage, name, credentials()
                )
                for node in nodes
            ]
            found = ray.get(asked, timeout=SECONDS_FOR_NODES)
    finally:
        ray.shutdown()
    refuse_differences([node["NodeManagerAddress"] for node in nodes], found, storage)


STORAGE_REMEDY = "\n    -> set scale.storage to a folder that all nodes share, and may write to"


@contextlib.contextmanager
def probe_file(storage: str) -> Iterator[str]:
    """Create a file in the storage for as long as this lasts; yield its name.

    Raises:
        ClusterError: it cannot be written.
    """
    name = f".seen-{uuid.uuid4().hex}"
    try:
        if is_url(storage):
            RemoteFolder(storage).write(name, b"")
        else:
            Path(storage).mkdir(parents=True, exist_ok=True)
            Path(storage, name).touch()
    except OSError as error:
        what = f"{storage} cannot be written by the job: {error.strerror or error}"
        raise ClusterError(f"{what}{STORAGE_REMEDY}") from None
    try:
        yield name
    finally:
        if is_url(storage):
            RemoteFolder(storage).delete(name)
        else:
            Path(storage, name).unlink(missing_ok=True)


def can_use(storage: str, name: str) -> bool:
    """Whether this node sees a file of the storage, and may write there."""
    if not is_url(storage):
        return Path(storage, name).exists() and os.access(storage, os.W_OK)
    with contextlib.suppress(OSError):
        folder = RemoteFolder(storage)
        folder.write(name, b"")
        return folder.read(name) is not None
    return False


def examine_node(storage: str, name: str, keys: dict[str, str]) -> dict[str, Any]:
    """Return a node's versions of packages, and whether it can use the storage.

    Args:
        name: of a file in the storage.
        keys: environment variables that give access to the storage.
    """
    os.environ.update(keys)
    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {"versions": versions, "sees": can_use(storage, name)}


def refuse_differences(addresses: list[str], found: list[dict[str, Any]], storage: str) -> None:
    """Raise ClusterError with everything that differs between the nodes."""
    problems = [
        f"the node {address} does not see {storage}, or may not write there{STORAGE_REMEDY}"
        for address, each in zip(addresses, found, strict=True)
        if not each["sees"]
    ]
    for name in found[0]["versions"]:
        versions = {address: each["versions"][name] for address, each in zip(addresses, found, strict=True)}
        if len({*versions.values()}) > 1 or "missing" in versions.values():
            listed = ", ".join(f"{address} has {value}" for address, value in versions.items())
            problems.append(f"{name} is not the same on all nodes: {listed}\n    -> install one version on every node")
    if problems:
        raise ClusterError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
