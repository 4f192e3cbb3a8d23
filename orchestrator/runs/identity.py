"""The identity of a run: its recipe, and the fingerprints of its source and data.

It is saved with every checkpoint, and covered by the checkpoint's hashes, so that a resumed run is compared with it
even where the run's own records are damaged or missing. Without a checkpoint, the records are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import yaml

from orchestrator.errors import InputError, Problem, RecipeError
from orchestrator.json_lines import parse_object
from orchestrator.recipe import Recipe, dump_recipe, parse_recipe
from orchestrator.runs.directory import RunDirectory

IDENTITY, MANIFEST = "identity.json", "MANIFEST.json"
"""Files of a checkpoint: its identity, and the hashes of all its files."""
Names = dict[str, set[str]]
# Locations of source and data, which may differ on another cluster; their contents are compared by fingerprint.
PLACES = {"source": {"model"}, "target": {"data"}}
# Keys of a recipe that may change between the attempts of a run, because they do not change what is learned.
FREE_TO_CHANGE: Names = {
    **PLACES,
    "": {"search"},
    "train": {"keep", "log_every", "cache_prefix"},
    "scale": {"max_failures", "storage", "cpus_per_worker", "cache_gigabytes", "wait_for_nodes"},
}
REMEDY = "use --fresh to start over (the old directory is kept under another name), or give another --output"


@dataclass(frozen=True)
class Identity:
    """The identity of a run; unknown parts are None."""

    recipe: str | None = None
    """YAML text with all defaults."""
    fingerprints: dict[str, str] | None = None
    """Hashes of the source and of each split."""
    attempt: int = 0
    chosen: dict[str, Any] | None = None
    """Keys of the recipe that a plan has chosen values for."""


def identity_to_keep(
    recipe: Recipe, fingerprints: dict[str, str], directory: RunDirectory, attempt: int = 0
) -> dict[str, Any]:
    """Return the identity to save with each checkpoint of this attempt, as JSON values."""
    # The recipe that the command wrote: that of a worker has the current number of workers and size of passes.
    text = directory.read(directory.recipe.name)
    written = dump_recipe(recipe) if text is None else text.decode("utf-8", errors="replace")
    return asdict(Identity(written, fingerprints, attempt, directory.read_record().get("chosen")))


def checkpoint_identities(directory: RunDirectory) -> list[Identity]:
    """Return the identities that checkpoints hold, the newest first; those of older versions hold none.

    A search has no checkpoints of its own; its identity is in a file next to its records.
    """
    if directory.kind == "search":
        found = [parse_object(directory.read(IDENTITY))]
    else:
        found = [read_identity(partial(_read_within, directory, name)) for name in directory.committed()]
    known = Identity.__dataclass_fields__.keys()
    return [Identity(**{name: value for name, value in each.items() if name in known}) for each in found if each]


def read_identity(read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Return the identity that is saved with a checkpoint; {} where it is missing or damaged.

    Args:
        read: returns the content of a file of the checkpoint, or None.
    """
    data = read(IDENTITY)
    if data is None:
        return {}
    expected = parse_object(read(MANIFEST)).get("files", {}).get(IDENTITY, {}).get("sha256")
    return parse_object(data) if hashlib.sha256(data).hexdigest() == expected else {}


def _read_within(directory: RunDirectory, checkpoint: str, name: str) -> bytes | None:
    return directory.read(f"{directory.checkpoints.name}/{checkpoint}/{name}")


def recorded_identity(directory: RunDirectory) -> Identity:
    """Return the identity by the directory's own records."""
    text = directory.read(directory.recipe.name)
    recipe = None if text is None else text.decode("utf-8", errors="replace")
    return Identity(recipe, directory.read_record().get("identity"))


def refuse_another_run(recipe: Recipe, fingerprints: dict[str, str], directory: RunDirectory) -> list[str]:
    """Raise InputError that names all changes, unless recipe, data and source are those that the run started with.

    Returns:
        Sentences for the user about what could not be compared.
    """
    if not (directory.result.exists() or directory.has_checkpoints()):
        return []
    free = FREE_TO_CHANGE
    if recipe.scale.min_workers is not None:
        free = {**free, "scale": {*free["scale"], "workers", "min_workers"}}
    return refuse_changes(recipe, fingerprints, directory, free)


def refuse_changes(recipe: Recipe, fingerprints: dict[str, str], directory: RunDirectory, free: Names) -> list[str]:
    """Raise InputError that names all changes since the run or search in the directory started.

    Args:
        free: keys that may change, by section of the recipe.

    Returns:
        Sentences for the user about what could not be compared.
    """
    kept = checkpoint_identities(directory) or [recorded_identity(directory)]
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
    """Return sentences for the user about what could not be compared."""
    record = directory.record.name
    found = [] if directory.read_record() else [f"{record} was damaged or missing: its earlier entries are lost"]
    missing = [] if has_recipe else [(directory.recipe.name, "the recipe is")]
    missing += [] if has_fingerprints else [(record, "source and data are")]
    return found + [f"without {name}, whether {what} as before could not be checked" for name, what in missing]


def last_attempt(directory: RunDirectory) -> int:
    """Return the number of the last attempt by the record or the checkpoints; 0 where there was none."""
    recorded = directory.read_record().get("attempt", 0)
    return max([int(recorded), *(each.attempt for each in checkpoint_identities(directory))])


def recorded_choice(directory: RunDirectory) -> dict[str, Any] | None:
    """Return the values that a plan chose when the run started; None where there was no plan."""
    every = [directory.read_record().get("chosen"), *(each.chosen for each in checkpoint_identities(directory))]
    return next((each for each in every if each is not None), None)


def read_values(text: str | None) -> dict[str, Any] | None:
    """Return the values of a recipe's text, with today's defaults; None where the text is not a whole recipe."""
    if text is None:
        return None
    with contextlib.suppress(RecipeError):  # A recipe of an older version may lack keys that have defaults now.
        text = dump_recipe(parse_recipe(text))
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) and Recipe.model_fields.keys() <= found.keys() else None


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Return the keys whose values differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def differences(old: dict[str, Any], new: dict[str, Any], free: Names, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted paths whose values differ and may not, with both values."""
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
