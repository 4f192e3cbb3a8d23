"""Find recipes by path, or by the name of a recipe of the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe.paths import show_path

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of the package."""

    name: str
    """`task/source-to-target`, which `orchestrator train` accepts."""
    path: Path
    summary: str
    """The first paragraph of the comment at the beginning of the file."""


def shipped_recipes() -> list[ShippedRecipe]:
    """Return all recipes of the package, sorted by name: those in the wheel, or in `recipes/` of a checkout."""
    folder = _PACKAGE / "_recipes"
    if not folder.is_dir():
        folder = _PACKAGE.parent / "recipes"
    return [
        ShippedRecipe(f"{path.parent.name}/{path.stem}", path, _summarise(path))
        for path in sorted(folder.glob("*/*.yaml"))
    ]


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: an existing path, or a recipe of the package by `task/name` or `name`.

    Raises:
        RecipeError: there is neither such a file nor such a recipe.
    """
    path = _as_path(str(name))
    if path.is_file():
        return path.absolute()
    shipped = shipped_recipes()
    wanted = str(name).removesuffix(".yaml")
    found = [recipe.path for recipe in shipped if wanted in (recipe.name, recipe.path.stem)]
    if len(found) == 1:
        return found[0]
    raise RecipeError(_not_found(str(name), path, shipped, found))


def _as_path(name: str) -> Path:
    """Return a name as a path; for one that cannot be a path, a path that does not exist."""
    missing = Path(_PACKAGE, "no such recipe")
    try:
        return Path(name).expanduser() if name and "\0" not in name else missing
    except RuntimeError:  # `~user` of a user without a home.
        return missing


def _not_found(name: str, path: Path, shipped: list[ShippedRecipe], found: list[Path]) -> Problem:
    if found:
        names = ", ".join(f"`{recipe.name}`" for recipe in shipped if recipe.path in found)
        return Problem(f"several recipes are called {name!r}", remedy=f"use the full name: {names}")
    if path.is_dir():
        close = ", ".join(f"`{file}`" for file in sorted(path.glob("*.yaml"))[:3])
        return Problem(
            f"{name!r} is a folder, not a recipe", remedy=f"name a file in it: {close or 'it has no .yaml file'}"
        )
    if path.suffix in _SUFFIXES and path.parent.is_dir():
        sibling = nearest(path.name, (file.name for suffix in _SUFFIXES for file in path.parent.glob(f"*{suffix}")))
        if sibling:
            return Problem(
                f"there is no file {name!r}", remedy=f"did you mean `{show_path(path.parent.absolute() / sibling)}`?"
            )
    names_of = {short: recipe.name for recipe in shipped for short in (recipe.path.stem, recipe.name)}
    close_name = nearest(name.removesuffix(".yaml"), names_of)
    guess = f"did you mean `{names_of[close_name]}`? " if close_name else ""
    return Problem(
        f"there is no file and no recipe called {name!r}",
        remedy=f"{guess}`orchestrator recipes` lists the recipes of the package",
    )


def _summarise(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        comment = line.removeprefix("#").strip()
        if not line.startswith("#") or not comment:
            break
        lines.append(comment)
    return " ".join(lines)
