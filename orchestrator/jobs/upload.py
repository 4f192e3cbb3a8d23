"""The files of a job: the recipe, the local files that it names, and this version of the package."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from orchestrator.errors import InputError, Problem
from orchestrator.formatting import format_bytes
from orchestrator.recipe import Recipe, dump_recipe, map_paths, resolve_path
from orchestrator.recipe.paths import path_exists, split_count

PACKAGE = Path(__file__).parent.parent
RECIPE_FILE, ENVIRONMENT_FILE, FILES_FOLDER = "recipe.yaml", "environment.json", "files"
LARGEST = 100 * 2**20
"""Bytes; Ray's own limit for a job's working folder."""
LABEL_NAMES = "labels.json"


@dataclass(frozen=True)
class Upload:
    """A folder that is ready to be submitted."""

    folder: Path
    num_bytes: int
    """Size of the recipe and its files, without the package."""
    num_files: int
    digest: str
    """SHA-256 of recipe and files."""


def pack(
    recipe: Recipe,
    folder: Path,
    shared: Sequence[Path],
    variables: Sequence[str],
    pictures: Mapping[Path, Sequence[Path]] = MappingProxyType({}),
) -> Upload:
    """Copy everything that a job needs into a folder.

    Args:
        shared: folders that every node has under the same path; their files are not copied.
        variables: names of environment variables to pass to the job. Their values go into a separate file, because the
            settings of a job are visible to all users of the cluster.
        pictures: paths of pictures that data files name, by the folder of the data files.

    Raises:
        InputError: a file does not exist, the files are too large, or a variable is not set.
    """
    moved, copied, problems = _collect_files(recipe, shared)
    missing = [name for name in variables if name not in os.environ]
    problems += [Problem(f"the variable {name} is not set", "--env", f"export {name}=...") for name in missing]
    to_copy = _pictures_by_target(copied, pictures)
    problems += _too_large([*copied, *to_copy.values()])
    if problems:
        raise InputError(problems)
    for path, place in copied.items():
        _copy(path, folder / place)
    for place, path in to_copy.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / place)
    text = dump_recipe(moved, absolute=False)
    (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    num_bytes = sum(path.stat().st_size for path in files)
    _write_environment({name: os.environ[name] for name in variables}, folder / ENVIRONMENT_FILE)
    copy_package(folder)
    return Upload(folder, num_bytes, len(files), digest.hexdigest())


def _collect_files(recipe: Recipe, shared: Sequence[Path]) -> tuple[Recipe, dict[Path, str], list[Problem]]:
    """Return the recipe with its local paths in the job's folder, the files to copy there, and what is missing."""
    problems: list[Problem] = []
    copied: dict[Path, str] = {}

    def change(place: str, text: str) -> str:
        path = resolve_path(text, recipe.origin)
        if path is None or any(path.is_relative_to(home) for home in shared):
            return text if path is None else str(path)
        bare, _ = split_count(path)
        if not path_exists(bare):
            remedy = "correct the path; if it exists only on the cluster, name its folder with --shared"
            problems.append(Problem(f"{bare} does not exist", recipe.origin.where(place), remedy))
            return text
        copied.setdefault(bare, f"{FILES_FOLDER}/{len(copied)}/{bare.name}")
        return f"./{copied[bare]}{path.name.removeprefix(bare.name)}"

    moved = map_paths(recipe, change)
    return _with_option_files(moved, copied), copied, problems


def copy_package(folder: Path) -> None:
    """Copy this version of the package into the working folder of a job."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "_recipes"))


def _pictures_by_target(copied: Mapping[Path, str], pictures: Mapping[Path, Sequence[Path]]) -> dict[str, Path]:
    """Return the pictures that copied data files name, by their new paths, next to each data file."""
    return {
        str(PurePosixPath(place).parent / picture.relative_to(path.parent)): picture
        for path, place in copied.items()
        if path.is_file()
        for picture in pictures.get(path.parent, ())
    }


def _with_option_files(recipe: Recipe, copied: dict[Path, str]) -> Recipe:
    """Return the recipe with the new paths of files that the task's options name, such as a chat template."""
    options = dict(recipe.target.options)
    for key, value in recipe.target.options.items():
        path = recipe.origin.folder / value if isinstance(value, str) else None
        # Only with a suffix: a word such as `plain` could also be the name of a file.
        if path is not None and path.suffix and path_exists(path) and path.is_file():
            options[key] = f"./{copied.setdefault(path, f'{FILES_FOLDER}/{len(copied)}/{path.name}')}"
    return recipe.model_copy(update={"target": recipe.target.model_copy(update={"options": options})})


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target)
        return
    shutil.copy(path, target)
    names = path.parent / LABEL_NAMES  # Names of classes are read from a file next to the data.
    if names.is_file():
        shutil.copy(names, target.parent)


def _too_large(paths: Sequence[Path]) -> list[Problem]:
    sizes = {path: _size(path) for path in paths}
    if sum(sizes.values()) <= LARGEST:
        return []
    largest = max(sizes, key=sizes.__getitem__)
    what = f"the recipe's files have {format_bytes(sum(sizes.values()))}, and a job may have {format_bytes(LARGEST)}"
    remedy = "put it into a folder that every node has under the same path, and name that folder with --shared"
    return [Problem(what, f"{largest} ({format_bytes(sizes[largest])})", remedy)]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _write_environment(values: dict[str, str], path: Path) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
        json.dump(values, file)
