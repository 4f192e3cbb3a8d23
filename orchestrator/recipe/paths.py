"""Tell local paths from Hub ids, and resolve them, for recipes, data and models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import Problem, RecipeError

if TYPE_CHECKING:
    from orchestrator.recipe.origin import Origin

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?")

_COUNT = re.compile("[1-9][0-9]*")


def resolve_path(text: str, origin: Origin) -> Path | None:
    """Return the absolute path that `text` names, or None for a Hub id or `package:NAME/PATH`.

    A text is a path when it starts with `.`, `/` or `~`, ends like a data file, exists relative to the recipe's
    folder, or cannot be a Hub id (`name` or `owner/name`). The path need not exist. `..` is resolved, but a link in the
    last part is kept, because its name (with its suffix) is the one that the user wrote.

    Raises:
        RecipeError: the text holds a NUL byte, or its `~user` has no home.
    """
    if "\0" in text:
        raise RecipeError(Problem(f"the path {text!r} holds a NUL byte", remedy="remove the \\0 from the path"))
    if text.startswith(PACKAGE_PREFIX):
        return None
    try:
        path = origin.folder / Path(text).expanduser()
    except RuntimeError:
        raise RecipeError(Problem(f"the path {text!r} has no home folder", remedy="write the path in full")) from None
    if _looks_like_path(text) or path_exists(path):
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    return None


def split_count(path: Path) -> tuple[Path, int | None]:
    """Split `train.jsonl#500` into a path and the number of examples to draw from it."""
    name, _, count = path.name.rpartition("#")
    if not (name and _COUNT.fullmatch(count)) or path_exists(path):
        return path, None
    return path.with_name(name), int(count)


def show_path(path: Path) -> str:
    """Return the path relative to the working folder if it is inside, otherwise the whole path."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _looks_like_path(text: str) -> bool:
    if text.startswith((".", "/", "~")) or text.lower().endswith(DATA_SUFFIXES):
        return True
    return _HUB_ID.fullmatch(text) is None


def path_exists(path: Path) -> bool:
    """Whether a file or folder exists; False also for a name that is too long for the file system."""
    try:
        return path.exists()
    except OSError:
        return False
