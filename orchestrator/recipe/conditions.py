"""Which values of a search go together: the case that applies to each place, and every combination of them.

The check of a recipe, the grid, random draws and TPE all walk through the same combinations; they differ in the values
that they take for a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from orchestrator.recipe.mistakes import value_at
from orchestrator.recipe.schema import Case, Recipe, Search

Parameters = dict[str, Any]
"""What a trial changes: dotted places of the recipe, each with its value."""
Cases = Mapping[str, Sequence[Case]]
"""The cases of each place in a space."""


def cases_of(entry: Case | list[Case]) -> tuple[Case, ...]:
    """The cases of one place, whether the recipe has one or a list of them."""
    return (entry,) if isinstance(entry, Case) else tuple(entry)


def place_of(search: Search | None, path: str, number: int) -> str:
    """Where a case of a place is written, as a message names it: with its number where it stands in a list."""
    entry = ((search and search.space) or {}).get(path)
    return f"search.space.{path}.{number}" if isinstance(entry, list) else f"search.space.{path}"


def boundaries(recipe: Recipe, num_layers: int) -> list[int | str]:
    """What `every` stands for: each freeze depth that leaves something to train of what the recipe trains."""
    depths: list[int | str] = [0, "stem", *range(1, num_layers)]
    if recipe.transfer.adapter is not None:  # It goes into a layer that is not frozen.
        return depths
    return [*depths, num_layers, *(["all"] if recipe.transfer.layer_decay is None else [])]


def write_boundaries(space: Cases, depths: Sequence[int | str]) -> dict[str, tuple[Case, ...]]:
    """The space with these freeze depths in the place of `every`."""

    def write(case: Case) -> Case:
        return case.model_copy(update={"choice": list(depths)}) if case.choice == "every" else case

    return {path: tuple(map(write, cases)) for path, cases in space.items()}


def is_within(path: str, other: str) -> bool:
    """Whether a dotted path is another one, or below it."""
    return path == other or path.startswith(f"{other}.")


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
    """A copy of plain data with all parameters in it; what lies within another parameter goes in after it."""
    for path in sorted(parameters, key=lambda path: path.count(".")):
        data = put(data, path, parameters[path])
    return data


def holds(when: Mapping[str, Any] | None, data: dict[str, Any]) -> bool:
    """Whether plain data have what a case asks for; a list of values in it means any of them."""
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
    """The places in the order in which values are chosen: each after those that it depends on, else as written.

    Returns:
        the places in order, and those that depend on each other in a circle.
    """
    waiting = {path: {other for other in space if depends_on(path, cases, other)} for path, cases in space.items()}
    order: list[str] = []
    while ready := [path for path, others in waiting.items() if others.issubset(order)]:
        order.append(ready[0])
        del waiting[ready[0]]
    return order, list(waiting)


def depends_on(path: str, cases: Sequence[Case], other: str) -> bool:
    """Whether the value at `other` decides what may stand at `path`: it is around it in the recipe, or in a `when`."""
    if path == other:
        return False
    return is_within(path, other) or any(is_within(said, other) for case in cases for said in said_in(case.when or {}))


def said_in(wanted: Any, path: str = "") -> Iterator[str]:
    """Every place that a condition speaks of."""
    if isinstance(wanted, dict):
        for key, item in wanted.items():
            yield from said_in(item, f"{path}.{key}" if path else key)
    elif isinstance(wanted, list) and any(isinstance(item, dict) for item in wanted):
        for item in wanted:
            yield from said_in(item, path)
    else:
        yield path


class Combinations:
    """A space, with the recipe that it changes."""

    def __init__(self, recipe: Recipe, space: Cases) -> None:
        self.space = dict(space)
        self._order, circle = put_in_order(space)
        assert not circle, f"{circle} depend on each other"
        self._data = recipe.model_dump(exclude={"search"})
        self._filled: dict[str, Any] = {}

    def walk(self, values_of: Callable[[str, int, Case], Iterable[Any]]) -> Iterator[Parameters]:
        """Every combination of the values that `values_of(path, number of the case, case)` gives.

        A place of which no case applies is left out: there the recipe's own value holds. The place written first
        changes slowest, but for those that it depends on.
        """
        for chosen in self._walk(0, {}, self._data, values_of):
            yield {path: chosen[path] for path in self.space if path in chosen}

    def walk_choices(self) -> Iterator[Parameters]:
        """Every combination of the choices; each range that takes part has its case in the place of a value."""

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
        """The value with the defaults that the recipe would give it, so that conditions on those hold too."""
        if not isinstance(value, dict):
            return value
        key = f"{path}: {value!r}"
        if key not in self._filled:
            try:
                recipe = Recipe.model_validate(put(self._data, path, value))
                self._filled[key] = value_at(recipe.model_dump(), tuple(path.split(".")))
            except ValidationError:  # Told where the values are checked.
                self._filled[key] = value
        return self._filled[key]
