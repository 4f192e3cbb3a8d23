"""Parse the text of a recipe to a checked `Recipe`, and write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from yaml.nodes import ScalarNode

from orchestrator.errors import Problem, RecipeError
from orchestrator.recipe.catalog import find_recipe
from orchestrator.recipe.mistakes import Mistake, find_mistakes, leave_out
from orchestrator.recipe.origin import Origin, is_within
from orchestrator.recipe.overrides import apply_overrides
from orchestrator.recipe.paths import path_exists, resolve_path, split_count
from orchestrator.recipe.reading import read_text, read_yaml, resolve_scalar
from orchestrator.recipe.reference import shape_of
from orchestrator.recipe.rules import SPLITS, check_rules
from orchestrator.recipe.schema import Data, Recipe, Section
from orchestrator.recipe.search_rules import check_search
from orchestrator.recipe.wording import explain_mistakes

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by its file, or by the name of a recipe of the package, and apply `key=value` overrides.

    A relative path in an override is resolved in the working folder first, then in the recipe's folder.

    Raises:
        RecipeError: all problems of the file, the overrides, the values and the rules between them.
    """
    path = find_recipe(path_or_name)
    return parse_recipe(read_text(path), path, overrides)


def parse_recipe(text: str, file: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Parse a recipe. Relative paths in it start at the folder of `file`, or at the working folder without one.

    Raises:
        RecipeError: as `load_recipe`.
    """
    file = file.absolute() if file else None
    document = read_yaml(text, file)
    data, texts, problems = apply_overrides(document.data, overrides)
    origin = Origin(file, _written_lines(document.lines, texts), texts)
    return build_recipe(data, origin, [*document.problems, *problems])


def build_recipe(data: dict[str, Any], origin: Origin, problems: Sequence[Problem] = ()) -> Recipe:
    """Build a recipe from plain data.

    Args:
        origin: where the values were written.
        problems: found before.

    Raises:
        RecipeError: `problems`, those of the values, and those of the rules between them.
    """
    mistakes: list[Mistake] = []
    found = [*problems]
    data = _spelled_out(data)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        shape = shape_of(Recipe)
        mistakes = find_mistakes(error, data, shape)
        found += explain_mistakes(mistakes, data, shape, origin)
        try:
            # The values without mistakes are checked too, so that one report has all problems.
            recipe = Recipe.model_validate(leave_out(mistakes, data, shape))
        except ValidationError:
            raise RecipeError(found) from None
    recipe._origin = origin
    unreliable = [path for mistake in mistakes for path in mistake.touches]
    found += [*check_rules(recipe, unreliable), *check_search(recipe, unreliable)]
    if found:
        raise RecipeError(found)
    return _settle_overridden_paths(recipe)


def _spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """Replace `scale.workers: [2, 8]` and `scale.zero_stage: auto` by the two values that each stands for."""
    scale = data.get("scale")
    if not isinstance(scale, dict):
        return data
    scale, ends = {**scale}, scale.get("workers")
    if isinstance(ends, list) and len(ends) == 2:
        scale |= {"min_workers": ends[0], "workers": ends[1]}
    if scale.get("zero_stage") == "auto":
        scale |= {"zero_stage": 0, "fit": True}
    return {**data, "scale": scale}


def check_section(section: type[AnySection], data: dict[str, Any], path: str, origin: Origin) -> AnySection:
    """Validate a section of the recipe with a schema of its own, such as a task's options at `target.options`.

    Raises:
        RecipeError: with every value that does not fit, at its place in the recipe.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        shape = shape_of(section)
        mistakes = find_mistakes(error, data, shape)
        raise RecipeError(explain_mistakes(mistakes, data, shape, origin, path)) from None


def dump_recipe(recipe: Recipe, absolute: bool = True) -> str:
    """Return the recipe as YAML, with all defaults, and absolute local paths so that a copy runs from anywhere."""
    data = (make_paths_absolute(recipe) if absolute else recipe).model_dump()
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def make_paths_absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute local paths of model and data."""

    def absolute(_: str, text: str) -> str:
        path = resolve_path(text, recipe.origin)
        return text if path is None else str(path)

    return map_paths(recipe, absolute)


def _settle_overridden_paths(recipe: Recipe) -> Recipe:
    """Make paths of the command line absolute if they exist in the working folder, where shells complete them."""

    def absolute(place: str, text: str) -> str:
        path = resolve_path(text, Origin()) if any(is_within(place, key) for key in recipe.origin.overrides) else None
        return str(path) if path is not None and path_exists(split_count(path)[0]) else text

    return map_paths(recipe, absolute)


def map_paths(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """Return the recipe with texts that may name a local model or data replaced by `change(dotted path, text)`."""

    def change_files(split: str, files: str | list[str] | None) -> str | list[str] | None:
        place = f"target.data.{split}"
        if files is None or isinstance(files, str):
            return files and change(place, files)
        return [change(f"{place}.{index}", file) for index, file in enumerate(files)]

    data = recipe.target.data
    new: str | Data
    if isinstance(data, str):
        new = change("target.data", data)
    elif data.path is not None:
        new = data.model_copy(update={"path": change("target.data.path", data.path)})
    else:
        new = data.model_copy(update={split: change_files(split, getattr(data, split)) for split in SPLITS})
    places = {"model": recipe.source.model}
    if recipe.source.config is not None:
        places["config"] = recipe.source.config
    source = recipe.source.model_copy(update={key: change(f"source.{key}", text) for key, text in places.items()})
    target = recipe.target.model_copy(update={"data": new})
    return recipe.model_copy(update={"source": source, "target": target})


def _written_lines(lines: dict[str, int], overrides: dict[str, str]) -> dict[str, int]:
    """Return the lines of the values in the file that no override replaces."""
    return {path: line for path, line in lines.items() if not any(is_within(path, other) for other in overrides)}


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or `resolve_scalar` would read as another type."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        resolve: Callable[..., Any] = super().resolve
        tag = resolve(kind, value, implicit)
        if kind is ScalarNode and implicit[0] and tag == self.DEFAULT_SCALAR_TAG:
            return resolve_scalar(value)
        return tag

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> Any:
        represent: Callable[..., Any] = super().represent_scalar
        # Other styles drop line breaks such as U+0085.
        return represent(tag, value, style if value.isprintable() else '"')

    def ignore_aliases(self, data: Any) -> bool:
        return True
