"""Combinations of searched values: the case that applies to each key, and all combinations of cases.

The check of a recipe, the grid, random sampling and TPE all iterate over the same combinations; they differ in the
values that they choose for a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from orchestrator.recipe.mistakes import value_at
from orchestrator.recipe.origin import is_within
from orchestrator.recipe.schema import Case, Recipe, Search

Parameters = dict[str, Any]
"""The changes of a trial: dotted paths of the recipe with their values."""
Cases = Mapping[str, Sequence[Case]]
"""The cases of each path in a space."""


def cases_of(entry: Case | list[Case]) -> tuple[Case, ...]:
    """Return the cases of a path as a list, also if the recipe has a single one."""
    return (entry,) if isinstance(entry, Case) else tuple(entry)


def place_of(search: Search | None, path: str, number: int) -> str:
    """Return the path of a case in the recipe, with its index if it is in a list."""
    entry = ((search and search.space) or {}).get(path)
    return f"search.space.{path}.{number}" if isinstance(entry, list) else f"search.space.{path}"


def boundaries(recipe: Recipe, num_layers: int) -> list[int | str]:
    """Return the freeze depths of `every`: those that leave trained parameters."""
    depths: list[int | str] = [0, "stem", *range(1, num_layers)]
    if recipe.transfer.adapter is not None:  # An adapter needs a layer that is not frozen.
        return depths
    return [*depths, num_layers, *(["all"] if recipe.transfer.layer_decay is None else [])]


def write_boundaries(space: Cases, depths: Sequence[int | str]) -> dict[str, tuple[Case, ...]]:
    """Replace `every` by these freeze depths."""

    def write(case: Case) -> Case:
        return case.model_copy(update={"choice": list(depths)}) if case.choice == "every" else case

    return {path: tuple(map(write, cases)) for path, cases in space.items()}


def put(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of plain data with `value` at a dotted path.

    Mappings on the way are made where there are none; an item of a list is set by its number, and must be there.
    """
    first, _, rest = path.partition(".")
    if rest:
        below = data.get(first)
        if isinstance(below, list):
            items = put({str(number): item for number, item in enumerate(below)}, rest, value)
            value = list(items.values())
        else:
            value = put(below if isinstance(below, dict) else {}, rest, value)
    return {**data, first: value}


def put_all(data: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
    """Return a copy of plain data with all parameters set; those below another parameter are set after it."""
    for path in sorted(parameters, key=lambda path: path.count(".")):
        data = put(data, path, parameters[path])
    return data


def holds(when: Mapping[str, Any] | None, data: dict[str, Any]) -> bool:
    """Whether plain data fulfil a case's condition; a list in it allows any of its values."""
    for path, wanted in (when or {}).items():
        value = value_at(data, tuple(path.split(".")))
        if not any(_fits(value, each) for each in (wanted if isinstance(wanted, list) else [wanted])):
            return False
    return True


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(_fits(value.get(key), item) for key, item in wanted.items())
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def put_in_order(space: Cases) -> tuple[list[str], list[str]]:
    """Sort the paths so that each comes after those that it depends on; otherwise they keep their order.

    Returns:
        The sorted paths, and those that depend on each other in a circle.
    """
    waiting = {path: {other for other in space if depends_on(path, cases, other)} for path, cases in space.items()}
    order: list[str] = []
    while ready := [path for path, others in waiting.items() if others.issubset(order)]:
        order.append(ready[0])
        del waiting[ready[0]]
    return order, list(waiting)


def depends_on(path: str, cases: Sequence[Case], other: str) -> bool:
    """Whether `path` depends on the value at `other`: it is below it in the recipe, or has it in a `when`."""
    if path == other:
        return False
    return is_within(path, other) or any(is_within(used, other) for case in cases for used in paths_in(case.when or {}))


def paths_in(wanted: Any, path: str = "") -> Iterator[str]:
    """Yield every path in a condition."""
    if isinstance(wanted, dict):
        for key, item in wanted.items():
            yield from paths_in(item, f"{path}.{key}" if path else key)
    elif isinstance(wanted, list) and any(isinstance(item, dict) for item in wanted):
        for item in wanted:
            yield from paths_in(item, path)
    else:
        yield path


class Combinations:
    """The combinations of a space, for the recipe that it changes."""

    def __init__(self, recipe: Recipe, space: Cases) -> None:
        self.space = dict(space)
        self._order, circle = put_in_order(space)
        assert not circle, f"{circle} depend on each other"
        self._data = recipe.model_dump(exclude={"search"})
        self._filled: dict[str, Any] = {}

    def walk(self, values_of: Callable[[str, int, Case], Iterable[Any]]) -> Iterator[Parameters]:
        """Yield every combination of the values that `values_of(path, index of the case, case)` returns.

        A path without an applicable case is left out, and keeps the recipe's value. The first path changes slowest,
        except for those that it depends on.
        """
        for chosen in self._walk(0, {}, self._data, values_of):
            yield {path: chosen[path] for path in self.space if path in chosen}

    def walk_choices(self) -> Iterator[Parameters]:
        """Yield every combination of the choices; a range is represented by its case."""

        def values_of(_path: str, _number: int, case: Case) -> list[Any]:
            assert case.choice != "every", "boundaries are written out first"
            return [case] if case.choice is None else list(case.choice)

        return self.walk(values_of)

    def _walk(
        self,
        index: int,
        chosen: Parameters,
        data: dict[str, Any],
        values_of: Callable[[str, int, Case], Iterable[Any]],
    ) -> Iterator[Parameters]:
        if index == len(self._order):
            yield chosen
            return
        path = self._order[index]
        numbered = enumerate(self.space[path])
        number, case = next(((number, case) for number, case in numbered if holds(case.when, data)), (-1, None))
        if case is None:
            yield from self._walk(index + 1, chosen, data, values_of)
            return
        for value in values_of(path, number, case):
            new = put(data, path, self._fill(path, value))
            yield from self._walk(index + 1, {**chosen, path: value}, new, values_of)

    def _fill(self, path: str, value: Any) -> Any:
        """Return the value with the recipe's defaults, for conditions on them."""
        if not isinstance(value, dict):
            return value
        key = f"{path}: {value!r}"
        if key not in self._filled:
            try:
                recipe = Recipe.model_validate(put(self._data, path, value))
                self._filled[key] = value_at(recipe.model_dump(), tuple(path.split(".")))
            except ValidationError:  # Reported where the values are checked.
                self._filled[key] = value
        return self._filled[key]
