"""How knowledge moves from source to target: one file a method, found by its name. README.md says how to add one."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from importlib.metadata import entry_points

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.recipe.load import check_section
from orchestrator.transfer.base import Added, LossContext, Method, Model, TrainedPart

__all__ = [
    "Added",
    "LossContext",
    "Method",
    "Model",
    "TrainedPart",
    "find_method",
    "method_names",
    "methods_of",
    "read_methods",
]

GROUP = "orchestrator.methods"
"""Entry points of other packages: the name of a method, and its class."""


def method_names() -> list[str]:
    """Return the names of all methods: of the files of this package, and of other packages' entry points."""
    return sorted({*_own_names(), *entry_points(group=GROUP).names})


def _own_names() -> set[str]:
    files = {module.name for module in pkgutil.iter_modules(__path__)}
    return {name.replace("_", "-") for name in files - {"base"}}


def find_method(name: str, where: str | None = None) -> type[Method]:
    """Return the class of the method with this name; raises RecipeError with the nearest name."""
    method: type[Method]
    if name in _own_names():
        method = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
        return method
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in others:
        known = method_names()
        close = nearest(name, known)
        remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(known)}"
        raise RecipeError(Problem(f"there is no method '{name}'", where, remedy))
    method = others[name].load()
    return method


def read_methods(recipe: Recipe) -> list[Method]:
    """Return the recipe's methods, checked against each other and against the rest of the recipe.

    Raises:
        RecipeError: with everything that is wrong with them.
    """
    methods, problems = _open_methods(recipe)
    for method in methods:
        problems += method.check(recipe)
    problems += [*_find_repeated(recipe, methods), *_find_unreachable(recipe, methods)]
    if problems:
        raise RecipeError(problems)
    return methods


def methods_of(recipe: Recipe) -> list[Method]:
    """Return the methods of a recipe that was checked before, or of one of its phases.

    Those that keys of `transfer` imply come first, then the listed ones in their order.
    """
    methods, problems = _open_methods(recipe)
    if problems:
        raise RecipeError(problems)
    return methods


def _open_methods(recipe: Recipe) -> tuple[list[Method], list[Problem]]:
    """Return the methods whose options are right, and what is wrong with the options of others."""
    methods: list[Method] = []
    problems: list[Problem] = []
    for name in sorted(_own_names()):  # Other packages have no keys of their own in a recipe.
        cls = find_method(name)
        options = cls.implied(recipe.transfer)
        if options is not None:
            methods.append(cls(options, "transfer"))
    for number, settings in enumerate(recipe.transfer.methods):
        place = f"transfer.methods.{number}"
        try:
            cls = find_method(settings.name, recipe.origin.where(f"{place}.name"))
            methods.append(cls(check_section(cls.Options, settings.options, place, recipe.origin), place))
        except RecipeError as error:
            problems.extend(error.problems)
    return methods, problems


def _find_repeated(recipe: Recipe, methods: list[Method]) -> list[Problem]:
    """Find methods that the recipe has more than once, and several that decide about phases."""
    counts = Counter(method.name for method in methods)
    problems = [
        Problem(f"the method {method.name!r} is used twice", recipe.origin.where(method.place), "keep one of the two")
        for method in methods
        if counts.pop(method.name, 1) > 1
    ]
    deciding = [method.name for method in methods if method.decides_phases()]
    deciding += ["transfer.phases"] if recipe.transfer.phases is not None else []
    if len(deciding) > 1:
        what = f"{' and '.join(f'`{name}`' for name in deciding)} each say which phases there are"
        problems.append(Problem(what, recipe.origin.where("transfer.methods"), "keep one of them"))
    return problems


def _find_unreachable(recipe: Recipe, methods: list[Method]) -> list[Problem]:
    """Find methods that add to gradients where DeepSpeed does not let them."""
    scale = recipe.scale
    changing = [method for method in methods if method.changes_gradients()]
    settings = {
        "scale.zero_stage": (
            scale.zero_stage == 3,
            "shards the weights, of which a worker has no whole one",
            "2 or less",
        ),
        "scale.offload": (scale.offload != "none", "measures gradients before anything can be added to them", "none"),
        "scale.fit": (scale.fit, "may choose stage 3 or offload", "false"),
    }
    return [
        Problem(
            f"the method {method.name!r} adds to gradients, but `{place}` {why}",
            recipe.origin.where(method.place),
            f"set `{place}` to {remedy}, or remove the method",
        )
        for method in changing
        for place, (holds, why, remedy) in settings.items()
        if holds
    ]
