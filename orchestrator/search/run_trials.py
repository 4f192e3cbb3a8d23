"""Runs the trials of a search, chooses the winner and leaves its model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TextIO

from orchestrator.errors import RunFailed
from orchestrator.json_lines import read_json_lines
from orchestrator.recipe import dump_recipe
from orchestrator.recipe.schema import Search
from orchestrator.report import write_report
from orchestrator.runs.directory import write_atomically, write_json
from orchestrator.runs.identity import IDENTITY, identity_to_keep
from orchestrator.search.batched_trials import FeaturesNotStored
from orchestrator.search.batching import batch_trials
from orchestrator.search.local_runner import LocalRunner, can_run_locally
from orchestrator.search.outcome import BEST_WEIGHTS, Spec
from orchestrator.search.plan import SearchPlan
from orchestrator.search.records import SearchDirectory, best_first, score_of, trial_id, with_own_name
from orchestrator.search.space import trial_recipe
from orchestrator.search.trial_log import TrialLog
from orchestrator.search.winner import keep_winner

SEED = "train.seed"


class Runner(Protocol):
    """Runs trials."""

    @property
    def max_batches(self) -> int:
        """Most batches that a group of alike trials is divided into; 0 where trials may not be batched."""

    def run(
        self, log: TrialLog, specs: Iterator[dict[str, Any]] | None, search: Search, seconds: float | None = None
    ) -> None:
        """Run trials until there are no more, for at most `seconds` seconds.

        Args:
            specs: id and parameters of each; None for the trials that an algorithm suggests.
        """


def record_start(plan: SearchPlan, directory: SearchDirectory, notes: Sequence[str] = ()) -> None:
    """Record what is searched, and that the search runs.

    Args:
        notes: sentences for the user.
    """
    write_atomically(directory.recipe, dump_recipe(plan.prepared.recipe))
    write_json(directory.root / IDENTITY, identity_to_keep(plan.prepared.recipe, plan.prepared.identity, directory))
    record = directory.read_record()
    directory.update_record(
        status="running",
        metric=plan.metric.name,
        mode="max" if plan.metric.higher_is_better else "min",
        started=record.get("started", time.time()),
        attempts=record.get("attempts", 0) + 1,
        num_layers=plan.num_layers,
        space=plan.space.written(),
        identity=plan.prepared.identity,
        warnings=[str(warning) for warning in plan.prepared.warnings],
        budget=plan.budget,
        notes=[*record.get("notes", []), *notes],
    )


def run_trials(
    plan: SearchPlan, directory: SearchDirectory, screen: TextIO | None, wait_for_cluster: Callable[[], None]
) -> None:
    """Run the trials that have not ended yet, choose the winner and leave its model.

    Args:
        screen: where to show the progress; None for nowhere.
        wait_for_cluster: called where Ray is needed.
    """
    start = time.monotonic()
    before = directory.read_record().get("seconds", 0.0)
    limit = plan.search.seconds
    seconds_left = None if limit is None else max(1.0, limit - before)
    runner = choose_runner(plan, directory, wait_for_cluster, can_run_locally(plan))
    try:
        run_trials_of_space(plan, directory, screen, runner, seconds_left)
    except FeaturesNotStored:
        runner = choose_runner(plan, directory, wait_for_cluster, False)
        run_trials_of_space(plan, directory, screen, runner, seconds_left)
    if plan.search.reseed_top and plan.search.reseeds:
        repeat_best(plan, directory, screen, runner)
    winner = choose_winner(plan, directory)
    best = trial_recipe(plan.prepared.recipe, winner["parameters"])
    write_atomically(directory.best, dump_recipe(with_own_name(best, "best")))
    result = keep_winner(plan.prepared, plan.metric, directory, winner)
    seconds = before + time.monotonic() - start
    directory.update_record(
        status="finished", seconds=seconds, winner={**winner, "metrics": result["metrics"]}, ended=time.time()
    )
    drop_weights(plan, directory)
    write_report(directory.root)


def drop_weights(plan: SearchPlan, directory: SearchDirectory) -> None:
    """Delete the best weights of all trials but those that the recipe repeats: more repetitions may be asked for."""
    rows = read_json_lines(directory.rows)
    kept = {row["id"] for row in best_first(rows, plan.metric)[: plan.weights_kept]}
    for row in rows:
        if row["id"] not in kept:
            (directory.trial(row["id"]).root / BEST_WEIGHTS).unlink(missing_ok=True)


def choose_runner(
    plan: SearchPlan, directory: SearchDirectory, wait_for_cluster: Callable[[], None], is_local: bool
) -> Runner:
    """Return a local runner or a Ray runner."""
    if is_local:
        return LocalRunner(plan, directory)
    wait_for_cluster()
    from orchestrator.search.ray.runner import RayRunner  # Ray Tune takes seconds to import.

    return RayRunner(plan, directory)


def run_trials_of_space(
    plan: SearchPlan, directory: SearchDirectory, screen: TextIO | None, runner: Runner, seconds: float | None
) -> None:
    """Run the trials of the space."""
    log = TrialLog(directory, plan.metric, plan.num_trials, screen, plan.search.scheduler == "asha")
    specs = None if plan.known is None else list_trials(plan, plan.known, log, runner.max_batches)
    runner.run(log, specs, plan.search, seconds)
    log.stop_running()


def list_trials(
    plan: SearchPlan, known: list[dict[str, Any]], log: TrialLog, max_batches: int
) -> Iterator[dict[str, Any]]:
    """Yield the trials for a runner; those that train only the head are batched."""
    specs = [Spec(trial_id(number), parameters) for number, parameters in enumerate(known)]
    batches, others = batch_trials(plan.prepared.recipe, specs, max_batches) if max_batches else ([], specs)
    for number, batch in enumerate(batches):
        yield log.add_batch(f"batch-{number}", {spec.id: spec.parameters for spec in batch})
    for spec in sorted(others, key=lambda spec: spec.id):
        yield log.add(spec.id, spec.parameters)


def repeat_best(plan: SearchPlan, directory: SearchDirectory, screen: TextIO | None, runner: Runner) -> None:
    """Train the best trials again with other seeds."""
    base = plan.prepared.recipe.train.seed
    best = best_first(original_rows(directory), plan.metric)[: plan.search.reseed_top]
    specs = [
        (f"{row['id']}-seed-{base + offset}", {**row["parameters"], SEED: base + offset})
        for row in best
        for offset in range(1, plan.search.reseeds + 1)
    ]
    log = TrialLog(directory, plan.metric, len(original_rows(directory)) + len(specs), screen)
    runner.run(log, (log.add(id, parameters) for id, parameters in specs), Search())
    log.stop_running()


def original_rows(directory: SearchDirectory) -> list[dict[str, Any]]:
    """Return the rows of the trials of the space, without their repetitions with other seeds."""
    return [row for row in read_json_lines(directory.rows) if row["id"] == original_id(row)]


def original_id(row: dict[str, Any]) -> str:
    """Return the id of the trial that a row repeats with another seed; its own id where it repeats none."""
    id: str = row["id"].partition("-seed-")[0]
    return id


def choose_winner(plan: SearchPlan, directory: SearchDirectory) -> dict[str, Any]:
    """Return the row of the best trial; among those that were repeated with other seeds, by the mean score.

    Raises:
        RunFailed: no trial has a score.
    """
    rows = read_json_lines(directory.rows)
    ranked = best_first(original_rows(directory), plan.metric)
    if not ranked:
        reasons = sorted({str(row["reason"]) for row in rows if row["reason"]})
        raise RunFailed(
            "no trial has a score: " + ("; ".join(reasons) or "the time limit was reached before the first evaluation")
        )
    seeds = seed_scores(plan, rows)
    repeated = [row for row in ranked if len(seeds[row["id"]]) > 1]
    sign = 1 if plan.metric.higher_is_better else -1

    def mean(row: dict[str, Any]) -> float:
        return sign * statistics.mean(float(seed["score"]) for seed in seeds[row["id"]])

    winner = max(repeated, key=mean, default=ranked[0])
    return {**winner, "seeds": seeds[winner["id"]]}


def seed_scores(plan: SearchPlan, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the score of each trial with every seed that it was trained with, by the trial's id."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        score = score_of(row, plan.metric.name)
        if score is not None:
            seed = row["parameters"].get(SEED, plan.prepared.recipe.train.seed)
            found.setdefault(original_id(row), []).append({"seed": seed, "score": score})
    return found
