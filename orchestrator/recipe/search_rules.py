"""Rules for the section `search`: its settings, and each path of its space on its own.

What shows only where values meet is in `combination_rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import Problem, nearest
from orchestrator.recipe.combination_rules import find_in_combinations
from orchestrator.recipe.conditions import Cases, cases_of, depends_on, paths_in, place_of, put, put_in_order
from orchestrator.recipe.finding import Finding
from orchestrator.recipe.mistakes import dotted, find_mistakes, value_at
from orchestrator.recipe.origin import is_within
from orchestrator.recipe.reference import shape_of
from orchestrator.recipe.rules import as_problems, overlap
from orchestrator.recipe.schema import Case, Recipe, Search
from orchestrator.recipe.wording import explain_value, write_value

KINDS = ("choice", "uniform", "loguniform", "integers")
_FIXED = {
    "name": "a search names its trials itself",
    "search": "a search does not search itself",
    "scale": "all trials run on the same machines, and what they learn does not depend on it",
    "target.task": "trials are compared on the same task",
    "target.data": "trials are compared on the same examples",
    "target.columns": "trials are compared on the same examples",
    "target.split": "trials are compared on the same examples",
    "target.limit.select": "trials are compared on the same examples",
    "target.limit.test": "trials are compared on the same examples",
}
_MAY_CHANGE_MIDWAY = ("train.learning_rate", "train.weight_decay", "train.max_grad_norm")


def check_search(recipe: Recipe, unreliable: Sequence[str] = ()) -> list[Problem]:
    """Return the problems of the section `search`, without those of a path at, above or below `unreliable`."""
    return as_problems(recipe, _find_all(recipe, unreliable), unreliable) if recipe.search is not None else []


def _find_all(recipe: Recipe, unreliable: Sequence[str]) -> Iterator[Finding]:
    search = recipe.search
    assert search is not None
    for rule in _SETTINGS:
        yield from rule(search)
    space = {path: cases_of(entry) for path, entry in (search.space or {}).items()}
    wrong = {path for path in space if any(overlap(f"search.space.{path}", other) for other in unreliable)}
    for path in space:
        misplaced = list(_place_exists(path)) or list(_item_exists(recipe, path))
        rules = () if misplaced else _PLACES
        found = [*misplaced, *(finding for rule in rules for finding in rule(recipe, search, path, space))]
        found += _conditions_can_be_met(recipe, path, space)
        yield from found
        wrong |= {path} if found else set()
    order, circle = put_in_order(space)
    if circle:
        what = f"{' and '.join(f'`{path}`' for path in circle)} depend on each other"
        yield Finding(tuple(f"search.space.{path}" for path in circle), what, "remove the `when` of one of them")
    sound: dict[str, tuple[Case, ...]] = {}
    for path in order:
        if path not in wrong and not any(depends_on(path, space[path], other) for other in space if other not in sound):
            sound[path] = space[path]
    written = {path: sound[path] for path in space if path in sound}
    yield from find_in_combinations(recipe, search, written, complete=len(sound) == len(space))


def _mode_belongs_to_a_metric(search: Search) -> Iterator[Finding]:
    if search.mode is not None and search.metric is None:
        yield Finding(
            ("search.mode", "search.metric"),
            f"`search.mode` is `{search.mode}`, but `search.metric` does not say of which metric",
            "name the metric, or remove `search.mode`: every metric knows whether high or low is good",
        )


def _the_best_are_among_the_trials(search: Search) -> Iterator[Finding]:
    if search.reseed_top > search.trials:
        yield Finding(
            ("search.reseed_top", "search.trials"),
            f"`search.reseed_top` is {search.reseed_top}, but there are at most {search.trials} trials",
            f"set `search.reseed_top` to {search.trials} or less",
        )


def _something_varies(search: Search) -> Iterator[Finding]:
    if search.space is not None and not search.space:
        yield Finding(
            ("search.space",),
            "`search.space` is empty, so there is nothing to search",
            "name places with their values, or remove the key for freeze depth and learning rate",
        )


def _pbt_has_a_population(search: Search) -> Iterator[Finding]:
    if search.scheduler != "pbt":
        return
    if search.trials < 2:
        what = "`search.trials` is 1, but `pbt` lets trials learn from each other"
        yield Finding(("search.trials", "search.scheduler"), what, "set `search.trials` to 8 or so")
    if search.algorithm == "tpe":
        yield Finding(
            ("search.algorithm", "search.scheduler"),
            "`search.scheduler` `pbt` changes values in the middle of a trial, so `tpe` would learn from wrong ones",
            "set `search.algorithm` to random, or `search.scheduler` to asha",
        )


def _place_exists(path: str) -> Iterator[Finding]:
    place = f"search.space.{path}"
    shape = shape_of(Recipe)
    node = shape.find(path.split("."))
    fixed = next((why for other, why in _FIXED.items() if is_within(path, other)), None)
    if node is None:
        yield Finding((place,), f"`{path}` is not a key of a recipe", _guess_place(path))
    elif fixed is not None:
        yield Finding((place,), f"`{path}` cannot vary between trials: {fixed}", "take it out of `search.space`")
    elif shape.keys(path.split(".")) and {"type": "null"} not in shape.options(node):
        names = ", ".join(f"`{path}.{key}`" for key in shape.keys(path.split(".")))
        yield Finding((place,), f"`{path}` is a whole section", f"search values in it: {names}")


def _item_exists(recipe: Recipe, path: str) -> Iterator[Finding]:
    here: Any = recipe.model_dump(exclude={"search"})
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if isinstance(here, list) and int(part) >= len(here):
            place = ".".join(parts[:depth])
            what = f"`{path}` is item {part} of `{place}`, which has {len(here)} items"
            yield Finding((f"search.space.{path}", place), what, f"number them from 0, or add the item to `{place}`")
            return
        here = value_at(here, (part,))


def _guess_place(path: str) -> str:
    shape = shape_of(Recipe)
    places = [dotted((*section, key)) for section in shape.sections() for key in shape.keys(section)]
    same_end = [place for place in places if place.rpartition(".")[2] == path.rpartition(".")[2]]
    close = nearest(path, same_end) or next(iter(same_end), None) or nearest(path, places)
    return (
        f"did you mean `{close}`?" if close else "`orchestrator schema` lists all; write one as `train.learning_rate`"
    )


def _seeds_vary_in_one_way(_: Recipe, search: Search, path: str, __: Cases) -> Iterator[Finding]:
    if path == "train.seed" and search.reseed_top:
        yield Finding(
            ("search.space.train.seed", "search.reseed_top"),
            "`train.seed` is searched, and `search.reseed_top` gives the best trials other seeds too",
            "take `train.seed` out of the space, or set `search.reseed_top` to 0",
        )


def _only_rates_change_midway(_: Recipe, search: Search, path: str, space: Cases) -> Iterator[Finding]:
    if search.scheduler != "pbt":
        return
    place, cases = f"search.space.{path}", space[path]
    if path not in _MAY_CHANGE_MIDWAY:
        yield Finding(
            (place, "search.scheduler"),
            f"`{path}` cannot change in the middle of a trial, which the scheduler `pbt` does",
            f"take it out (`pbt` takes {', '.join(f'`{name}`' for name in _MAY_CHANGE_MIDWAY)}), or use another "
            "`search.scheduler`",
        )
    if any(depends_on(path, cases, other) for other in space):
        what = f"the values of `{path}` depend on what else is searched, which the scheduler `pbt` changes midway"
        yield Finding((place, "search.scheduler"), what, "remove `when`, or use another `search.scheduler`")


def _cases_are_reached(_: Recipe, search: Search, path: str, space: Cases) -> Iterator[Finding]:
    cases = space[path]
    for number, case in enumerate(cases[:-1]):
        if case.when is None:
            what = f"this case of `{path}` always applies, so those after it never do"
            yield Finding((place_of(search, path, number),), what, "give it a `when`, or put it last")


def _each_case_has_one_kind_of_values(recipe: Recipe, search: Search, path: str, space: Cases) -> Iterator[Finding]:
    for number, case in enumerate(space[path]):
        place = place_of(search, path, number)
        kinds = [kind for kind in KINDS if getattr(case, kind) is not None]
        if not kinds:
            what = f"`{place}` says no values"
            remedy = "add `choice: [...]`, `uniform: [low, high]`, `loguniform: [low, high]` or `integers: [low, high]`"
            yield Finding((place,), what, remedy)
        elif len(kinds) > 1:
            what = f"`{place}` has {' and '.join(f'`{kind}`' for kind in kinds)}, must have one of them"
            yield Finding((place,), what, "keep one; for several, write a list of cases with `when`")
        elif case.choice == "every":
            yield from _find_in_every(path, space, place)
        elif case.choice is not None:
            yield from _find_in_choice(recipe, path, case.choice, place)
        else:
            yield from _find_in_range(recipe, path, kinds[0], getattr(case, kinds[0]), place)


def _find_in_every(path: str, space: Cases, place: str) -> Iterator[Finding]:
    if path != "transfer.freeze":
        what = f"`every` is every freeze boundary of the model, which `{path}` does not have"
        yield Finding((f"{place}.choice",), what, "list the values, as `[1, 2]`")
    elif "source.model" in space:
        yield Finding(
            (f"{place}.choice", "search.space.source.model"),
            "`every` is every freeze boundary of one model, but `source.model` is searched too",
            "write depths that fit each model: `[0, 25%, 50%, 75%, all]`",
        )


def _find_in_choice(recipe: Recipe, path: str, values: Iterable[Any], place: str) -> Iterator[Finding]:
    seen: set[str] = set()
    for index, value in enumerate(values):
        here = f"{place}.choice.{index}"
        if write_value(value) in seen:
            yield Finding((here,), f"`{path}` may be {write_value(value)} twice", "keep one of the two")
        seen.add(write_value(value))
        yield from _find_in_value(recipe, path, value, here)


def _find_in_range(recipe: Recipe, path: str, kind: str, ends: Sequence[float], place: str) -> Iterator[Finding]:
    (low, high), here, written = ends, f"{place}.{kind}", write_value(list(ends))
    if low == high:
        yield Finding((here,), f"`{here}` is {written}, a single value", f"write `choice: [{write_value(low)}]`")
    elif low > high:
        yield Finding((here,), f"`{here}` is {written}, from high to low", f"write {write_value([high, low])}")
    shape = shape_of(Recipe)
    types = {option.get("type") for option in shape.options(shape.find(path.split(".")) or {})}
    remedy = "change it"
    if not types & {"integer", "number", None}:
        remedy = "list its values with `choice`"
    elif kind != "integers" and "number" not in types and all(float(end).is_integer() for end in ends):
        remedy = f"for whole numbers write `integers: {written}`"
    found = [
        Finding(finding.paths, finding.what, remedy)
        for index, end in enumerate(ends)
        for finding in _find_in_value(recipe, path, end, f"{here}.{index}")
    ]
    yield from found[:1]


def _find_in_value(recipe: Recipe, path: str, value: Any, place: str, partly: bool = False) -> Iterator[Finding]:
    """Return the mistakes of a value for a path; with `partly`, a mapping may lack keys."""
    data = put(recipe.model_dump(exclude={"search"}), path, value)
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        shape = shape_of(Recipe)
        for mistake in find_mistakes(error, data, shape):
            # Values that are missing around the path may come from another path of the space.
            if is_within(dotted(mistake.path), path) and not (partly and mistake.kind == "missing"):
                yield Finding((place,), *explain_value(mistake, data, shape))


def _conditions_can_be_met(recipe: Recipe, path: str, space: Cases) -> Iterator[Finding]:
    for number, case in enumerate(space[path]):
        place = f"{place_of(recipe.search, path, number)}.when"
        if case.when is not None and not case.when:
            yield Finding((place,), f"`{place}` names no condition", "remove it, or add one: `{transfer.freeze: all}`")
        for condition, wanted in (case.when or {}).items():
            here = f"{place}.{condition}"
            if shape_of(Recipe).find(condition.split(".")) is None:
                yield Finding((here,), f"`{condition}` is not a key of a recipe", _guess_place(condition))
                continue
            yield from _find_in_condition(path, {condition: wanted}, space, here)
            if wanted == []:
                yield Finding((here,), f"`{here}` names no value", "name one, or a list of several")
            for value in wanted if isinstance(wanted, list) else [wanted]:
                yield from _find_in_value(recipe, condition, value, here, partly=True)


def _find_in_condition(path: str, when: dict[str, Any], space: Cases, place: str) -> Iterator[Finding]:
    for said in paths_in(when):
        if is_within(said, path):
            what = f"the `when` of `{path}` asks for the value that it decides about"
            yield Finding((place,), what, "ask for another place's value, or remove it")
        ranged = [other for other in space if is_within(said, other) and any(c.choice is None for c in space[other])]
        if ranged and not is_within(said, path):
            what = f"the `when` of `{path}` asks for a single value of `{ranged[0]}`, which is drawn from a range"
            yield Finding((place,), what, f"give `{ranged[0]}` a `choice`, or remove the condition")


_SETTINGS = (
    _mode_belongs_to_a_metric,
    _the_best_are_among_the_trials,
    _something_varies,
    _pbt_has_a_population,
)
_PLACES = (
    _seeds_vary_in_one_way,
    _only_rates_change_midway,
    _cases_are_reached,
    _each_case_has_one_kind_of_values,
)
