"""Runs trials in Ray Tune's actors, as many at a time as the cluster has room for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from orchestrator.json_lines import append_json_line, read_json_lines
from orchestrator.launch.cluster import cluster_nodes
from orchestrator.recipe.schema import Search
from orchestrator.search.plan import SearchPlan
from orchestrator.search.ray.searchers import ListSearcher, OptunaSearcher
from orchestrator.search.ray.tuner import make_scheduler, run_with_tune
from orchestrator.search.records import SearchDirectory, trial_id
from orchestrator.search.resources import num_concurrent, trial_resources
from orchestrator.search.trial_log import TrialLog
from orchestrator.search.trial_process import make_trial_process

SUGGESTED = "suggested.jsonl"


class RayRunner:
    """Runs the trials of a search on the Ray cluster that this process is in."""

    def __init__(self, plan: SearchPlan, directory: SearchDirectory) -> None:
        self.plan = plan
        self.directory = directory
        nodes = cluster_nodes()
        self.resources = trial_resources(plan.prepared.recipe, nodes)
        self.concurrent = num_concurrent(plan, nodes, self.resources)

    @property
    def max_batches(self) -> int:
        """Most batches of a group of alike trials; none for population-based training, which changes single trials."""
        return 0 if self.plan.search.scheduler == "pbt" else self.concurrent

    def run(
        self, log: TrialLog, specs: Iterator[dict[str, Any]] | None, search: Search, seconds: float | None = None
    ) -> None:
        """Run trials until there are no more, for at most `seconds` seconds.

        Args:
            specs: id and parameters of each; None for those that Optuna suggests.
        """
        plan = self.plan
        mutations = plan.mutations if search.scheduler == "pbt" else {}
        cores = os.cpu_count() or 1
        self.directory.update_record(concurrent=self.concurrent, cores=cores)
        run_with_tune(
            self._optuna_searcher(log) if specs is None else ListSearcher(specs, mutations),
            make_scheduler(search, mutations, self.concurrent),
            partial(
                make_trial_process,
                plan.prepared,
                self.directory.root,
                plan.boundaries,
                plan.metric,
                plan.weights_kept,
                max(1, cores // self.concurrent),
            ),
            log,
            self.concurrent,
            self.resources,
            self.directory.logs / "ray",
            seconds,
        )

    def _optuna_searcher(self, log: TrialLog) -> OptunaSearcher:
        """Return a searcher with TPE; it first suggests again what an earlier attempt had suggested."""
        plan, path = self.plan, self.directory.root / SUGGESTED
        recorded = read_json_lines(path)
        count = itertools.count()

        def make_spec(point: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
            number = next(count)
            if number >= len(recorded):
                append_json_line(path, point)
            return log.add(trial_id(number), parameters)

        return OptunaSearcher(plan.space.optuna_define, plan.search.seed, plan.search.trials, recorded, make_spec)
