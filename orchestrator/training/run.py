"""One training from the recipe to the result: refuse or resume, prepare, run the workers, report."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from orchestrator.errors import InputError, OrchestratorError, Problem, RecipeError, RunFailed
from orchestrator.recipe import Recipe, dump_recipe, parse_recipe
from orchestrator.report import write_report
from orchestrator.storage import join
from orchestrator.training.cluster import cluster_nodes, ray_session
from orchestrator.training.disk import refuse_full_disk
from orchestrator.training.prepare import Prepared, encode_inputs, prepare, read_inputs
from orchestrator.training.progress import live_line
from orchestrator.training.remote_run import open_run
from orchestrator.training.run_directory import RunDirectory, write_atomically
from orchestrator.training.worker import output_to, run_workers

PACKAGES_THAT_DECIDE_NUMBERS = ("torch", "transformers", "accelerate", "peft", "deepspeed", "ray", "datasets")
# Where source and data lie, which may be elsewhere on another cluster; what is in them is held against the record.
PLACES = {"source": {"model"}, "target": {"data"}}
# Parts of a recipe that may change between the attempts of one run: they do not change what is learned.
FREE_TO_CHANGE = {
    **PLACES,
    "": {"search"},
    "train": {"keep", "log_every", "cache_prefix"},
    "scale": {"max_failures", "storage", "cpus_per_worker", "cache_gigabytes", "wait_for_nodes"},
}


@dataclass(frozen=True)
class Run:
    """A finished training."""

    directory: Path
    """On this machine: a copy without checkpoints where the run is kept in an object store."""
    place: str
    """The directory as the user named it: a path or a URL."""
    result: dict[str, Any]
    """The content of result.json."""
    warnings: list[Problem]
    notes: list[str]
    resumed: bool
    """Whether it had been finished before, or went on from a checkpoint."""


def train(
    recipe: Recipe,
    output: Path | str | None = None,
    fresh: bool = False,
    strict: bool = False,
    screen: TextIO | None = None,
) -> Run:
    """Train as the recipe says; the same call goes on where an earlier one was interrupted.

    Args:
        output: the run directory, a path or a URL; `storage/name` of the recipe when None.
        fresh: start over; what is in the directory is kept under another name.
        strict: treat warnings about the data as errors.
        screen: where to show progress; what libraries print then goes to the directory's logs. None for neither.

    Raises:
        InputError: recipe, data or source are wrong, or the directory holds another run; nothing was started.
        ClusterError: the cluster cannot hold the workers.
        RunFailed: the training itself failed.
    """
    directory = open_run(output or join(recipe.scale.storage, recipe.name))
    with contextlib.ExitStack() as stack:
        inputs = read_inputs(recipe, strict)
        # Several workers take longest to start, so they begin while the data are encoded and the model is checked.
        wait_for_cluster = stack.enter_context(ray_session(recipe))
        prepared = check_model(encode_inputs(inputs, strict))
        aside = set_aside(directory) if fresh else None
        create_directory(directory)
        stack.enter_context(directory.locked())
        chosen = None
        if recipe.scale.fit:
            wait_for_cluster()
            prepared, chosen = fit(prepared, directory)
        refuse_another_run(prepared, directory)
        if directory.result.exists():
            return finished_run(prepared, directory, resumed=True)
        if screen is not None:
            # A single worker runs in this process, and writes to this very copy.
            bring = directory.bring_progress if recipe.scale.workers > 1 else lambda: None
            stack.enter_context(live_line(directory.root, screen, bring))
            stack.enter_context(output_to(directory.logs / "command.log"))
        if prepared.parameters is not None and directory.place == str(directory.root):
            refuse_full_disk(directory.root, recipe, prepared.parameters)
        wait_for_cluster()
        attempt = start_record(prepared, directory)
        if aside is not None:
            directory.note(f"the earlier run is in {aside}")
        if chosen is not None:
            directory.update_record(chosen=chosen)
            for place, value in chosen.items():
                directory.note(f"chosen so that it fits: {place}={value}")
        resumed = directory.has_checkpoints()
        run_and_record(prepared, directory, attempt)
        return finished_run(prepared, directory, resumed)


def check(recipe: Recipe, strict: bool = False) -> Prepared:
    """Everything that can be refused before anything starts; raises InputError with all of it."""
    return check_model(prepare(recipe, strict))


def check_model(prepared: Prepared) -> Prepared:
    """The same, once metric, freeze depth, adapter and head are known to fit; raises InputError."""
    # These need torch, which takes seconds to import: Ray starts meanwhile.
    from orchestrator.training.assemble import check_experts, check_structure
    from orchestrator.training.deepspeed_setup import check_deepspeed
    from orchestrator.training.trainer import choose_metric

    choose_metric(prepared)
    if prepared.recipe.scale.deepspeed is not None:
        check_deepspeed(prepared.recipe)
    parts = check_structure(prepared)
    prepared = replace(prepared, warnings=prepared.warnings + check_experts(prepared))
    return prepared if parts is None else replace(prepared, parameters=parts.count_parameters())


def fit(prepared: Prepared, directory: RunDirectory) -> tuple[Prepared, dict[str, Any]]:
    """As a plan has it, or had it when the run began, with what it chose; raises ClusterError where nothing fits."""
    from orchestrator.training.fitting import choose_scale, with_choice

    chosen = directory.read_record().get("chosen")
    if chosen is None:
        chosen = choose_scale(prepared, cluster_nodes() if prepared.recipe.scale.workers > 1 else None)
    return with_choice(prepared, chosen), chosen


def set_aside(directory: RunDirectory) -> str | None:
    """Move an earlier run to another name, unless it is running; returns that name, or None where there is no run."""
    if not directory.exists():
        return None
    with directory.locked():
        return directory.set_aside()


def create_directory(directory: RunDirectory) -> None:
    try:
        directory.create()
    except OSError as error:
        remedy = "give another --output, or set scale.storage to a folder that you may write to"
        raise InputError(
            Problem(f"the run directory cannot be made: {error.strerror or error}", directory.place, remedy)
        ) from None


def run_and_record(prepared: Prepared, directory: RunDirectory, attempt: int) -> None:
    """Run the workers; run.json says how it ended, whatever way it ended."""
    started = time.time()
    try:
        run_workers(prepared, directory, attempt)
    except OrchestratorError as error:
        directory.update_record(status="failed", reason=str(error), ended=time.time())
        raise
    except OSError as error:
        # The disk may be full, so not even this is sure to be recorded.
        raise RunFailed(f"{error}; the checkpoints in {directory.place} are whole") from error
    except KeyboardInterrupt:
        directory.update_record(status="interrupted", ended=time.time())
        raise
    directory.bring()
    directory.update_record(status="finished", ended=time.time(), seconds=time.time() - started)
    write_report(directory.root)
    directory.send()
    directory.finish()


def start_record(prepared: Prepared, directory: RunDirectory) -> int:
    """Write recipe.yaml and run.json for a new attempt; returns its number (from 1)."""
    write_atomically(directory.recipe, dump_recipe(prepared.recipe))
    directory.send()
    attempt = int(directory.read_record().get("attempt", 0)) + 1
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
        notes=[],
        warnings=[str(warning) for warning in prepared.warnings],
    )
    return attempt


def refuse_another_run(prepared: Prepared, directory: RunDirectory) -> None:
    """A run goes on only with the same recipe, data and source; InputError names what changed."""
    if directory.result.exists() or directory.has_checkpoints():
        free = FREE_TO_CHANGE
        if prepared.recipe.scale.min_workers is not None:
            free = {**free, "scale": {*free["scale"], "workers", "min_workers"}}
        refuse_changes(prepared, directory, free)


def refuse_changes(prepared: Prepared, directory: RunDirectory, free: dict[str, set[str]]) -> None:
    """Raise InputError that names what changed since the directory's recipe.yaml and record were written.

    Args:
        free: what may change, as names in sections of the recipe.
    """
    record = directory.read_record()
    if not record or not directory.recipe.exists():
        return
    import yaml

    text = directory.recipe.read_text(encoding="utf-8")
    with contextlib.suppress(RecipeError):  # An older version may have had no place for what has its default now.
        text = dump_recipe(parse_recipe(text, directory.recipe))
    old, new = yaml.safe_load(text), yaml.safe_load(dump_recipe(prepared.recipe))
    remedy = "use --fresh to start over (the old directory is kept under another name), or give another --output"
    changed = [
        Problem(
            f"the run in {directory.place} has {path}: {json.dumps(was)}, now it is {json.dumps(now)}",
            prepared.recipe.origin.where(path),
            remedy,
        )
        for path, was, now in differences(old, new, free)
    ]
    identity = record.get("identity", prepared.identity)
    for name in sorted({*identity, *prepared.identity}):
        if identity.get(name) != prepared.identity.get(name):
            what = "source model" if name == "source" else f"{name} data"
            changed.append(Problem(f"the {what} changed since the run in {directory.place} began", remedy=remedy))
    if changed:
        raise InputError(changed)


def differences(
    old: dict[str, Any], new: dict[str, Any], free: dict[str, set[str]], path: str = ""
) -> list[tuple[str, Any, Any]]:
    """Dotted paths whose values differ and matter, with both values."""
    found = []
    for key in {**old, **new}:
        here = f"{path}.{key}" if path else key
        if key in free.get(path, ()):
            continue
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, free, here)
        elif was != now:
            found.append((here, was, now))
    return found


def finished_run(prepared: Prepared, directory: RunDirectory, resumed: bool) -> Run:
    result = json.loads(directory.result.read_text(encoding="utf-8"))
    return Run(
        directory.root, directory.place, result, prepared.warnings, directory.read_record().get("notes", []), resumed
    )
