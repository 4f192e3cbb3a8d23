"""Seconds from a command to the end of its first optimizer step: `orchestrator train` and a plain Ray Train script.

Each is a process of its own that takes one step and ends; the parent polls for the file that follows the step: the
first train row of metrics.jsonl, or the file that the plain script writes. Ours starts with an empty cache each time,
so that both tokenise the data.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import RECIPE, interleave, source_folder

import orchestrator
from orchestrator.recipe import find_recipe

PLAIN_SCRIPT = Path(__file__).with_name("plain_ray_train.py")
SECONDS_BETWEEN_LOOKS = 0.01
SECONDS_ALLOWED = 180
SETTINGS = [
    "transfer.freeze=0",
    "train.steps=1",
    "train.log_every=1",
    "train.precision=fp32",
    "target.limit.select=20",
    "target.limit.test=20",
]


def measure_startup(num_repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """For one and for two workers: seconds of ours, and of the plain script, turn by turn."""
    found = {}
    for num_workers in (1, 2):
        contenders = {"ours": partial(our_seconds, num_workers), "plain": partial(plain_seconds, num_workers)}
        seconds = interleave(contenders, num_repeats)
        found[f"{num_workers} worker{'s' if num_workers > 1 else ''}"] = (seconds["ours"], seconds["plain"])
    return found


def our_seconds(num_workers: int) -> float:
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        output = Path(folder) / "run"
        command = [str(Path(sys.executable).with_name("orchestrator")), "train", RECIPE]
        command += [*SETTINGS, f"scale.workers={num_workers}", "--output", str(output)]
        metrics = output / "metrics.jsonl"

        def has_stepped() -> bool:
            return metrics.exists() and b"\n" in metrics.read_bytes()

        return seconds_until(command, has_stepped, Path(folder))


def plain_seconds(num_workers: int) -> float:
    recipe = orchestrator.load_recipe(RECIPE)
    data = (find_recipe(RECIPE).parent / str(recipe.target.data) / "train.jsonl").resolve()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        marker = Path(folder) / "stepped"
        command = [sys.executable, str(PLAIN_SCRIPT), "--workers", str(num_workers)]
        command += ["--model", str(source_folder(recipe)), "--data", str(data), "--marker", str(marker)]
        return seconds_until([*command, "--storage", folder], marker.exists, Path(folder))


def seconds_until(command: list[str], has_stepped: Callable[[], bool], folder: Path) -> float:
    """Run a command to its end; returns the seconds until `has_stepped` is true."""
    log = folder / "output.log"
    environment = {**os.environ, "ORCHESTRATOR_CACHE": str(folder / "cache")}
    with log.open("wb") as file:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            while not has_stepped():
                if process.poll() is not None or time.monotonic() - started > SECONDS_ALLOWED:
                    sys.exit(f"{' '.join(command)} took no step:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(SECONDS_BETWEEN_LOOKS)
            seconds = time.monotonic() - started
            process.wait(SECONDS_ALLOWED)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return seconds
