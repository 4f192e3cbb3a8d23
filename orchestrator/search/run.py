"""Runs one search from the recipe to the winner: checks everything, starts Ray, runs the trials, returns the result."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.errors import InputError, OrchestratorError, Problem
from orchestrator.json_lines import read_json_lines
from orchestrator.launch import import_ahead
from orchestrator.launch.cluster import ray_cluster
from orchestrator.launch.train import check_directory, create_directory, set_aside
from orchestrator.recipe import Recipe
from orchestrator.recipe.conditions import cases_of
from orchestrator.report import write_report
from orchestrator.runs.identity import PLACES, refuse_changes
from orchestrator.runs.logs import redirect_output
from orchestrator.runs.occupancy import find_kind
from orchestrator.runs.progress import duplicate_stream
from orchestrator.search.records import BUDGET, SearchDirectory, drop_damaged_rows
from orchestrator.search.space import FREEZE
from orchestrator.storage import is_url
from orchestrator.training.interruption import InterruptHandler
from orchestrator.training.prepare import encode_inputs, read_inputs

if TYPE_CHECKING:
    from orchestrator.search.plan import SearchPlan

FREE_TO_CHANGE = {
    **PLACES,
    "train": {"keep", "log_every", "cache_prefix"},
    "scale": {"max_failures", "storage", "cpus_per_worker", "cache_gigabytes"},
    "search": {"concurrent", *BUDGET},
}


@dataclass(frozen=True)
class SearchRun:
    """A finished search."""

    directory: Path
    record: dict[str, Any]
    """The content of search.json."""
    rows: list[dict[str, Any]]
    """The lines of trials.jsonl."""
    result: dict[str, Any]
    """The winner's result.json."""
    warnings: list[Problem]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of trials by their status."""
        return dict(Counter(row["status"] for row in self.rows))


def search(
    recipe: Recipe,
    output: Path | str | None = None,
    fresh: bool = False,
    strict: bool = False,
    screen: TextIO | None = None,
) -> SearchRun:
    """Run the search that the recipe describes; the same call resumes a search that was interrupted.

    Args:
        output: the search directory; `storage/name-search` of the recipe when None.
        fresh: start over; the content of the directory is kept under another name.
        strict: treat warnings about the data as errors.
        screen: where to show the trials; None for nowhere.

    Raises:
        InputError: recipe, data or source are wrong, or the directory holds another search; nothing was started.
        ClusterError: the cluster has no room for a trial.
        RunFailed: no trial has a score.
    """
    directory = SearchDirectory(find_folder(recipe, output))
    check_directory(directory, recipe, fresh)
    with InterruptHandler().installed(), contextlib.ExitStack() as stack:
        inputs = read_inputs(recipe, strict)
        wait_for_cluster = cluster_when_needed(recipe, stack)
        # These need torch, which takes seconds to import: Ray starts meanwhile.
        from orchestrator.search.plan import plan_search
        from orchestrator.training.engine.devices import check_gpu

        plan = plan_search(encode_inputs(inputs, strict))
        check_gpu(recipe)  # The winner's model is built in this process, wherever the trials run.
        if fresh:
            set_aside(directory)
        create_directory(directory)
        stack.enter_context(directory.lock())
        notes = (
            refuse_changes(plan.prepared.recipe, plan.prepared.identity, directory, FREE_TO_CHANGE)
            if find_kind(directory)
            else []
        )
        record = directory.read_record()
        if directory.has_finished() and record.get("status") == "finished" and record.get("budget") == plan.budget:
            return finished(plan.prepared.warnings, directory)
        notes += drop_damaged_rows(directory.rows)
        run(plan, directory, notes, screen, wait_for_cluster)
        return finished(plan.prepared.warnings, directory)


def find_folder(recipe: Recipe, output: Path | str | None) -> Path:
    """Return the absolute path of the search directory; raise InputError where that is a URL."""
    place, where = recipe.scale.storage, recipe.origin.where("scale.storage")
    if output is not None:
        place, where = str(output), "--output"
    if is_url(place):
        remedy = "give --output a folder that all nodes share, or set scale.storage to one"
        raise InputError(Problem(f"a search needs a folder, and {place} is a URL", where, remedy))
    return Path(output or default_output(recipe)).absolute()


def run(
    plan: SearchPlan,
    directory: SearchDirectory,
    notes: Sequence[str],
    screen: TextIO | None,
    wait_for_cluster: Callable[[], None],
) -> None:
    """Run the trials and choose the winner; record how it ended, and write the report also where it fails."""
    from orchestrator.search.run_trials import record_start, run_trials

    with contextlib.ExitStack() as stack:
        shown = None
        if screen is not None:
            shown = stack.enter_context(duplicate_stream(screen))
            stack.enter_context(redirect_output(directory.logs / "command.log"))
        try:
            record_start(plan, directory, notes)
            run_trials(plan, directory, shown, wait_for_cluster)
        except (KeyboardInterrupt, OrchestratorError) as error:
            is_interrupted = isinstance(error, KeyboardInterrupt)
            directory.update_record(status="interrupted" if is_interrupted else "failed")
            write_report(directory.root)
            raise


def cluster_when_needed(recipe: Recipe, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Start Ray in the background and return a function that waits for it.

    Where Ray may not be needed, that function starts it, too.
    """
    cluster = ray_cluster(num_processes(recipe), modules_to_preload(recipe))
    if not freezes_all(recipe):
        return stack.enter_context(cluster)

    def start_and_wait() -> None:
        stack.enter_context(cluster)()

    return start_and_wait


def freezes_all(recipe: Recipe) -> bool:
    """Whether every trial freezes the whole body, as far as the recipe shows; the default space has other depths."""
    space = recipe.search.space if recipe.search is not None else None
    if space is None:
        return False
    if FREEZE in space:
        return all(case.choice == ["all"] for case in cases_of(space[FREEZE]))
    return recipe.transfer.depth.freezes_body


def num_processes(recipe: Recipe) -> int:
    """Return the number of Ray's processes: one for each core, or for each worker where there are more of them."""
    return max(recipe.scale.workers, os.cpu_count() or 1)


def modules_to_preload(recipe: Recipe) -> tuple[str, ...]:
    """Return the modules that Ray's processes import while the data are read; trials of several workers use others."""
    return ("orchestrator.search.ray.runner", *import_ahead.MODULES) if recipe.scale.workers == 1 else ()


def default_output(recipe: Recipe) -> Path:
    """Return the search directory of a recipe for which none is named."""
    name = recipe.name if recipe.name.endswith("-search") else f"{recipe.name}-search"
    return Path(recipe.scale.storage) / name


def finished(warnings: list[Problem], directory: SearchDirectory) -> SearchRun:
    record, rows = directory.read_record(), read_json_lines(directory.rows)
    return SearchRun(directory.root, record, rows, directory.read_result(), warnings)
