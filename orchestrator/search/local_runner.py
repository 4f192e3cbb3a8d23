"""Runs trials in the process of the command, one after another, without Ray.

For a search whose trials train only their heads: on stored features, all of them take less time than starting Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from orchestrator.launch.cluster import has_cluster
from orchestrator.recipe.schema import Search
from orchestrator.search.batching import trains_only_the_head
from orchestrator.search.plan import SearchPlan
from orchestrator.search.records import SearchDirectory
from orchestrator.search.space import trial_recipe
from orchestrator.search.trial_interface import TrialResult
from orchestrator.search.trial_log import TrialLog
from orchestrator.search.trial_process import make_trial_process
from orchestrator.training.engine.devices import uses_gpu


def can_run_locally(plan: SearchPlan) -> bool:
    """Whether every trial trains only its head, and there are no devices but this machine's cores to use."""
    if plan.known is None or plan.search.scheduler == "pbt" or has_cluster():
        return False
    if uses_gpu(plan.prepared.recipe) and torch.cuda.device_count() > 1:
        return False
    return all(trains_only_the_head(trial_recipe(plan.prepared.recipe, parameters)) for parameters in plan.known)


class LocalRunner:
    """Runs the trials of a search in this process, with all its cores.

    Raises:
        FeaturesNotStored: (when trials are run) each trial would compute the frozen blocks, for which Ray is faster.
    """

    max_batches = 1

    def __init__(self, plan: SearchPlan, directory: SearchDirectory) -> None:
        self.directory = directory
        self.cores = os.cpu_count() or 1
        self.process = make_trial_process(
            plan.prepared,
            directory.root,
            plan.boundaries,
            plan.metric,
            plan.weights_kept,
            self.cores,
            only_on_features=True,
        )

    def run(
        self, log: TrialLog, specs: Iterator[dict[str, Any]] | None, search: Search, seconds: float | None = None
    ) -> None:
        """Run trials until there are no more, for at most `seconds` seconds."""
        assert specs is not None
        self.directory.update_record(concurrent=1, cores=self.cores)
        deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
        for spec in specs:
            if time.monotonic() > deadline:
                break
            self._run(log, spec, deadline)

    def _run(self, log: TrialLog, spec: dict[str, Any], deadline: float) -> None:
        id = spec["id"]
        trial = self.process.start(id, spec["parameters"], spec.get("batched"))
        log.on_trial_start(id)
        result = TrialResult(None, False, {})
        try:
            while not result.is_last and time.monotonic() < deadline:
                result = trial.advance()
                if result.row:
                    log.on_trial_result(id, result.row)
        finally:
            if not result.is_last:
                trial.stop()
        log.on_trial_complete(id, result.is_last, result.reason)
