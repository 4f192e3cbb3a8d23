"""What a run was begun with: its recipe, and the fingerprints of its source and data.

It stands with every checkpoint, under the checkpoint's hashes, so that a run is held against it even where its own
records are damaged or missing. Where no checkpoint tells it, the records do.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import yaml

from orchestrator.errors import InputError, Problem, RecipeError
from orchestrator.json_lines import parse_object
from orchestrator.recipe import Recipe, dump_recipe, parse_recipe
from orchestrator.runs.checkpoint import IDENTITY, read_identity
from orchestrator.runs.directory import RunDirectory

Names = dict[str, set[str]]
# Where source and data lie, which may be elsewhere on another cluster; what is in them is held against the record.
PLACES = {"source": {"model"}, "target": {"data"}}
# Parts of a recipe that may change between the attempts of one run: they do not change what is learned.
FREE_TO_CHANGE: Names = {
    **PLACES,
    "": {"search"},
    "train": {"keep", "log_every", "cache_prefix"},
    "scale": {"max_failures", "storage", "cpus_per_worker", "cache_gigabytes", "wait_for_nodes"},
}
REMEDY = "use --fresh to start over (the old directory is kept under another name), or give another --output"


@dataclass(frozen=True)
class Identity:
    """What a run was begun with, as far as it is known."""

    recipe: str | None = None
    """Its YAML text, every default written out."""
    fingerprints: dict[str, str] | None = None
    """Of the source and of each split."""
    attempt: int = 0
    chosen: dict[str, Any] | None = None
    """Places of the recipe that a plan has filled in, with their values."""


def identity_to_keep(
    recipe: Recipe, fingerprints: dict[str, str], directory: RunDirectory, attempt: int = 0
) -> dict[str, Any]:
    """Return what is to stand with each checkpoint of this attempt, as JSON has it."""
    # As the command wrote it: the workers' own recipe has the number of workers and the passes of the moment.
    text = directory.read(directory.recipe.name)
    written = dump_recipe(recipe) if text is None else text.decode("utf-8", errors="replace")
    return asdict(Identity(written, fingerprints, attempt, directory.read_record().get("chosen")))


def kept_identities(directory: RunDirectory) -> list[Identity]:
    """Return what the checkpoints in a directory say, the newest first; [] where they are of an older version.

    A search has no checkpoints of its own, and keeps it in a file beside its records.
    """
    if directory.kind == "search":
        found = [parse_object(directory.read(IDENTITY))]
    else:
        found = [read_identity(partial(_read_within, directory, name)) for name in directory.committed()]
    known = Identity.__dataclass_fields__.keys()
    return [Identity(**{name: value for name, value in each.items() if name in known}) for each in found if each]


def _read_within(directory: RunDirectory, checkpoint: str, name: str) -> bytes | None:
    return directory.read(f"{directory.checkpoints.name}/{checkpoint}/{name}")


def recorded_identity(directory: RunDirectory) -> Identity:
    """Return what the directory's own records say."""
    text = directory.read(directory.recipe.name)
    recipe = None if text is None else text.decode("utf-8", errors="replace")
    return Identity(recipe, directory.read_record().get("identity"))


def refuse_another_run(recipe: Recipe, fingerprints: dict[str, str], directory: RunDirectory) -> list[str]:
    """Raise InputError that names what changed, unless a run is gone on with on the same recipe, data and source.

    Returns:
        What could not be held against anything, as sentences for the user.
    """
    if not (directory.result.exists() or directory.has_checkpoints()):
        return []
    free = FREE_TO_CHANGE
    if recipe.scale.min_workers is not None:
        free = {**free, "scale": {*free["scale"], "workers", "min_workers"}}
    return refuse_changes(recipe, fingerprints, directory, free)


def refuse_changes(recipe: Recipe, fingerprints: dict[str, str], directory: RunDirectory, free: Names) -> list[str]:
    """Raise InputError that names what changed since what is in the directory was begun.

    Args:
        free: what may change, as names in sections of the recipe.

    Returns:
        What could not be held against anything, as sentences for the user.
    """
    kept = kept_identities(directory) or [recorded_identity(directory)]
    recipes = [values for each in kept if (values := read_values(each.recipe)) is not None]
    known = [each.fingerprints for each in kept if each.fingerprints]
    now = read_values(dump_recipe(recipe)) or {}
    changed = {path: (was, new) for old in recipes for path, was, new in differences(old, now, free)}
    problems = [
        Problem(
            f"the {directory.kind} in {directory.place} has {path}: {json.dumps(was)}, now it is {json.dumps(new)}",
            recipe.origin.where(path),
            REMEDY,
        )
        for path, (was, new) in changed.items()
    ]
    others = {name for old in known for name in differing(old, fingerprints)}
    for name in sorted(others):
        what = "source model" if name == "source" else f"{name} data"
        problems.append(
            Problem(f"the {what} changed since the {directory.kind} in {directory.place} began", remedy=REMEDY)
        )
    if problems:
        raise InputError(problems)
    return unknown_parts(directory, bool(recipes), bool(known))


def unknown_parts(directory: RunDirectory, has_recipe: bool, has_fingerprints: bool) -> list[str]:
    record = directory.record.name
    found = [] if directory.read_record() else [f"{record} was damaged or missing: what it told of before is lost"]
    missing = [] if has_recipe else [(directory.recipe.name, "the recipe is")]
    missing += [] if has_fingerprints else [(record, "source and data are")]
    return found + [f"without {name}, whether {what} as before could not be checked" for name, what in missing]


def last_attempt(directory: RunDirectory) -> int:
    """Return the number of the last attempt, as the record or the checkpoints have it; 0 where there was none."""
    recorded = directory.read_record().get("attempt", 0)
    return max([int(recorded), *(each.attempt for each in kept_identities(directory))])


def earlier_choice(directory: RunDirectory) -> dict[str, Any] | None:
    """Return what a plan chose when the run began; None where none did."""
    every = [directory.read_record().get("chosen"), *(each.chosen for each in kept_identities(directory))]
    return next((each for each in every if each is not None), None)


def read_values(text: str | None) -> dict[str, Any] | None:
    """Return what a recipe's text says, with the defaults of today; None where it is none, or only a part of one."""
    if text is None:
        return None
    with contextlib.suppress(RecipeError):  # An older version may have had no place for what has its default now.
        text = dump_recipe(parse_recipe(text))
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) and Recipe.model_fields.keys() <= found.keys() else None


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def differences(old: dict[str, Any], new: dict[str, Any], free: Names, path: str = "") -> list[tuple[str, Any, Any]]:
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
