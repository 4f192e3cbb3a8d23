"""Ray Train's trainer, run to its end, with its errors as those of this package."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.launch import import_ahead
from orchestrator.launch.cluster import HIDES_GPUS, remove_orphaned_groups
from orchestrator.launch.dead_workers import error_of, failure_policy, last_line, reason
from orchestrator.recipe import Recipe

COLLECTIVE_TIMEOUT_SECONDS = 600
SECONDS_TO_DIE = 5.0  # For a controller that is killed.


class ControllerDied(RunFailed):
    """The process died that runs Ray Train's controller of the workers."""


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a Ray Train run."""

    recipe: Recipe
    scaling: Any
    """A `ray.train.ScalingConfig`; without workers, the loop runs in this process."""
    logs: Path
    """Named in errors."""
    storage: Path
    """Where Ray Train may write."""
    attempt: int
    callbacks: Sequence[Any] = field(default_factory=tuple)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` without Ray Train's guard of placement groups, and with another policy for failed workers.

    The guard is a detached actor, a process for each run, which never ends where the run is killed: without a dashboard
    it does not try to, and with one it tries from a thread, where it cannot. The placement groups of a run are removed
    without it: by Ray when the job ends, and earlier by `remove_orphaned_groups`.
    """

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Keep the controller. Ray's handler of Ctrl-C would kill the workers, and end the command as a failure."""
        self.controller = controller

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = failure_policy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})


class CpuTorchConfig(TorchConfig):  # type: ignore[misc]
    """Without a context on the first GPU that the process sees, which Ray Train creates otherwise."""

    train_func_context = contextlib.nullcontext


def run_trainer(loop: Callable[[dict[str, Any]], Any], config: dict[str, Any], settings: TrainerSettings) -> None:
    """Run `loop` on Ray Train workers.

    Args:
        loop: called on each worker with `config`; may return an error.

    Raises:
        OrchestratorError: a worker returned it.
        RunFailed: workers failed more often than the recipe allows.
        ControllerDied: Ray Train's controller died.
    """
    trainer = _build_trainer(loop, config, settings)
    try:
        outcome = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        if (found := error_of(error)) is not None:
            raise found from error
        most = settings.recipe.scale.max_failures
        raise RunFailed(
            f"the workers failed more than {most} times; the last time: {last_line(error)}\n"
            f"    -> see the logs in {settings.logs}; the same command resumes from the last checkpoint"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise ControllerDied(f"Ray Train's controller died ({reason(error)})") from error
    except KeyboardInterrupt:
        _kill_workers(trainer)
        raise
    if isinstance(outcome, OrchestratorError):
        raise outcome


def _build_trainer(loop: Callable[[dict[str, Any]], Any], config: dict[str, Any], settings: TrainerSettings) -> Trainer:
    scale = settings.recipe.scale
    torch_config = CpuTorchConfig if scale.gpus_per_worker == 0 else TorchConfig
    return Trainer(
        loop,
        train_loop_config=config,
        scaling_config=settings.scaling,
        torch_config=torch_config(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        run_config=ray.train.RunConfig(
            name=f"attempt-{settings.attempt}",
            storage_path=str(settings.storage),
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            worker_runtime_env=worker_environment(),
            callbacks=list(settings.callbacks),
        ),
    )


def _kill_workers(trainer: Trainer) -> None:
    """Kill the controller and its workers: the cluster may live on after this command."""
    if trainer.controller is None:
        return
    ray.kill(trainer.controller)
    until = time.monotonic() + SECONDS_TO_DIE
    while remove_orphaned_groups() and time.monotonic() < until:
        time.sleep(0.1)


def worker_environment() -> dict[str, Any]:
    """Return the runtime environment of workers: how threads wait, what to import ahead, and no GPU unless given one.

    Ray's hook for new processes is set by its own environment variable, because Ray lets only whole jobs set it.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    hook = f"{import_ahead.__name__}.{import_ahead.start.__name__}"
    return {
        "env_vars": {
            "GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"],
            WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook,
            HIDES_GPUS: "1",
        }
    }
