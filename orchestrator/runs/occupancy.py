"""Find out whether a directory holds a run, a search, other files or nothing, before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import InputError, Problem
from orchestrator.recipe import Recipe, map_paths, resolve_path
from orchestrator.recipe.paths import split_count
from orchestrator.runs.directory import RunDirectory

SEARCH_FILES = {"search.json", "trials.jsonl"}
RUN_FILE = "run.json"
RESULTS = {"recipe.yaml", "metrics.jsonl", "result.json"}
"""Files that together identify a run whose run.json is missing."""
SKELETON = {"checkpoints", "logs", "trials"}
"""Folders that exist before the first record is written."""
KINDS = {"run": "a training", "search": "a search"}
MOST_NAMED = 5


def find_kind(directory: RunDirectory) -> str | None:
    """Return "run" or "search" for a directory that holds one; otherwise None."""
    names = directory.names()
    if names & SEARCH_FILES:
        return "search"
    return "run" if RUN_FILE in names or names >= RESULTS or directory.has_checkpoints() else None


def refuse_occupied_directory(directory: RunDirectory, recipe: Recipe, fresh: bool) -> None:
    """Raise InputError unless the directory is free, or holds a run (or search) that can be resumed.

    Args:
        fresh: the directory will be renamed first.
    """
    wanted, held = KINDS[directory.kind], find_kind(directory)
    if held is not None and held != directory.kind:
        what = f"the directory holds {KINDS[held]}, and {wanted} needs a directory of its own"
        raise InputError(Problem(what, directory.place, f"give another one, such as --output {directory.place}-2"))
    read = list(files_in(directory.root, recipe)) if directory.place == str(directory.root) else []
    if held is None and (others := directory.names() - SKELETON):
        some = ", ".join(sorted(others)[:MOST_NAMED]) + (", ..." if len(others) > MOST_NAMED else "")
        roles = f"; the recipe reads its {' and '.join(role for role, _ in read)} there" if read else ""
        what = f"the directory holds files that do not belong to {wanted}: {some}{roles}"
        raise InputError(Problem(what, directory.place, "give --output a directory that is empty or does not exist"))
    if fresh and held is not None and read:
        role, where = read[0]
        what = f"the recipe reads its {role} from {directory.place}, which --fresh would move away"
        raise InputError(Problem(what, where, "give another --output"))


def files_in(folder: Path, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what the recipe reads from a folder or below it (`data`, ...), with the line of the recipe."""
    found: list[tuple[str, str]] = []

    def look(place: str, text: str) -> str:
        path = resolve_path(text, recipe.origin)
        if path is not None and split_count(path)[0].resolve().is_relative_to(folder.resolve()):
            found.append(("source model" if place.startswith("source.") else "data", recipe.origin.where(place)))
        return text

    map_paths(recipe, look)
    yield from dict(found).items()
