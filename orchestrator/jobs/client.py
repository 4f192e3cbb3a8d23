"""A Ray cluster through its Jobs API: its nodes, its jobs and their logs."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import psutil

from orchestrator.errors import ClusterError, InputError, Problem

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's own, in its order. The second one may also name a cluster to join, `HOST:6379`, instead of a dashboard."""
MOST_NODES = 10_000  # Ray returns no more at once.
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_SECONDS = 3.0
SECONDS_BETWEEN_CHECKS = 0.25
SECONDS_FOR_A_NODE = 4.0
SECONDS_TO_SETTLE = 10.0
SENDING = "send"
"""The verb of a job that sends a run directory, which lists of jobs leave out."""
TAG = "orchestrator"
"""The key of a job's metadata that holds the version of this package; other jobs lack it."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    status: str
    """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
    verb: str
    name: str
    """The recipe's."""
    directory: str
    """The run directory, as the cluster's nodes see it."""
    exit_code: int | None
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    message: str

    @property
    def is_over(self) -> bool:
        return self.status in ("succeeded", "failed", "stopped")


class Cluster:
    """A cluster that can be reached; returned by `connect`."""

    def __init__(self, address: str, client: Any) -> None:
        self.address = address
        self._client = client

    @cached_property
    def is_here(self) -> bool:
        """Whether all its nodes are this machine, and see its folders. The address alone may be that of a tunnel."""
        own = {each.address for every in psutil.net_if_addrs().values() for each in every}
        found = self._nodes()
        return bool(found) and all(node.node_ip in own for node in found)

    def nodes(self) -> list[dict[str, float]]:
        """Return the resources of each living node, by Ray's names; a cluster that is starting gets some seconds."""
        until = time.monotonic() + SECONDS_FOR_A_NODE
        while not (found := self._nodes()) and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_CHECKS)
        return [node.resources_total for node in found]

    def _nodes(self) -> list[Any]:
        from ray.util.state import list_nodes

        with self._errors(), without_address_variables():
            # Ray counts dead nodes as missing output, although the filter leaves them out.
            found: list[Any] = list_nodes(
                self.address, [("state", "=", "ALIVE")], MOST_NODES, detail=True, raise_on_missing_output=False
            )
        return found

    def submit(self, job_id: str, entrypoint: str, metadata: dict[str, str], **options: Any) -> None:
        """Submit a job; `options` are those of `JobSubmissionClient.submit_job`."""
        with self._errors():
            self._client.submit_job(submission_id=job_id, entrypoint=entrypoint, metadata=metadata, **options)

    def job(self, job_id: str) -> Job:
        """Return a job by its id; raises InputError if there is none."""
        every = self._jobs()
        found = next((job for job in every if job.id == job_id), None)
        if found is None:
            known = ", ".join(job.id for job in every if job.verb != SENDING) or "none"
            remedy = f"give one of its jobs: {known}"
            raise InputError(Problem(f"there is no job {job_id!r} on {self.address}", remedy=remedy))
        return found

    def jobs(self) -> list[Job]:
        """Return the jobs that this package submitted, the latest first."""
        return [job for job in self._jobs() if job.verb != SENDING]

    def _jobs(self) -> list[Job]:
        with self._errors():
            every = self._client.list_jobs()
        ours = [_job(each) for each in every if TAG in (each.metadata or {})]
        return sorted(ours, key=lambda job: job.started or 0.0, reverse=True)

    def logs(self, job_id: str) -> str:
        """Return everything that a job has printed."""
        with self._errors():
            found: str = self._client.get_job_logs(job_id)
        return found

    def follow(self, job_id: str) -> Iterator[str]:
        """Yield the output of a job, piece by piece, until the job is over.

        Raises:
            ClusterError: the connection is lost before.
        """
        pieces = self._client.tail_job_logs(job_id)

        async def take() -> str | None:
            return await anext(pieces, None)

        with self._errors(), asyncio.Runner() as runner:
            while (piece := runner.run(take())) is not None:
                yield piece
        if not self.wait(job_id, SECONDS_TO_SETTLE).is_over:
            raise ClusterError(f"the connection to {self.address} was lost; the job {job_id} goes on")

    def wait(self, job_id: str, seconds: float) -> Job:
        """Return the job when it is over, or after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            with self._errors():
                job = _job(self._client.get_job_info(job_id))
            if job.is_over or time.monotonic() > until:
                return job
            time.sleep(SECONDS_BETWEEN_CHECKS)

    def stop(self, job_id: str) -> None:
        """Stop a job; Ray kills it if it does not end by itself within some seconds."""
        with self._errors():
            self._client.stop_job(job_id)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with plain_errors(self.address):
            yield


def connect(address: str | None, insecure: bool = False) -> Cluster:
    """Connect to the cluster at an address.

    Its token is found as Ray's documentation says ($RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token).

    Args:
        address: `http://HOST:8265`; None for that of Ray's environment variables, or this machine.
        insecure: allow unencrypted connections to another machine.

    Raises:
        InputError: the address is not one of a dashboard, or not safe.
        ClusterError: there is no answer, or the token is refused.
    """
    given, where = (address, "--address") if address else named_address()
    checked = check_address(given, insecure, where)
    parts = urlsplit(checked)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        remedy = "start the cluster with a dashboard, correct --address, or open a tunnel: ssh -L 8265:localhost:8265"
        raise ClusterError(f"nothing answers at {checked}: {error.strerror or error}\n    -> {remedy} HOST") from None
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.ERROR)  # It logs each upload.
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # It logs the end of each log.
    with plain_errors(checked), without_address_variables():
        return Cluster(checked, JobSubmissionClient(checked))


def named_address() -> tuple[str, str]:
    """Return the dashboard's address if the user gives none, and the variable or option that sets it."""
    for name in ADDRESS_VARIABLES:
        value = os.environ.get(name, "")
        if (name == ADDRESS_VARIABLES[0] and value) or value.startswith(("http://", "https://")):
            return value, name
    return DEFAULT_ADDRESS, "--address"


@contextmanager
def without_address_variables() -> Iterator[None]:
    """Hide the environment variables that Ray's clients prefer to the address that they get."""
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check_address(address: str, insecure: bool, where: str = "--address") -> str:
    """Return the address with its scheme; raises InputError if it is not one, or the connection is not encrypted."""
    full = address if "://" in address else f"http://{address}"
    parts = urlsplit(full)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        remedy = "give the address of the cluster's dashboard: http://HOST:8265"
        raise InputError(Problem(f"{address!r} is not the address of a Ray dashboard", where, remedy))
    if parts.scheme == "http" and not insecure and not _is_loopback(parts.hostname):
        what = f"{address} is another machine, and http sends recipe, data and token unencrypted"
        remedy = "use https, or a tunnel (ssh -L 8265:localhost:8265 HOST), or --insecure in a network that you trust"
        raise InputError(Problem(what, where, remedy))
    return full


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Raise errors of Ray's client as `ClusterError`s in plain words.

    Raises:
        ClusterError: the token is refused, the cluster is gone, or it refuses the request.
    """
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError
    from ray.util.state.exception import RayStateApiException

    try:
        yield
    except AuthenticationError as error:
        is_missing = "Missing" in str(error)
        what = f"the cluster at {address} {'needs a token' if is_missing else 'refuses the token'}"
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token of the cluster"
        raise ClusterError(f"{what}\n    -> {remedy}") from None
    except (
        ConnectionError,
        requests.RequestException,
        aiohttp.ClientError,
        RayStateApiException,
        RuntimeError,
    ) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ClusterError(f"the cluster at {address} refused the request: {lines[-1] if lines else error}") from error


def _job(found: Any) -> Job:
    metadata = found.metadata or {}
    return Job(
        id=found.submission_id or "",
        status=str(found.status.value).lower(),
        verb=metadata.get("verb", ""),
        name=metadata.get("name", ""),
        directory=metadata.get("directory", ""),
        exit_code=found.driver_exit_code,
        started=_seconds(found.start_time),
        ended=_seconds(found.end_time),
        message=found.message or "",
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
