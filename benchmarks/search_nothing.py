"""Sixteen trials of nothing, run as `orchestrator search` runs trials; `search.py` times them (B4).

    python benchmarks/search_nothing.py

Prints one line of JSON: seconds from the moment at which the trials are known until the last one has ended. Ray is up
by then, as it is on the peer's side, and its processes have imported what trials need, as they do while a search reads
its data (for which this waits).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.launch.cluster import ray_cluster
from orchestrator.recipe.schema import Search
from orchestrator.search.ray.searchers import ListSearcher
from orchestrator.search.ray.tuner import make_scheduler, run_with_tune
from orchestrator.search.resources import TrialResources
from orchestrator.search.trial_interface import TrialResult

NUM_TRIALS = 16
MODULES = ("torch", "transformers.trainer")
SECONDS_OF_READING = 8.0  # A search reads its data, and checks them against the model, while its processes import.


class Nothing:
    """A trial that ends as soon as it begins."""

    def __init__(self, number: float) -> None:
        self.number = number

    def advance(self) -> TrialResult:
        return TrialResult(self.number, True, {"score": self.number})

    def stop(self) -> None: ...

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None: ...


class TrialProcess:
    """The same imports as any trial's process."""

    def __init__(self) -> None:
        import torch
        import transformers

        assert torch.nn is not None
        assert transformers.Trainer is not None

    def start(self, id: str, parameters: dict[str, Any], batched: Any) -> Nothing:
        return Nothing(parameters["number"])

    def close(self) -> None: ...


class Count:
    """Counts what has ended."""

    ended_trials = 0

    def on_trial_start(self, id: str) -> None: ...

    def on_trial_result(self, id: str, row: dict[str, Any]) -> None: ...

    def on_trial_complete(self, id: str, is_last: bool, reason: str | None) -> None:
        assert reason is None, reason
        self.ended_trials += 1


def main() -> None:
    cores = os.cpu_count() or 1
    count = Count()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(cores, MODULES) as wait:
        wait()
        time.sleep(SECONDS_OF_READING)
        specs = ({"id": f"{number:04d}", "parameters": {"number": number}} for number in range(NUM_TRIALS))
        began = time.perf_counter()
        run_with_tune(
            ListSearcher(specs),
            make_scheduler(Search(), {}, cores),
            TrialProcess,
            count,
            cores,
            TrialResources({"CPU": 1.0}, 1),
            Path(folder),
        )
        seconds = time.perf_counter() - began
    assert count.ended_trials == NUM_TRIALS, count.ended_trials
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
