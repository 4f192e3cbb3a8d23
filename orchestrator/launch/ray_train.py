"""Run a training, or trials of a search, on Ray Train workers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.launch import import_ahead
from orchestrator.launch.cluster import has_notices, make_scaling_config, remove_orphaned_groups
from orchestrator.launch.dead_workers import AbortTraining, RestartWorkers, failure_callback, last_line
from orchestrator.launch.stop_request import StopRequestReceiver, StopRequestSender
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.logs import redirect_output
from orchestrator.runs.progress import ProgressFile
from orchestrator.runs.remote import open_run
from orchestrator.storage import credentials, is_url
from orchestrator.training.interruption import InterruptHandler, StopRequest
from orchestrator.training.prepare import Prepared

if TYPE_CHECKING:
    from orchestrator.training.preemption import PreemptionNotice

DEFAULT_NOTICE_SECONDS = 120.0  # Ray Train's own assumption where a notice has no deadline.
SECONDS_AFTER_DEADLINE = 60.0
WorkerFunction = Callable[[Prepared, Any], None]


def run_workers(prepared: Prepared, directory: RunDirectory, attempt: int, interrupts: InterruptHandler) -> None:
    """Run the training on its workers; return when it is finished.

    A single worker runs in this process (Ray Train's local mode), several are Ray Train workers.

    Raises:
        OrchestratorError: a worker found something wrong.
        Interrupted: a signal came, and the workers have saved their last step.
        RunFailed: workers died more often than allowed.
    """
    # Importing Ray takes seconds, and commands that check a recipe do without it.
    import ray.train

    from orchestrator.launch.trainer import TrainerSettings, run_trainer

    if prepared.recipe.scale.workers > 1:
        _run_on_cluster(prepared, directory, attempt, interrupts)
        return
    config = {
        "stop_request": interrupts,
        "prepared": prepared,
        "place": directory.place,
        "attempt": attempt,
        "has_notices": False,
        "credentials": None,
    }
    scaling, logs = ray.train.ScalingConfig(num_workers=0), directory.logs
    run_trainer(train_on_worker, config, TrainerSettings(prepared.recipe, scaling, logs, logs / "ray", attempt))


def _run_on_cluster(prepared: Prepared, directory: RunDirectory, attempt: int, interrupts: InterruptHandler) -> None:
    """Run the training on several workers.

    If a worker dies, Ray Train ends all of them and starts them again, up to `scale.max_failures` times; they resume
    from the last checkpoint. If Ray Train's own controller dies, another attempt does the same.
    """
    import ray

    from orchestrator.launch.trainer import ControllerDied, TrainerSettings, run_trainer

    recipe, sender = prepared.recipe, StopRequestSender()
    config = {
        "stop_request": sender.key,
        # The object store holds the encoded data once for each node, and its workers read them without a copy.
        "prepared": ray.put(prepared),
        "place": directory.place,
        "attempt": attempt,
        "has_notices": has_notices(),
        # As a reference: Ray shows this dictionary, and the workers' environment, to everybody.
        "credentials": ray.put(credentials()) if is_url(directory.place) else None,
    }
    scaling = make_scaling_config(recipe)
    if recipe.scale.wait_for_nodes:
        show_waiting(directory, scaling)
    callbacks = [failure_callback(directory.place, config["credentials"])]
    settings = TrainerSettings(recipe, scaling, directory.logs, directory.logs / "ray", attempt, callbacks)
    for left in reversed(range(recipe.scale.max_failures + 1)):
        try:
            with sender.waiting(), interrupts.forwarding_to(sender.send):
                run_trainer(train_on_worker, config, settings)
            return
        except ControllerDied as error:
            if interrupts.is_set():
                raise KeyboardInterrupt from None
            if not left:
                raise
            directory.add_note(f"{error}; the run resumes from its last checkpoint")
        # Workers of the last attempt that still live can commit nothing from here on.
        attempt = config["attempt"] = attempt + 1
        settings = replace(settings, attempt=attempt)
        directory.update_record(attempt=attempt)
        remove_orphaned_groups()


def show_waiting(directory: RunDirectory, scaling: Any) -> None:
    """Show that the run waits until the cluster has room for its workers."""
    wanted = " and ".join(f"{number:g} {kind}" for kind, number in scaling.resources_per_worker.items())
    workers = f"{scaling.min_workers} workers with {wanted} each"
    ProgressFile(directory.root).show(force=True, phase=f"waiting until the cluster has room for {workers}")


def run_worker_group(prepared: Prepared, work: WorkerFunction, resources: dict[str, float], folder: Path) -> None:
    """Run workers for trials of a search, from within a trial's actor; return when `work` has returned on all of them.

    Args:
        work: called on every worker with the prepared data and the worker's device; an error counts as the death of the
            worker.
        resources: CPUs and GPUs of each worker.
        folder: where the workers and Ray Train may write.

    Raises:
        RunFailed: workers died more often than `scale.max_failures` allows.
    """
    import ray.train

    from orchestrator.launch.trainer import TrainerSettings, run_trainer

    # How soon a dead worker, and the end of a run, are noticed: a search has many runs, and waits for each.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    scaling = ray.train.ScalingConfig(
        num_workers=prepared.recipe.scale.workers, use_gpu="GPU" in resources, resources_per_worker=resources
    )
    config = {"prepared": ray.put(prepared), "work": ray.put(work), "folder": str(folder)}
    try:
        run_trainer(work_on_worker, config, TrainerSettings(prepared.recipe, scaling, folder, folder / "ray", 1))
    except ray.exceptions.RayError as error:
        raise RunFailed(f"Ray Train itself failed: {last_line(error)}") from error


def work_on_worker(config: dict[str, Any]) -> None:
    """Run a worker of a worker group."""
    import ray.train
    from ray.train.torch import get_device

    rank = ray.train.get_context().get_world_rank()
    with redirect_output(Path(config["folder"]) / f"worker-{rank}.log"):
        # Deserializing imports the search, and with it modules that are being imported ahead.
        import_ahead.wait()
        set_gloo_interface(ray.util.get_node_ip_address())
        ray.get(config["work"])(ray.get(config["prepared"]), get_device())


def train_on_worker(config: dict[str, Any]) -> OrchestratorError | None:
    """Run a worker of a training; return an error meant for users, which Ray Train would retry if it was raised."""
    import ray

    is_local = not isinstance(config["prepared"], ray.ObjectRef)  # In the calling process.
    if config["credentials"] is not None:
        os.environ.update(ray.get(config["credentials"]))
    with contextlib.ExitStack() as stack:
        if is_local:
            directory, prepared = open_run(config["place"]), config["prepared"]
        else:
            directory = _open_on_node(config["place"], stack)
            prepared = ray.get(config["prepared"])
            if directory.leads_node:
                directory.create()
        try:
            _train(config, prepared, directory, is_local)
        except OrchestratorError as error:
            return error
        if directory.leads_node:
            directory.finish()
    return None


def _open_on_node(place: str, stack: contextlib.ExitStack) -> RunDirectory:
    """Open the run directory on a worker's node; until `stack` closes, the worker's output goes to its log."""
    import ray.train

    context = ray.train.get_context()
    # Ray numbers the workers of a node by this address. Two nodes may be one machine.
    address = ray.util.get_node_ip_address()
    set_gloo_interface(address)
    directory = open_run(place, address)
    directory.leads_node = context.get_local_rank() == 0
    directory.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    stack.callback(directory.upload_logs)
    stack.enter_context(redirect_output(directory.logs / f"worker-{context.get_world_rank()}.log"))
    import_ahead.wait()
    return directory


def _train(config: dict[str, Any], prepared: Prepared, directory: RunDirectory, is_local: bool) -> None:
    import ray.train
    from ray.train.torch import get_device

    # After the imports ahead, which import the same modules.
    from orchestrator.training.engine.devices import choose_device

    context = ray.train.get_context()
    prepared = with_workers(prepared, context.get_world_size())
    is_first = context.get_world_rank() == 0
    notice = RayPreemptionNotice() if config["has_notices"] else None
    stop_request = config["stop_request"]
    if isinstance(stop_request, str):
        stop_request = StopRequestReceiver(stop_request, listens=is_first)
    device = choose_device(prepared.recipe) if is_local else get_device()
    train_with_smaller_passes(prepared, directory, config["attempt"], device, is_first, notice, stop_request)


def set_gloo_interface(address: str) -> None:
    """Let gloo use the network interface with this address of the machine, unless the user names another one.

    By default gloo uses the address of the machine's name, which other machines may not reach.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def with_workers(prepared: Prepared, number: int) -> Prepared:
    """Return the same with as many workers as an elastic run has at the moment."""
    scale = prepared.recipe.scale.model_copy(update={"workers": number})
    return replace(prepared, recipe=prepared.recipe.model_copy(update={"scale": scale}))


class RayPreemptionNotice:
    """Ray Train's notices of nodes that will be taken away, such as a cloud's spot machines."""

    def __init__(self) -> None:
        self._latest: Any = None
        self._waited_for: Any = None

    def is_given(self) -> bool:
        import ray.train

        self._latest = ray.train.get_preemption_info()
        return self._latest is not None and self._latest != self._waited_for

    def wait(self) -> None:
        self._waited_for = self._latest
        deadline = self._latest.deadline_ms
        left = DEFAULT_NOTICE_SECONDS if deadline is None else deadline / 1000 - time.time()
        time.sleep(max(0.0, left) + SECONDS_AFTER_DEADLINE)


def train_with_smaller_passes(
    prepared: Prepared,
    directory: RunDirectory,
    attempt: int,
    device: Any,
    is_first: bool,
    notice: PreemptionNotice | None,
    stop_request: StopRequest | None = None,
) -> None:
    """Run this worker's part; where memory runs out, resume from the last checkpoint with smaller passes.

    Raises:
        RestartWorkers: memory ran out on one of several workers, which all have to start again.
        AbortTraining: memory ran out on one of several workers, and passes cannot be smaller.
    """
    from orchestrator.launch.out_of_memory import halve_passes, is_out_of_memory, with_recorded_passes
    from orchestrator.training.worker import run_worker

    while True:
        current = with_recorded_passes(prepared, directory)
        try:
            return run_worker(current, directory, attempt, device, is_first, notice, stop_request)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if prepared.recipe.scale.workers > 1:
                # The others wait for this worker, so Ray ends them.
                try:
                    halve_passes(current, directory)
                except RunFailed as failed:
                    raise AbortTraining(failed) from error
                raise RestartWorkers(str(error)) from error
        halve_passes(current, directory)
