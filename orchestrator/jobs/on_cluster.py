"""What a job runs on the cluster: look whether the nodes can do it, then the command itself in this process's place."""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError, OrchestratorError
from orchestrator.jobs.client import SENDING
from orchestrator.jobs.fetch import send
from orchestrator.jobs.upload import ENVIRONMENT_FILE

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "ray", "datasets")
SECONDS_FOR_NODES = 60.0


def main(arguments: list[str]) -> int:
    """Run a verb of the command line here; returns an exit code where it does not get there."""
    verb, target, *rest = arguments
    try:
        if verb == SENDING:
            print(send(Path(target), tuple(rest)))
            return 0
        environment = Path(ENVIRONMENT_FILE)
        if environment.exists():
            os.environ.update(json.loads(environment.read_text(encoding="utf-8")))
        look_at_nodes(Path(rest[rest.index("--output") + 1]).parent)
    except OrchestratorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.flush()
    # In this process's place, so that the signals of the cluster reach it.
    return os.execv(sys.executable, [sys.executable, "-m", "orchestrator.cli", *arguments])


def look_at_nodes(storage: Path) -> None:
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
        mark = f".seen-{uuid.uuid4().hex}"
        try:
            storage.mkdir(parents=True, exist_ok=True)
            (storage / mark).touch()
        except OSError as error:
            raise ClusterError(f"{storage} cannot be written by the job: {error.strerror}{STORAGE_REMEDY}") from None
        try:
            look = ray.remote(num_cpus=0)(look_around)
            asked = [
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    str(storage / mark)
                )
                for node in nodes
            ]
            found = ray.get(asked, timeout=SECONDS_FOR_NODES)
        finally:
            (storage / mark).unlink(missing_ok=True)
    finally:
        ray.shutdown()
    compare([node["NodeManagerAddress"] for node in nodes], found, storage)


STORAGE_REMEDY = "\n    -> set scale.storage to a folder that all nodes share, and may write to"


def look_around(mark: str) -> dict[str, Any]:
    """What a node has: versions of packages, and whether it sees a file of the storage."""
    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {"versions": versions, "sees": Path(mark).exists() and os.access(Path(mark).parent, os.W_OK)}


def compare(addresses: list[str], found: list[dict[str, Any]], storage: Path) -> None:
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
