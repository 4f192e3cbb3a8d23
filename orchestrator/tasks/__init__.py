"""One file per task. `text-classification` is `text_classification.py`; its class is found by that name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Encoded, Task

__all__ = ["Encoded", "Task", "find_task", "read_options", "task_names"]


def task_names() -> list[str]:
    """Names of all tasks, from the files of this package."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name != "base")


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
    try:
        return task, task.Options.model_validate(recipe.target.options)
    except ValidationError as error:
        raise RecipeError(_explain(detail, task, recipe) for detail in error.errors()) from None


def _explain(detail: Any, task: type[Task], recipe: Recipe) -> Problem:
    name = str(detail["loc"][0])
    where = recipe.origin.where(f"target.options.{name}")
    valid = list(task.Options.model_fields)
    if detail["type"] == "extra_forbidden":
        close = nearest(name, valid)
        remedy = f"did you mean {close}?" if close else f"its options are: {', '.join(valid)}"
        return Problem(f"task {task.name} has no option '{name}'", where, remedy)
    about = task.Options.model_fields[name].description if name in task.Options.model_fields else None
    return Problem(f"{name} is {detail['input']!r}: {detail['msg'].lower()}", where, about)
