"""Ray Train: start the workers, restart them when one dies."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.launch import import_ahead
from orchestrator.launch.cluster import HIDES_GPUS, has_notices, remove_orphans, scaling
from orchestrator.launch.dead_workers import BeginAgain, GiveUp, error_of, failure_policy, last_line, reason, teller
from orchestrator.launch.stop_request import Asker, Listener
from orchestrator.recipe import Recipe
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.progress import ProgressFile
from orchestrator.runs.remote import open_run
from orchestrator.storage import credentials, is_url
from orchestrator.training.interruption import Interruption, Wish
from orchestrator.training.prepare import Prepared

if TYPE_CHECKING:
    from orchestrator.training.preemption import Notice

SECONDS_UNTIL_A_HUNG_COLLECTIVE_FAILS = 600
SECONDS_UNTIL_A_NODE_GOES = 120.0  # Ray Train's own guess where no deadline is told.
SECONDS_AFTER_A_DEADLINE = 60.0
SECONDS_TO_DIE = 5.0  # For a controller that is killed.
Work = Callable[[Prepared, Any], None]


def run_workers(prepared: Prepared, directory: RunDirectory, attempt: int, interruption: Interruption) -> None:
    """Run the training on its workers; returns when it is finished.

    One worker runs in this process (Ray Train's local mode), several as Ray Train workers. A worker that dies takes its
    group with it; Ray starts the group again, up to `scale.max_failures` times, and it goes on from its checkpoint. So
    it does, as another attempt, where Ray's own controller of the workers dies.

    Raises:
        OrchestratorError: what a worker found wrong.
        Interrupted: a signal came, and the workers have saved their last step.
        RunFailed: workers died more often than allowed.
    """
    import ray.train

    recipe = prepared.recipe
    distributed = recipe.scale.workers > 1
    asker = Asker()
    config = {
        "wish": asker.key if distributed else interruption,
        # In the object store, each node holds the encoded data once, and its workers read them without a copy.
        "prepared": ray.put(prepared) if distributed else prepared,
        "place": directory.place,
        "attempt": attempt,
        "has_notices": distributed and has_notices(),
        # As a reference: Ray shows what is in here, and the workers' environment, to everybody.
        "credentials": ray.put(credentials()) if distributed and is_url(directory.place) else None,
    }
    size = scaling(recipe) if distributed else ray.train.ScalingConfig(num_workers=0)
    if distributed and recipe.scale.wait_for_nodes:
        wanted = " and ".join(f"{number:g} {kind}" for kind, number in size.resources_per_worker.items())
        workers = f"{size.min_workers} workers with {wanted} each"
        ProgressFile(directory.root).show(force=True, phase=f"waiting until the cluster has room for {workers}")
    where = (directory.logs, directory.logs / "ray")
    told = [teller(directory.place, config["credentials"])] if distributed else []
    for left in reversed(range(recipe.scale.max_failures + 1)):
        try:
            with asker.waiting(), interruption.passed_on(asker.ask) if distributed else contextlib.nullcontext():
                fit(train_on_worker, config, size, recipe, *where, attempt, told)
            return
        except ControllerDied as error:
            if interruption.is_given():
                raise KeyboardInterrupt from None
            if not left:
                raise
            directory.note(f"{error}; the run goes on from its last checkpoint")
        # Workers of before that are not dead yet can commit nothing any more.
        attempt = config["attempt"] = attempt + 1
        directory.update_record(attempt=attempt)
        remove_orphans()


def run_crew(prepared: Prepared, work: Work, resources: dict[str, float], folder: Path) -> None:
    """Run workers for trials of a search, from within a trial's actor; returns when `work` has returned on all of them.

    Args:
        work: called on every worker with the prepared data and the worker's device; what it raises counts as the
            worker's death.
        resources: CPUs and GPUs of each worker.
        folder: where the workers and Ray Train may write.

    Raises:
        RunFailed: workers died more often than `scale.max_failures` allows.
    """
    import ray.train

    # How soon a dead worker, and the end of a run, are noticed: a search has many runs, and each waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    recipe = prepared.recipe
    size = ray.train.ScalingConfig(
        num_workers=recipe.scale.workers, use_gpu="GPU" in resources, resources_per_worker=resources
    )
    config = {"prepared": ray.put(prepared), "work": ray.put(work), "folder": str(folder)}
    try:
        fit(work_on_worker, config, size, recipe, folder, folder / "ray", 1)
    except ray.exceptions.RayError as error:
        raise RunFailed(f"Ray Train itself failed: {last_line(error)}") from error


class ControllerDied(RunFailed):
    """The process died that Ray Train looks after the workers with."""


def fit(
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    size: Any,
    recipe: Recipe,
    logs: Path,
    storage: Path,
    attempt: int,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `loop` on Ray Train workers of this size; an error that it returns is raised, as what Ray Train raises is."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without Ray Train's guard of placement groups, and with a policy of its own for failed workers.

        The guard is a detached actor, a process for each run. Where the run is killed it never ends: not without a
        dashboard, and else because it tries to from a thread, where it cannot. What a run has reserved is given back
        without it: by Ray when the job ends, before that by `remove_orphans`.
        """

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            """Keep the controller; Ray's handler of Ctrl-C would kill the workers, and end the command as a failure."""
            self.controller = controller

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            policy = failure_policy(self.run_config.failure_config)
            return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

    class OnCpu(TorchConfig):  # type: ignore[misc]
        """Without a context on the first GPU that this process sees, which Ray Train otherwise makes."""

        train_func_context = contextlib.nullcontext

    run = Trainer(
        loop,
        train_loop_config=config,
        scaling_config=size,
        torch_config=(OnCpu if recipe.scale.gpus_per_worker == 0 else TorchConfig)(
            timeout_s=SECONDS_UNTIL_A_HUNG_COLLECTIVE_FAILS
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=recipe.scale.max_failures),
            worker_runtime_env=worker_environment(),
            callbacks=list(callbacks),
        ),
    )
    try:
        outcome = run.fit().return_value
    except ray.train.TrainingFailedError as error:
        if (found := error_of(error)) is not None:
            raise found from error
        raise RunFailed(
            f"the workers failed more than {recipe.scale.max_failures} times; the last time: {last_line(error)}\n"
            f"    -> the traceback is in {logs}; the same command goes on from the last checkpoint"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise ControllerDied(f"Ray Train's controller died ({reason(error)})") from error
    except KeyboardInterrupt:
        if run.controller is not None:  # The cluster may go on after this command, which its workers must not.
            ray.kill(run.controller)
            until = time.monotonic() + SECONDS_TO_DIE
            while remove_orphans() and time.monotonic() < until:
                time.sleep(0.1)
        raise
    if isinstance(outcome, OrchestratorError):
        raise outcome


def work_on_worker(config: dict[str, Any]) -> None:
    """What every worker of a crew runs."""
    import ray.train
    from ray.train.torch import get_device

    rank = ray.train.get_context().get_world_rank()
    with output_to(Path(config["folder"]) / f"worker-{rank}.log"):
        # Unpacking imports the search, which comes to modules that the imports ahead have half done.
        import_ahead.wait()
        have_gloo_use(ray.util.get_node_ip_address())
        ray.get(config["work"])(ray.get(config["prepared"]), get_device())


def train_on_worker(config: dict[str, Any]) -> OrchestratorError | None:
    """What every Ray Train worker runs. An error meant for the user is returned, so that Ray does not try it again."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    rank = context.get_world_rank()
    prepared = config["prepared"]
    alone = not isinstance(prepared, ray.ObjectRef)  # In the calling process.
    if config["credentials"] is not None:
        os.environ.update(ray.get(config["credentials"]))
    with contextlib.ExitStack() as stack:
        if not alone:
            # By the same address as Ray numbers the workers of a node, of which two on one machine are one.
            address = ray.util.get_node_ip_address()
            have_gloo_use(address)
            directory = open_run(config["place"], address)
            directory.leads_node = context.get_local_rank() == 0
            directory.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.callback(directory.upload_logs)
            stack.enter_context(output_to(directory.logs / f"worker-{rank}.log"))
            import_ahead.wait()
            prepared = ray.get(prepared)
            if directory.leads_node:
                directory.create()
        else:
            directory = open_run(config["place"])
        prepared = with_workers(prepared, context.get_world_size())
        # After the imports ahead, which come to the same modules.
        from orchestrator.training.engine.devices import choose_device

        try:
            notice = PreemptionNotice() if config["has_notices"] else None
            device = choose_device(prepared.recipe) if alone else get_device()
            wish = config["wish"]
            wish = Listener(wish, rank == 0) if isinstance(wish, str) else wish
            train_in_passes_that_fit(prepared, directory, config["attempt"], device, rank, notice, wish)
        except OrchestratorError as error:
            return error
        if directory.leads_node:
            directory.finish()
    return None


def have_gloo_use(address: str) -> None:
    """Have gloo talk over the network interface with this address of the machine, unless the user names another.

    Gloo itself takes the address of the machine's name, which on some machines is one that others cannot reach.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def with_workers(prepared: Prepared, number: int) -> Prepared:
    """The same for as many workers as there are, of those that an elastic run may have."""
    scale = prepared.recipe.scale.model_copy(update={"workers": number})
    return replace(prepared, recipe=prepared.recipe.model_copy(update={"scale": scale}))


class PreemptionNotice:
    """What Ray Train hears of nodes that will be taken away, such as a cloud's spot machines."""

    def __init__(self) -> None:
        self._told: Any = None
        self._waited_for: Any = None

    def is_given(self) -> bool:
        import ray.train

        self._told = ray.train.get_preemption_info()
        return self._told is not None and self._told != self._waited_for

    def wait(self) -> None:
        self._waited_for = self._told
        deadline = self._told.deadline_ms
        left = SECONDS_UNTIL_A_NODE_GOES if deadline is None else deadline / 1000 - time.time()
        time.sleep(max(0.0, left) + SECONDS_AFTER_A_DEADLINE)


def train_in_passes_that_fit(
    prepared: Prepared,
    directory: RunDirectory,
    attempt: int,
    device: Any,
    rank: int,
    notice: Notice | None,
    wish: Wish | None = None,
) -> None:
    """Run this worker's part; where memory runs out, go on from the last checkpoint with smaller passes."""
    from orchestrator.launch.out_of_memory import halve_passes, is_out_of_memory, with_recorded_passes
    from orchestrator.training.worker import run_worker

    while True:
        tried = with_recorded_passes(prepared, directory)
        try:
            return run_worker(tried, directory, attempt, device, is_first=rank == 0, notice=notice, wish=wish)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if prepared.recipe.scale.workers > 1:
                # The others wait for this one, so Ray ends them.
                try:
                    halve_passes(tried, directory)
                except RunFailed as failed:
                    raise GiveUp(failed) from error
                raise BeginAgain(str(error)) from error
        halve_passes(tried, directory)


def worker_environment() -> dict[str, Any]:
    """The runtime environment of Ray Train's workers: how their threads wait, what they import beforehand, and that
    those without a GPU see none.

    Ray's hook for new processes is set by the variable that it uses itself, because Ray lets only whole jobs set it.
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


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send everything this process prints, from Python or below it, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
