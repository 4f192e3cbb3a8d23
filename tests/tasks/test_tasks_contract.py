"""What holds for every task of the package, found as the program finds them; a new file is tested without a change."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import orchestrator.tasks
from orchestrator.data import Column
from orchestrator.errors import RecipeError
from orchestrator.recipe import parse_recipe
from orchestrator.recipe.reference import section_schema
from orchestrator.recipe.schema import Section
from orchestrator.tasks import Task, find_task, read_options, task_names

every_task = pytest.mark.parametrize("name", task_names())
RECIPE = "name: x\nsource: {{model: some/model}}\ntarget:\n  task: {task}\n  data: x.jsonl\n  options: {{{options}}}\n"


def test_every_file_of_the_package_is_a_task() -> None:
    # Other packages may be installed that add theirs as entry points.
    files = {path.stem.replace("_", "-") for path in Path(orchestrator.tasks.__file__).parent.glob("*.py")}
    assert set(task_names()) >= files - {"--init--", "base"}
    assert "text-classification" in task_names()


@every_task
def test_a_task_has_its_file_name_and_says_everything_that_a_task_must(name: str) -> None:
    task = find_task(name)
    assert issubclass(task, Task)
    assert task.name == name
    assert not inspect.isabstract(task)
    assert task.__doc__


@every_task
def test_options_are_a_section_with_a_default_and_a_description_for_each(name: str) -> None:
    options = find_task(name).Options
    assert issubclass(options, Section)
    options()
    for field in section_schema(options, name)["properties"].values():
        assert field["description"]


@every_task
def test_columns_have_names_of_their_own(name: str) -> None:
    columns = find_task(name).columns(find_task(name).Options())
    assert all(isinstance(column, Column) for column in columns)
    names = [known for column in columns for known in (column.name, *column.aliases)]
    assert len(names) == len(set(names)) > 0


@every_task
def test_transformers_has_the_classes_of_the_model_and_of_the_processor(name: str) -> None:
    import transformers

    assert hasattr(transformers, find_task(name).auto_class)
    assert hasattr(transformers, find_task(name).processor_class)


@every_task
def test_options_are_read_from_the_recipe_and_wrong_ones_refused_at_their_line(name: str) -> None:
    task, options = read_options(parse_recipe(RECIPE.format(task=name, options="")))
    assert (task, options) == (find_task(name), task.Options())
    with pytest.raises(RecipeError) as refused:
        read_options(parse_recipe(RECIPE.format(task=name, options="no_such_option: 1")))
    (problem,) = refused.value.problems
    assert "no_such_option" in problem.what
    assert problem.where == "line 6 (target.options.no_such_option)"


def test_a_misspelt_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as refused:
        find_task("text-clasification", "recipe.yaml:5")
    (problem,) = refused.value.problems
    assert problem.where == "recipe.yaml:5"
    assert "did you mean text-classification?" in str(problem.remedy)
