"""Runs trials with Ray Tune.

Trials run one after another in actors that Ray Tune keeps from trial to trial: torch is imported, the data are mapped
and features are on the disk when a trial starts, so that it costs the time of its computation. Ray Tune's own snapshots
are not used: a trial is a run directory, from which a resumed search reports again what it had reported.
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
from orchestrator.search.distributions import Choice, Distribution
from orchestrator.search.ray.asha import ASHA
from orchestrator.search.ray.cleanup import PlacementGroupCleaner, stop_on_signals
from orchestrator.search.ray.searchers import SCORE, ListSearcher, NotSaved
from orchestrator.search.resources import TrialResources
from orchestrator.search.trial_interface import TrialCallback, TrialProcess

WORST = -1e30
"""Score of a trial without one; Ray Tune and Optuna sort it last."""
PARAMETERS = "parameters"
MAX_RESTARTS = 2
"""Restarts of a trial whose process died."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.jsonl and metrics.jsonl hold all that Tune's loggers would.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `stop_on_signals` handles it.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # A trial may be minutes from its next evaluation.
}


class TrialActor(Trainable):  # type: ignore[misc]
    """Runs trials, one after another."""

    def setup(self, config: dict[str, Any], make_trial_process: Callable[[], TrialProcess]) -> None:
        self.process = make_trial_process()
        self._start(config)

    def _start(self, config: dict[str, Any]) -> None:
        self.spec = config["spec"]
        # Parameters that were changed during the trial are in its directory, or come with the weights of another.
        self.running = self.process.start(self.spec["id"], self.spec["parameters"], self.spec.get("batched"))
        self.is_over = False

    def step(self) -> dict[str, Any]:
        result = self.running.advance()
        self.is_over = result.is_last
        score = WORST if result.score is None or math.isnan(result.score) else result.score
        # Ray Tune sets `done` for a trial that it stops, too; `is_last` stays the trial's own.
        own = {"is_last": result.is_last, "row": result.row, "reason": result.reason, PARAMETERS: result.parameters}
        return {SCORE: score, "done": result.is_last, **own}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.running.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.running.restore(Path(checkpoint), self.spec["parameters"] | mutated(self.config))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._stop()
        self._start(new_config)
        return True

    def cleanup(self) -> None:
        try:
            self._stop()
        finally:
            self.process.close()

    def _stop(self) -> None:
        if not self.is_over:
            self.running.stop()
        self.is_over = True


def mutated(config: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that population-based training has changed during the trial."""
    return {path: value for path, value in config.items() if path != "spec"}


class TuneCallback(NotSaved, Callback):  # type: ignore[misc]
    """Passes Ray Tune's events on to a `TrialCallback`."""

    def __init__(self, callback: TrialCallback) -> None:
        self.callback = callback

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.callback.on_trial_start(id_of(trial))

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result.get("row"):
            # Not those in its config, which may be changed already for the next evaluations.
            changed = {path: result[PARAMETERS][path] for path in mutated(trial.config)}
            self.callback.on_trial_result(
                id_of(trial), {**result["row"], **({"parameters": changed} if changed else {})}
            )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self.callback.on_trial_complete(id_of(trial), bool(result.get("is_last")), result.get("reason"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
        self.callback.on_trial_complete(id_of(trial), True, lines[-1] if lines else "its process died")


def id_of(trial: Any) -> str:
    """Return our id of a trial of Ray Tune."""
    found: str = trial.config["spec"]["id"]
    return found


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training in which a trial that continues from another, with other parameters, keeps its id."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        # A trial of a resumed search has the parameters that it was given before.
        own = {path: result.get(f"{PARAMETERS}/{path}", value) for path, value in mutated(trial.config).items()}
        trial.set_config({**trial.config, **own})
        return super().on_trial_result(tune_controller, trial, result)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "spec": trial.config["spec"]}, operations


def make_scheduler(search: Search, distributions: Mapping[str, Distribution], concurrent: int) -> TrialScheduler:
    """Return the scheduler that the recipe names; it counts time in evaluations.

    Args:
        distributions: of the parameters that population-based training may change.
        concurrent: trials at a time.
    """
    if search.scheduler == "asha":
        return ASHA(search.grace, search.reduction, SCORE, WORST, concurrent)
    if search.scheduler == "pbt":
        return Population(
            time_attr="training_iteration",
            perturbation_interval=search.grace,
            hyperparam_mutations={
                path: as_mutation(distribution, search.seed) for path, distribution in distributions.items()
            },
            # Ray multiplies numbers by 0.8 or 1.2, regardless of their bounds.
            custom_explore_fn=lambda config: {
                path: distributions[path].clip(value) if path in distributions else value
                for path, value in config.items()
            },
        )
    return FIFOScheduler()


def as_mutation(distribution: Distribution, seed: int) -> Any:
    """Return a distribution as Ray's schedulers take it: a list of values, or a function that samples one."""
    if isinstance(distribution, Choice):
        return list(distribution.values)
    stream = Random(seed)
    return lambda: distribution.sample(stream)


def run_with_tune(
    searcher: ListSearcher,
    scheduler: TrialScheduler,
    make_trial_process: Callable[[], TrialProcess],
    callback: TrialCallback,
    concurrent: int,
    resources: TrialResources,
    folder: Path,
    seconds: float | None = None,
) -> None:
    """Run trials until the searcher has no more, for at most `seconds` seconds.

    Args:
        concurrent: trials at a time.
        resources: of one trial.
        folder: for the files of Ray Tune, which are not read again.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the trials have released their resources.
    """
    cleaners = [PlacementGroupCleaner()] if resources.workers > 1 else []
    with contextlib.ExitStack() as stack:
        for context in (
            environment(ENVIRONMENT),
            stop_on_signals(),
            *(each.at_end() for each in cleaners),
            plain_actors(),
        ):
            stack.enter_context(context)
        trainable = tune.with_resources(
            tune.with_parameters(TrialActor, make_trial_process=make_trial_process), resources.actor
        )
        is_population = isinstance(scheduler, Population)
        if isinstance(scheduler, ASHA):
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
                max_concurrent_trials=None if isinstance(scheduler, ASHA) else concurrent,
                reuse_actors=True,
                time_budget_s=seconds,
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=str(folder),
                callbacks=[TuneCallback(callback), *cleaners],
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
                verbose=0,
            ),
        ).fit()


@contextlib.contextmanager
def plain_actors() -> Iterator[None]:
    """Run Ray Tune's actors in processes that Ray has started already, with the modules that those have imported.

    Ray Tune passes environment variables to its actors, for which Ray would start other processes. The processes of a
    cluster that this process has started have them already; on another cluster, actors without a GPU must not see one.
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
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of a block."""
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
