"""A Ray cluster with a dashboard and a token, as a user would start it on a machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ask import TOKEN, Ask


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the cluster's dashboard; it has 2 CPUs."""
    port, dashboard = free_port(), free_port()
    # Sockets have short names, so not below pytest's folder.
    folder = tempfile.mkdtemp(prefix="ray-")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = str(tmp_path_factory.mktemp("job-cache"))
    changed = {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "ORCHESTRATOR_CACHE": cache}
    environment = {**os.environ, **changed}
    environment.pop("RAY_ADDRESS", None)
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=true"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    # The default one is that of any other cluster on this machine.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("wb") as out:
        head = subprocess.Popen(
            [*command, "--disable-usage-stats"], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(600):
            assert head.poll() is None, log.read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            try:
                head.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ask(address: str) -> Ask:
    """Runs a command against the cluster, in a process of its own: Ray keeps the first token that it finds, and whether
    there is to be one at all."""

    def ask(verb: str, *arguments: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        code = f"{before}\nimport sys; from orchestrator.cli.main import main; sys.exit(main(sys.argv[1:]))"
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **variables}
        command = [sys.executable, "-c", code, verb, *arguments, "--address", address]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return ask
