"""The course of a search: run the trials, name the best, leave its model."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, TextIO

from orchestrator.errors import RunFailed
from orchestrator.recipe import dump_recipe
from orchestrator.recipe.schema import Search
from orchestrator.report import write_report
from orchestrator.search import tuning
from orchestrator.search.ledger import Ledger
from orchestrator.search.outcome import BEST_WEIGHTS, Spec
from orchestrator.search.pack import pack_trials
from orchestrator.search.plan import Plan
from orchestrator.search.records import SearchDirectory, append_row, best_first, read_rows, score_of
from orchestrator.search.resources import num_concurrent, trial_resources
from orchestrator.search.space import decode, trial_recipe
from orchestrator.search.winner import keep_winner
from orchestrator.search.workplace import make_workplace
from orchestrator.training.run_directory import write_atomically

SEED = "train.seed"
SUGGESTED = "suggested.jsonl"


def begin_record(plan: Plan, directory: SearchDirectory) -> None:
    write_atomically(directory.recipe, dump_recipe(plan.prepared.recipe))
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
    )


def run(plan: Plan, directory: SearchDirectory, screen: TextIO | None) -> None:
    """Run what has not been run yet, choose the winner and leave its model."""
    started = time.monotonic()
    before = directory.read_record().get("seconds", 0.0)
    run_all(plan, directory, screen, before)
    if plan.search.reseed_top and plan.search.reseeds:
        reseed(plan, directory, screen)
    winner = choose_winner(plan, directory)
    write_atomically(directory.best, dump_recipe(trial_recipe(plan.prepared.recipe, winner["parameters"])))
    result = keep_winner(plan.prepared, plan.metric, directory, winner)
    seconds = before + time.monotonic() - started
    directory.update_record(
        status="finished", seconds=seconds, winner={**winner, "metrics": result["metrics"]}, ended=time.time()
    )
    drop_weights(plan, directory)
    write_report(directory.root)


def drop_weights(plan: Plan, directory: SearchDirectory) -> None:
    """The best weights stay of those trials alone that could have been repeated, should more repetitions be wanted."""
    rows = read_rows(directory.rows)
    kept = {row["id"] for row in best_first(rows, plan.metric)[: weights_kept(plan)]}
    for row in rows:
        if row["id"] not in kept:
            (directory.trial(row["id"]).root / BEST_WEIGHTS).unlink(missing_ok=True)


def weights_kept(plan: Plan) -> int:
    """Of how many of the best trials the weights are kept."""
    return max(1, plan.search.reseed_top)


def run_all(plan: Plan, directory: SearchDirectory, screen: TextIO | None, seconds_before: float) -> None:
    """The trials of the space."""
    ledger = Ledger(directory, plan.metric, plan.num_trials, screen, plan.search.scheduler == "asha")
    if plan.known is None:
        searcher: Any = suggesting(plan, directory, ledger)
    else:
        searcher = tuning.Listed(list_trials(plan, plan.known, ledger), plan.changing)
    limit = plan.search.seconds
    left = None if limit is None else max(1.0, limit - seconds_before)
    run_trials(plan, directory, ledger, searcher, plan.search, left)


def list_trials(plan: Plan, known: list[dict[str, Any]], ledger: Ledger) -> Iterator[dict[str, Any]]:
    """What Ray Tune hands to its actors: trials that train only the head are packed."""
    specs = [Spec(trial_id(number), parameters) for number, parameters in enumerate(known)]
    have = tuning.cluster_resources()
    recipe = plan.prepared.recipe
    # Population-based training changes rates midway, so each of its trials is one of its own.
    num_packs = 0 if plan.search.scheduler == "pbt" else num_concurrent(plan, have, trial_resources(recipe, have))
    packs, others = pack_trials(recipe, specs, num_packs) if num_packs else ([], specs)
    for number, pack in enumerate(packs):
        yield ledger.expect_pack(f"pack-{number}", {spec.id: spec.parameters for spec in pack})
    for spec in sorted(others, key=lambda spec: spec.id):
        yield ledger.expect(spec.id, spec.parameters)


def trial_id(number: int) -> str:
    return f"{number:04d}"


def suggesting(plan: Plan, directory: SearchDirectory, ledger: Ledger) -> Any:
    """TPE. What an earlier attempt had suggested is suggested again first, and its scores are told again."""
    recorded = directory.root / SUGGESTED
    points = read_rows(recorded)
    inner = tuning.optuna_searcher(plan.space.optuna_define, plan.search.seed, points)
    count = itertools.count()

    def make_spec(config: dict[str, Any]) -> dict[str, Any]:
        number = next(count)
        if number >= len(points):
            append_row(recorded, {name: value for name, value in config.items() if name != "parameters"})
        return ledger.expect(trial_id(number), decode(config))

    return tuning.Suggested(inner, plan.search.trials, make_spec)


def run_trials(
    plan: Plan, directory: SearchDirectory, ledger: Ledger, searcher: Any, how: Search, seconds: float | None = None
) -> None:
    have = tuning.cluster_resources()
    resources = trial_resources(plan.prepared.recipe, have)
    concurrent = num_concurrent(plan, have, resources)
    cores = os.cpu_count() or 1
    directory.update_record(concurrent=concurrent, cores=cores)
    tuning.run_trials(
        searcher,
        tuning.make_scheduler(how, plan.changing, concurrent),
        partial(
            make_workplace,
            plan.prepared,
            directory.root,
            plan.boundaries,
            plan.metric,
            weights_kept(plan),
            max(1, cores // concurrent),
        ),
        ledger,
        concurrent,
        resources,
        directory.logs / "ray",
        seconds,
    )
    ledger.out_of_time()


def reseed(plan: Plan, directory: SearchDirectory, screen: TextIO | None) -> None:
    """Train the best trials again with other seeds."""
    base = plan.prepared.recipe.train.seed
    best = best_first(original_rows(directory), plan.metric)[: plan.search.reseed_top]
    specs = [
        (f"{row['id']}-seed-{base + offset}", {**row["parameters"], SEED: base + offset})
        for row in best
        for offset in range(1, plan.search.reseeds + 1)
    ]
    ledger = Ledger(directory, plan.metric, len(original_rows(directory)) + len(specs), screen)
    searcher = tuning.Listed(ledger.expect(id, parameters) for id, parameters in specs)
    run_trials(plan, directory, ledger, searcher, Search())


def original_rows(directory: SearchDirectory) -> list[dict[str, Any]]:
    """Trials of the space, without those that repeat one with another seed."""
    return [row for row in read_rows(directory.rows) if "-seed-" not in row["id"]]


def choose_winner(plan: Plan, directory: SearchDirectory) -> dict[str, Any]:
    """The best trial; among those that were repeated with other seeds, the one with the best mean.

    Raises:
        RunFailed: no trial has a score.
    """
    rows = read_rows(directory.rows)
    ranked = best_first(original_rows(directory), plan.metric)
    if not ranked:
        reasons = sorted({str(row["reason"]) for row in rows if row["reason"]})
        raise RunFailed("no trial has a score: " + ("; ".join(reasons) or "time was up before the first evaluation"))
    seeds = {row["id"]: seed_scores(plan, row, rows) for row in ranked}
    repeated = [row for row in ranked if len(seeds[row["id"]]) > 1]
    sign = 1 if plan.metric.higher_is_better else -1

    def mean(row: dict[str, Any]) -> float:
        return sign * statistics.mean(float(seed["score"]) for seed in seeds[row["id"]])

    winner = max(repeated, key=mean, default=ranked[0])
    return {**winner, "seeds": seeds[winner["id"]]}


def seed_scores(plan: Plan, row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trial's scores with each seed it was trained with."""
    found = []
    for other in rows:
        if other["id"] == row["id"] or other["id"].startswith(f"{row['id']}-seed-"):
            score = score_of(other, plan.metric.name)
            seed = other["parameters"].get(SEED, plan.prepared.recipe.train.seed)
            found += [] if score is None else [{"seed": seed, "score": score}]
    return found
