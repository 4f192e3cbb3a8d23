"""Ray Train: start the workers, restart them when one dies. The only file of this room that knows Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError, OrchestratorError, Problem, RunFailed
from orchestrator.recipe import Recipe
from orchestrator.storage import credentials, is_url
from orchestrator.training import import_ahead
from orchestrator.training.prepare import Prepared
from orchestrator.training.progress import ProgressFile
from orchestrator.training.remote_run import open_run
from orchestrator.training.run_directory import RunDirectory

SECONDS_UNTIL_A_HUNG_COLLECTIVE_FAILS = 600
SECONDS_FOR_FIRST_PROCESSES = 10.0
SECONDS_BETWEEN_LOOKS_FOR_MORE = 120.0
"""An elastic run that finds room for more workers begins again from its last checkpoint."""
Work = Callable[[Prepared, Any], None]


def run_workers(prepared: Prepared, directory: RunDirectory, attempt: int) -> None:
    """Run the training on its workers; returns when it is finished.

    One worker runs in this process (Ray Train's local mode), several as Ray Train workers. A worker that dies takes its
    group with it; Ray starts the group again, up to `scale.max_failures` times, and it goes on from its checkpoint.

    Raises:
        OrchestratorError: what a worker found wrong.
        RunFailed: workers died more often than allowed.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    recipe = prepared.recipe
    distributed = recipe.scale.workers > 1
    config = {
        # In the object store, each node holds the encoded data once, and its workers read them without a copy.
        "prepared": ray.put(prepared) if distributed else prepared,
        "place": directory.place,
        "attempt": attempt,
        # As a reference: Ray shows what is in here, and the workers' environment, to everybody.
        "credentials": ray.put(credentials()) if distributed and is_url(directory.place) else None,
    }
    size = scaling(recipe) if distributed else ray.train.ScalingConfig(num_workers=0)
    if distributed and recipe.scale.wait_for_nodes:
        wanted = " and ".join(f"{number:g} {kind}" for kind, number in size.resources_per_worker.items())
        workers = f"{size.min_workers} workers with {wanted} each"
        ProgressFile(directory.root).show(force=True, phase=f"waiting until the cluster has room for {workers}")
    fit(TorchTrainer, train_on_worker, config, size, recipe, directory.logs, directory.logs / "ray", attempt)


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
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without Ray Train's guard of placement groups.

        The guard is a detached actor, a process for each run, that asks the dashboard whether the run is alive; where
        there is no dashboard it never ends. The search looks after what its actors leave behind.
        """

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    # How soon a dead worker, and the end of a run, are noticed: a search has many runs, and each waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    recipe = prepared.recipe
    size = ray.train.ScalingConfig(
        num_workers=recipe.scale.workers, use_gpu="GPU" in resources, resources_per_worker=resources
    )
    config = {"prepared": ray.put(prepared), "work": ray.put(work), "folder": str(folder)}
    try:
        fit(Trainer, work_on_worker, config, size, recipe, folder, folder / "ray", 1)
    except ray.exceptions.RayError as error:
        raise RunFailed(f"Ray Train itself failed: {last_line(error)}") from error


def fit(
    trainer: type,
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    size: Any,
    recipe: Recipe,
    logs: Path,
    storage: Path,
    attempt: int,
) -> None:
    """Run `loop` on Ray Train workers of this size; an error that it returns is raised, as what Ray Train raises is."""
    import ray.train
    from ray.train.torch import TorchConfig

    run = trainer(
        loop,
        train_loop_config=config,
        scaling_config=size,
        torch_config=TorchConfig(timeout_s=SECONDS_UNTIL_A_HUNG_COLLECTIVE_FAILS),
        run_config=ray.train.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=recipe.scale.max_failures),
            worker_runtime_env=worker_environment(),
        ),
    )
    try:
        outcome = run.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise RunFailed(
            f"the workers failed more than {recipe.scale.max_failures} times; the last time: {last_line(error)}\n"
            f"    -> the whole story is in {logs}; the same command goes on from the last checkpoint"
        ) from error
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
        ray.get(config["work"])(ray.get(config["prepared"]), get_device())


def train_on_worker(config: dict[str, Any]) -> OrchestratorError | None:
    """What every Ray Train worker runs. An error meant for the user is returned, so that Ray does not try it again."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    rank = context.get_world_rank()
    prepared = config["prepared"]
    if config["credentials"] is not None:
        os.environ.update(ray.get(config["credentials"]))
    with contextlib.ExitStack() as stack:
        if isinstance(prepared, ray.ObjectRef):
            # By the same address as Ray numbers the workers of a node, of which two on one machine are one.
            directory = open_run(config["place"], ray.util.get_node_ip_address())
            directory.leads_node = context.get_local_rank() == 0
            directory.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.callback(directory.send_logs)
            stack.enter_context(output_to(directory.logs / f"worker-{rank}.log"))
            import_ahead.wait()
            prepared = ray.get(prepared)
            if directory.leads_node:
                directory.create()
        else:
            directory = open_run(config["place"])
        prepared = with_workers(prepared, context.get_world_size())
        try:
            train_in_passes_that_fit(prepared, directory, config["attempt"], get_device(), rank)
        except OrchestratorError as error:
            return error
        directory.finish()
    return None


def with_workers(prepared: Prepared, number: int) -> Prepared:
    """The same for as many workers as there are, of those that an elastic run may have."""
    scale = prepared.recipe.scale.model_copy(update={"workers": number})
    return replace(prepared, recipe=prepared.recipe.model_copy(update={"scale": scale}))


def train_in_passes_that_fit(prepared: Prepared, directory: RunDirectory, attempt: int, device: Any, rank: int) -> None:
    """Run this worker's part; where memory runs out, go on from the last checkpoint with smaller passes."""
    from orchestrator.training.out_of_memory import halve_passes, is_out_of_memory, with_recorded_passes
    from orchestrator.training.trainer import run_worker

    while True:
        tried = with_recorded_passes(prepared, directory)
        try:
            return run_worker(tried, directory, attempt, device, is_first=rank == 0)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if prepared.recipe.scale.workers > 1:
                halve_passes(tried, directory, prepared.recipe.train.micro_batch_size == "auto")
                raise  # The others wait for this one: Ray ends them, and all begin again.
        halve_passes(tried, directory, prepared.recipe.train.micro_batch_size == "auto")


def scaling(recipe: Recipe) -> Any:
    """How many workers of which size.

    Raises:
        ClusterError: the cluster cannot hold them, and the recipe does not wait for one that can.
    """
    import ray
    from ray.train import ScalingConfig

    have = ray.cluster_resources()
    scale = recipe.scale
    workers = scale.min_workers or scale.workers
    gpus = min(1, int(have.get("GPU", 0)) // workers) if scale.gpus_per_worker == "auto" else scale.gpus_per_worker
    share = max(1, int(have.get("CPU", 1)) // scale.workers)
    wanted = {"CPU": share if scale.cpus_per_worker == "auto" else scale.cpus_per_worker, "GPU": gpus}
    short = [
        too_few(recipe, kind, each, int(have.get(kind, 0)))
        for kind, each in wanted.items()
        if workers * each > have.get(kind, 0)
    ]
    if short and not scale.wait_for_nodes:
        raise ClusterError("\n".join(map(str, short)))
    resources = {kind: each for kind, each in wanted.items() if each}
    return ScalingConfig(
        num_workers=scale.workers if scale.min_workers is None else (scale.min_workers, scale.workers),
        use_gpu=gpus > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=SECONDS_BETWEEN_LOOKS_FOR_MORE,
    )


def cluster_nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster."""
    import ray

    return {kind: float(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU")}


def has_cluster() -> bool:
    """Whether this process is told of a Ray cluster, or is in one already."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def too_few(recipe: Recipe, kind: str, each: int, have: int) -> Problem:
    """What the cluster lacks of one kind of resource, for workers that want `each` of it."""
    workers = recipe.scale.min_workers or recipe.scale.workers
    fewer = f"set scale.workers to {have // each} or less" if have >= each else f"set scale.{kind.lower()}s_per_worker"
    what = f"{workers} workers with {each} {kind} each need {workers * each} {kind}s, the cluster has {have}"
    return Problem(what, recipe.origin.where("scale.workers"), f"{fewer}, or give the cluster more {kind}s")


@contextlib.contextmanager
def ray_session(recipe: Recipe) -> Iterator[Callable[[], None]]:
    """The Ray cluster for the run: the one that this process or RAY_ADDRESS names, else a new one on this machine.

    It starts in the background; call what is yielded to wait for it. A new one ends with the run. A single worker
    needs none.
    """
    if recipe.scale.workers == 1:
        refuse_missing_gpu(recipe)
        yield lambda: None
        return
    with ray_cluster(recipe.scale.workers) as wait_for_cluster:
        yield wait_for_cluster


@contextlib.contextmanager
def ray_cluster(num_processes: int, preload: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
    """The same for so many processes, also for one.

    Args:
        preload: modules that the processes of a new cluster import before they are given work.
    """
    import ray

    if ray.is_initialized():
        yield lambda: None
        return
    refuse_dead_address(os.environ.get("RAY_ADDRESS", ""))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="start-ray") as pool:
        starting = pool.submit(start_ray, num_processes, preload)
        try:
            yield starting.result
        finally:
            wait([starting])
            ray.shutdown()


def start_ray(num_processes: int, preload: Sequence[str] = ()) -> None:
    import ray

    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # More workers than cores share them. Nobody takes nodes away from a cluster of this one machine.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Otherwise Ray connects to any cluster that somebody has started on this machine.
        options = {"address": "local", "num_cpus": max(num_processes, os.cpu_count() or 1), "include_dashboard": False}
        if preload:
            options["_system_config"] = {"preload_python_modules": list(preload)}
    logging.getLogger("ray").setLevel(logging.ERROR)  # What it says on starting is not about the run.
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    if options and preload:
        wait_for_processes(options["num_cpus"])


def wait_for_processes(count: int) -> None:
    """Wait until Ray knows its first processes: work that comes earlier is given to new ones, which import again."""
    from ray._private.state import workers

    until = time.monotonic() + SECONDS_FOR_FIRST_PROCESSES
    while len(workers()) < count and time.monotonic() < until:
        time.sleep(0.05)


def refuse_missing_gpu(recipe: Recipe) -> None:
    """Raise ClusterError where the one worker, which is this process, is to have a GPU and there is none."""
    import torch

    if recipe.scale.gpus_per_worker == 1 and not torch.cuda.is_available():
        raise ClusterError(str(too_few(recipe, "GPU", 1, 0)))


def refuse_dead_address(address: str) -> None:
    """Raise ClusterError where nobody listens at `host:port`: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=3.0).close()
    except OSError as error:
        what = f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}"
        raise ClusterError(f"{what}\n    -> start it, correct the address, or unset RAY_ADDRESS") from None


def worker_environment() -> dict[str, Any]:
    """The runtime environment of Ray Train's workers: how their threads wait, and what they import beforehand.

    Ray's hook for new processes is set by the variable that it uses itself, because Ray lets only whole jobs set it.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    hook = f"{import_ahead.__name__}.{import_ahead.start.__name__}"
    return {"env_vars": {"GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"], WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook}}


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


def last_line(error: BaseException) -> str:
    """The last line of an error's text: where Ray puts the worker's own words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
