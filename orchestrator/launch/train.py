"""Run one training from the recipe to the result: check, prepare, resume, run the workers, report."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from orchestrator.errors import InputError, OrchestratorError, Problem, RunFailed
from orchestrator.launch.cluster import cluster_nodes, ray_session, refuse_gpu_here
from orchestrator.launch.disk import refuse_full_disk
from orchestrator.launch.ray_train import run_workers
from orchestrator.recipe import Recipe, dump_recipe
from orchestrator.report import write_report
from orchestrator.runs.directory import RunDirectory, write_atomically
from orchestrator.runs.identity import last_attempt, recorded_choice, refuse_another_run
from orchestrator.runs.logs import redirect_output
from orchestrator.runs.occupancy import find_kind, refuse_occupied_directory
from orchestrator.runs.progress import duplicate_stream, show_progress
from orchestrator.runs.remote import open_run
from orchestrator.storage import join
from orchestrator.training.interruption import Interrupted, InterruptHandler
from orchestrator.training.prepare import Prepared, encode_inputs, prepare, read_inputs

PACKAGES_THAT_DECIDE_NUMBERS = ("torch", "transformers", "accelerate", "peft", "deepspeed", "ray", "datasets")


@dataclass(frozen=True)
class Run:
    """A finished training."""

    directory: Path
    """On this machine; for a run in an object store, a copy without checkpoints."""
    place: str
    """The directory as users know it: a path or a URL."""
    result: dict[str, Any]
    """The content of result.json."""
    warnings: list[Problem]
    notes: list[str]
    resumed: bool
    """Whether it was finished before, or resumed from a checkpoint."""


def train(
    recipe: Recipe,
    output: Path | str | None = None,
    fresh: bool = False,
    strict: bool = False,
    screen: TextIO | None = None,
) -> Run:
    """Train a recipe; the same call resumes an interrupted training.

    Args:
        output: path or URL of the run directory; None for `storage/name` of the recipe.
        fresh: start over; an earlier run in the directory is kept under another name.
        strict: treat warnings about the data as errors.
        screen: where to show progress; the output of libraries then goes to the directory's logs. None for neither.

    Raises:
        InputError: recipe, data or source are wrong, or the directory holds another run; nothing was started.
        ClusterError: the cluster has no room for the workers.
        RunFailed: the training itself failed.
    """
    directory = open_run(output or join(recipe.scale.storage, recipe.name))
    check_directory(directory, recipe, fresh)
    interruption = InterruptHandler()
    with interruption.installed(), contextlib.ExitStack() as stack:
        inputs = read_inputs(recipe, strict)
        # Ray takes longest to start, so it starts while the data are encoded and the model is checked.
        wait_for_cluster = stack.enter_context(ray_session(recipe))
        prepared = check_model(encode_inputs(inputs, strict))
        refuse_gpu_here(recipe)
        aside = set_aside(directory) if fresh else None
        create_directory(directory)
        stack.enter_context(directory.lock())
        chosen = None
        if recipe.scale.fit:
            wait_for_cluster()
            prepared, chosen = apply_plan(prepared, directory)
        notes = refuse_another_run(prepared.recipe, prepared.identity, directory)
        if directory.has_finished():
            return make_run(prepared, directory, notes, resumed=True)
        if screen is not None:
            show_run(directory, recipe, interruption, screen, stack)
        if prepared.parameters is not None and directory.place == str(directory.root):
            refuse_full_disk(directory.root, recipe, prepared.parameters)
        wait_for_cluster()
        if aside is not None:
            notes.append(f"the earlier run is in {aside}")
        if chosen is not None:
            notes += [f"chosen so that it fits: {path}={value}" for path, value in chosen.items()]
        resumed = directory.has_checkpoints()
        run_and_record(prepared, directory, interruption, {"notes": notes, "chosen": chosen})
        return make_run(prepared, directory, [], resumed)


def show_run(
    directory: RunDirectory,
    recipe: Recipe,
    interruption: InterruptHandler,
    screen: TextIO,
    stack: contextlib.ExitStack,
) -> None:
    """Show the progress on `screen` until `stack` closes; the output of libraries goes to a log meanwhile."""
    interruption.screen = stack.enter_context(duplicate_stream(screen))
    # A single worker runs in this process, and writes to the same copy.
    download = directory.download_progress if recipe.scale.workers > 1 else lambda: None
    stack.enter_context(show_progress(directory.root, screen, download))
    stack.enter_context(redirect_output(directory.logs / "command.log"))


def check(recipe: Recipe, strict: bool = False) -> Prepared:
    """Check all that can be checked before a training starts; raises InputError with every problem."""
    return check_model(prepare(recipe, strict))


def check_model(prepared: Prepared) -> Prepared:
    """Check that metric, freeze depth, adapter and head fit the model; raises InputError.

    Returns:
        The same with the number of parameters, where it is known without weights.
    """
    # These import torch, which takes seconds: Ray starts meanwhile.
    from orchestrator.training.assembling import check_experts, check_structure
    from orchestrator.training.engine.deepspeed_config import check_deepspeed
    from orchestrator.training.session import choose_metric

    choose_metric(prepared)
    if prepared.recipe.scale.deepspeed is not None:
        check_deepspeed(prepared.recipe)
    parts = check_structure(prepared)
    prepared = replace(prepared, warnings=prepared.warnings + check_experts(prepared))
    return prepared if parts is None else replace(prepared, parameters=parts.count_parameters())


def apply_plan(prepared: Prepared, directory: RunDirectory) -> tuple[Prepared, dict[str, Any]]:
    """Apply the plan that was made when the run started, or make one; raises ClusterError if nothing fits.

    Returns:
        The prepared recipe with the chosen values, and these values by their keys.
    """
    from orchestrator.planning.choose_sharding import choose_scale, with_choice

    chosen = recorded_choice(directory)
    if chosen is None:
        chosen = choose_scale(prepared, cluster_nodes() if prepared.recipe.scale.workers > 1 else None)
    return with_choice(prepared, chosen), chosen


def set_aside(directory: RunDirectory) -> str | None:
    """Rename an earlier run, unless it is running; return its new name, or None if there is no run."""
    if find_kind(directory) is None:
        return None
    with directory.lock():
        return directory.set_aside()


def check_directory(directory: RunDirectory, recipe: Recipe, fresh: bool) -> None:
    """Raise InputError if the directory holds something else, or cannot be read."""
    with _access(directory, "read"):
        refuse_occupied_directory(directory, recipe, fresh)


def create_directory(directory: RunDirectory) -> None:
    """Create the directory; raises InputError if that is not possible."""
    with _access(directory, "created"):
        directory.create()


@contextlib.contextmanager
def _access(directory: RunDirectory, how: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "give another --output, or set scale.storage to a folder that you may write to"
        what = f"the run directory cannot be {how}: {error.strerror or error}"
        raise InputError(Problem(what, directory.place, remedy)) from None


def run_and_record(
    prepared: Prepared, directory: RunDirectory, interruption: InterruptHandler, known: dict[str, Any]
) -> None:
    """Run the workers, and record in run.json how the run ended.

    Args:
        known: further entries of run.json.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    started = time.time()
    try:
        attempt = start_record(prepared, directory, known)
        run_workers(prepared, directory, attempt, interruption)
    except (Interrupted, KeyboardInterrupt):
        directory.update_record(status="interrupted", ended=time.time())
        raise KeyboardInterrupt from None
    except OrchestratorError as error:
        directory.update_record(status="failed", reason=str(error), ended=time.time())
        raise
    except OSError as error:
        # The disk may be full, so nothing is recorded.
        raise RunFailed(f"{error}; the checkpoints in {directory.place} are intact") from error
    directory.download()
    directory.update_record(status="finished", ended=time.time(), seconds=time.time() - started)
    write_report(directory.root)
    directory.upload()
    directory.finish()


def start_record(prepared: Prepared, directory: RunDirectory, known: dict[str, Any]) -> int:
    """Write recipe.yaml and run.json for a new attempt; return its number (from 1)."""
    write_atomically(directory.recipe, dump_recipe(prepared.recipe))
    directory.upload()
    attempt = last_attempt(directory) + 1
    directory.update_record(
        status="running",
        attempt=attempt,
        started=time.time(),
        identity=prepared.identity,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES_THAT_DECIDE_NUMBERS},
        },
        machine=platform.node(),
        command=sys.argv,
        warnings=[str(warning) for warning in prepared.warnings],
        **{name: value for name, value in known.items() if value is not None},
    )
    return attempt


def make_run(prepared: Prepared, directory: RunDirectory, notes: list[str], resumed: bool) -> Run:
    """Return the result of a finished run, with all its notes."""
    notes = [*directory.read_record().get("notes", []), *notes]
    return Run(directory.root, directory.place, directory.read_result(), prepared.warnings, notes, resumed)
