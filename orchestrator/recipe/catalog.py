"""The recipes that ship with the package, and finding a recipe by its path or name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe.paths import show_path

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """One recipe that comes with the package."""

    name: str
    """`task/source-to-target`, which `orchestrator train` takes too."""
    path: Path
    summary: str
    """The first paragraph of the comment that the file begins with."""


def shipped_recipes() -> list[ShippedRecipe]:
    """All recipes that ship, sorted by name. They lie in the wheel, or in `recipes/` of a checkout."""
    folder = _PACKAGE / "_recipes"
    if not folder.is_dir():
        folder = _PACKAGE.parent / "recipes"
    return [
        ShippedRecipe(f"{path.parent.name}/{path.stem}", path, _summarise(path))
        for path in sorted(folder.glob("*/*.yaml"))
    ]


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: an existing path, or a shipped recipe by `task/name` or `name`, with or without `.yaml`.

    Raises:
        RecipeError: there is neither such a file nor such a shipped recipe.
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
    """The path that a name may be; one that no file has where it cannot be a path at all."""
    nowhere = Path(_PACKAGE, "no such recipe")
    try:
        return Path(name).expanduser() if name and "\0" not in name else nowhere
    except RuntimeError:  # `~user` of a user without a home.
        return nowhere


def _not_found(name: str, path: Path, shipped: list[ShippedRecipe], found: list[Path]) -> Problem:
    if found:
        names = ", ".join(f"`{recipe.name}`" for recipe in shipped if recipe.path in found)
        return Problem(f"more than one shipped recipe is called {name!r}", remedy=f"name one in full: {names}")
    if path.is_dir():
        close = ", ".join(f"`{file}`" for file in sorted(path.glob("*.yaml"))[:3])
        return Problem(
            f"{name!r} is a folder, not a recipe", remedy=f"name a file in it: {close or 'it has no .yaml file'}"
        )
    if path.suffix in _SUFFIXES and path.parent.is_dir():
        beside = nearest(path.name, (file.name for suffix in _SUFFIXES for file in path.parent.glob(f"*{suffix}")))
        if beside:
            return Problem(
                f"there is no file {name!r}", remedy=f"did you mean `{show_path(path.parent.absolute() / beside)}`?"
            )
    names_of = {short: recipe.name for recipe in shipped for short in (recipe.path.stem, recipe.name)}
    close_name = nearest(name.removesuffix(".yaml"), names_of)
    guess = f"did you mean `{names_of[close_name]}`? " if close_name else ""
    return Problem(
        f"there is neither a file nor a shipped recipe {name!r}",
        remedy=f"{guess}`orchestrator recipes` lists those that ship",
    )


def _summarise(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        comment = line.removeprefix("#").strip()
        if not line.startswith("#") or not comment:
            break
        lines.append(comment)
    return " ".join(lines)
