"""Ray Tune: which trial runs where and when. With `searchers.py`, `halving.py` and `ending.py`, all that knows Ray.

Trials run one after another in actors that Ray Tune keeps from trial to trial: torch is imported, the data are mapped
and features are on the disk when a trial begins, so that it costs what it computes. Ray Tune's own snapshots are not
used: a trial is a run directory, and a search that was killed is told again, from those, what it had seen.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, Trainable, TuneConfig, Tuner
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler

from orchestrator.launch.cluster import HIDES_GPUS
from orchestrator.recipe.schema import Search
from orchestrator.search.distributions import Choice, Domain
from orchestrator.search.ray.asha import Halving
from orchestrator.search.ray.cleanup import Sweeper, interruptible
from orchestrator.search.ray.searchers import SCORE, Listed, Unsaved
from orchestrator.search.resources import TrialResources
from orchestrator.search.trial_interface import Listener, Workplace

WORST = -1e30  # The score of a trial that has none: Ray Tune and Optuna sort it last.
PARAMETERS = "parameters"
MAX_RESTARTS = 2  # Of a trial whose process died.
VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.jsonl and metrics.jsonl hold all that Tune's loggers would.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `interruptible` listens instead.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # When all ends: a trial may be minutes from its next evaluation.
}


class Actor(Trainable):  # type: ignore[misc]
    """Runs trials, one after another."""

    def setup(self, config: dict[str, Any], make_workplace: Callable[[], Workplace]) -> None:
        self.workplace = make_workplace()
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self.spec = config["spec"]
        # What has changed midway the trial knows itself, or is told with another's weights.
        self.running = self.workplace.begin(self.spec["id"], self.spec["parameters"], self.spec.get("members"))
        self.is_over = False

    def step(self) -> dict[str, Any]:
        report = self.running.advance()
        self.is_over = report.is_last
        score = WORST if report.score is None or math.isnan(report.score) else report.score
        # Ray Tune sets `done`, too, for a trial that it stops; the second word stays the trial's own.
        own = {"is_last": report.is_last, "row": report.row, "reason": report.reason, PARAMETERS: report.parameters}
        return {SCORE: score, "done": report.is_last, **own}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.running.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.running.restore(Path(checkpoint), self.spec["parameters"] | mutated(self.config))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        try:
            self._leave()
        finally:
            self.workplace.close()

    def _leave(self) -> None:
        if not self.is_over:
            self.running.stop()
        self.is_over = True


def mutated(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters that population-based training has changed midway."""
    return {path: value for path, value in config.items() if path != "spec"}


class Messenger(Unsaved, Callback):  # type: ignore[misc]
    """Hands on what Ray Tune says."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.listener.began(id_of(trial))

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result.get("row"):
            # Not those in its config: that may be changed already for what comes next.
            changed = {path: result[PARAMETERS][path] for path in mutated(trial.config)}
            self.listener.told(id_of(trial), {**result["row"], **({"parameters": changed} if changed else {})})

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self.listener.ended(id_of(trial), bool(result.get("is_last")), result.get("reason"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
        self.listener.ended(id_of(trial), True, lines[-1] if lines else "its process died")


def id_of(trial: Any) -> str:
    found: str = trial.config["spec"]["id"]
    return found


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Has a trial that takes over another's weights and changes its parameters stay the trial that it is."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        # A trial of a killed search has the parameters that it had been given then.
        told = {path: result.get(f"{PARAMETERS}/{path}", value) for path, value in mutated(trial.config).items()}
        trial.set_config({**trial.config, **told})
        return super().on_trial_result(tune_controller, trial, result)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "spec": trial.config["spec"]}, operations


def make_scheduler(search: Search, domains: Mapping[str, Domain], concurrent: int) -> TrialScheduler:
    """The scheduler of the recipe's name; its time is counted in evaluations.

    Args:
        domains: of what population-based training may change.
        concurrent: trials at a time.
    """
    if search.scheduler == "asha":
        return Halving(search.grace, search.reduction, SCORE, WORST, concurrent)
    if search.scheduler == "pbt":
        return Population(
            time_attr="training_iteration",
            perturbation_interval=search.grace,
            hyperparam_mutations={path: as_mutation(domain, search.seed) for path, domain in domains.items()},
            # Ray multiplies numbers by 0.8 or 1.2, whatever their bounds.
            custom_explore_fn=lambda config: {
                path: domains[path].clip(value) if path in domains else value for path, value in config.items()
            },
        )
    return FIFOScheduler()


def as_mutation(domain: Domain, seed: int) -> Any:
    """Ray's way to say where values come from: a list, or a function that draws one."""
    if isinstance(domain, Choice):
        return list(domain.values)
    stream = Random(seed)
    return lambda: domain.draw(stream)


def run_trials(
    searcher: Listed,
    scheduler: TrialScheduler,
    make_workplace: Callable[[], Workplace],
    listener: Listener,
    concurrent: int,
    resources: TrialResources,
    folder: Path,
    seconds: float | None = None,
) -> None:
    """Run trials until the searcher has no more, or time is up.

    Args:
        resources: of one trial.
        folder: where Ray Tune may keep what it wants to; nothing of it is read again.

    Raises:
        KeyboardInterrupt: after the trials have let go of what they held.
    """
    sweepers = [Sweeper()] if resources.workers > 1 else []
    with contextlib.ExitStack() as stack:
        for context in (variables(VARIABLES), interruptible(), *(each.at_end() for each in sweepers), plain_actors()):
            stack.enter_context(context)
        trainable = tune.with_resources(tune.with_parameters(Actor, make_workplace=make_workplace), resources.actor)
        is_population = isinstance(scheduler, Population)
        if isinstance(scheduler, Halving):
            scheduler.source = searcher
            searcher.has_room, searcher.is_over = scheduler.has_room, scheduler.is_over
        Tuner(
            trainable,
            param_space=searcher.as_space() if is_population else {},
            tune_config=TuneConfig(
                metric=SCORE,
                mode="max",
                num_samples=1 if is_population else -1,
                search_alg=None if is_population else searcher,
                scheduler=scheduler,
                max_concurrent_trials=None if isinstance(scheduler, Halving) else concurrent,
                reuse_actors=True,
                time_budget_s=seconds,
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=str(folder),
                callbacks=[Messenger(listener), *sweepers],
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
                verbose=0,
            ),
        ).fit()


@contextlib.contextmanager
def plain_actors() -> Iterator[None]:
    """Have Ray Tune's actors run in processes that Ray has started already, with what those have imported.

    It hands environment variables to its actors, for which Ray would start other processes. On a cluster that this
    process has started they are there anyway; on any other, actors without a GPU are told to see none.
    """
    handed = (class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE)
    before = [each.copy() for each in handed]
    if os.environ.get("RAY_ADDRESS"):
        class_cache.DEFAULT_ENV_VARS[HIDES_GPUS] = "1"
    else:
        for each in handed:
            each.clear()
    try:
        yield
    finally:
        for each, values in zip(handed, before, strict=True):
            each.clear()
            each.update(values)


@contextlib.contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for as long as this lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
