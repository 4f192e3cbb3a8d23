"""Tasks, one file each: `text-classification` is `text_classification.py`, whose TASK is its class. See README.md.

Other packages add theirs as entry points of the group `orchestrator.tasks`. What several tasks share is in `bases/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.recipe.load import check_section
from orchestrator.tasks.base import Encoded, Task

__all__ = ["ENTRY_POINTS", "Encoded", "Task", "check_packages", "find_task", "read_options", "task_names"]

ENTRY_POINTS = "orchestrator.tasks"
"""The group of entry points by which other packages add tasks: `name = "package.module:TaskClass"`."""


def task_names() -> list[str]:
    """Return the names of all tasks: of this package's files, and of other packages' entry points."""
    return sorted({*_own_names(), *entry_points(group=ENTRY_POINTS).names})


def find_task(name: str, where: str | None = None) -> type[Task]:
    """Return the class of the task with this name; raises RecipeError with the nearest name.

    A task of this package goes before another package's of the same name.
    """
    if name in _own_names():
        own: type[Task] = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TASK
        return own
    for entry_point in entry_points(group=ENTRY_POINTS, name=name):
        added: type[Task] = entry_point.load()
        return added
    close = nearest(name, task_names())
    remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(task_names())}"
    raise RecipeError(Problem(f"there is no task '{name}'", where, remedy))


def read_options(recipe: Recipe) -> tuple[type[Task], Any]:
    """Return the recipe's task and its options, checked; raises RecipeError with every wrong option."""
    task = find_task(recipe.target.task, recipe.origin.where("target.task"))
    options = check_section(task.Options, recipe.target.options, "target.options", recipe.origin)
    return task, task.locate(options, recipe.origin.folder)


def check_packages(task: type[Task], options: Any, where: str | None = None) -> list[Problem]:
    """Return a problem for each package that the options need and that is not installed."""
    missing = [item for item in sorted(task.packages(options).items()) if find_spec(item[0]) is None]
    return [
        Problem(f"the package {package} is not installed", where, f"pip install 'transfer-orchestrator[{extra}]'")
        for package, extra in missing
    ]


def _own_names() -> list[str]:
    files = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return [name.replace("_", "-") for name in files if name != "base"]
