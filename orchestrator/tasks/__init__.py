"""One file per task. `text-classification` is `text_classification.py`; its class is found by that name.

What several tasks need is in `shared/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.recipe.load import check_section
from orchestrator.tasks.base import Encoded, Task

__all__ = ["Encoded", "Task", "find_task", "read_options", "task_names"]


def task_names() -> list[str]:
    """Names of all tasks, from the files of this package."""
    files = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name.replace("_", "-") for name in files if name != "base")


def find_task(name: str, where: str | None = None) -> type[Task]:
    """The class of the task with this name; raises RecipeError with the nearest name."""
    if name not in task_names():
        close = nearest(name, task_names())
        remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(task_names())}"
        raise RecipeError(Problem(f"there is no task '{name}'", where, remedy))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    task: type[Task] = module.TASK
    return task


def read_options(recipe: Recipe) -> tuple[type[Task], Any]:
    """The recipe's task and its options, checked; raises RecipeError with every wrong option."""
    task = find_task(recipe.target.task, recipe.origin.where("target.task"))
    options = check_section(task.Options, recipe.target.options, "target.options", recipe.origin)
    return task, task.locate(options, recipe.origin.folder)
