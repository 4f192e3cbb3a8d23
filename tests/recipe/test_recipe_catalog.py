"""The recipes that ship: each loads, is found by its names, and says what it is for."""

from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipe import dump_recipe, find_recipe, load_recipe, parse_recipe, resolve_path, shipped_recipes

SHIPPED = shipped_recipes()
FIRST = "text-classification/minilm-to-support-intent"


@pytest.mark.parametrize("name", [recipe.name for recipe in SHIPPED])
def test_every_shipped_recipe_loads_by_name_and_says_what_it_is_for(name: str) -> None:
    (shipped,) = [recipe for recipe in SHIPPED if recipe.name == name]
    recipe = load_recipe(name)
    assert recipe.target.task == shipped.path.parent.name
    assert recipe.name == shipped.path.stem.replace(".", "-")
    assert len(shipped.summary) > 40
    assert shipped.summary.endswith(".")
    assert parse_recipe(dump_recipe(recipe)).train == recipe.train


@pytest.mark.parametrize("name", [recipe.name for recipe in SHIPPED])
def test_local_data_of_shipped_recipes_ship_too(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe.target.data, str) or recipe.target.data.path is not None
    text = recipe.target.data if isinstance(recipe.target.data, str) else recipe.target.data.path
    assert text is not None
    path = resolve_path(text, recipe.origin)
    assert path is None or path.is_dir()


def test_the_first_recipe_needs_no_network() -> None:
    recipe = load_recipe(FIRST)
    assert recipe.source.model.startswith("package:")
    assert isinstance(recipe.target.data, str)
    assert resolve_path(recipe.target.data, recipe.origin) is not None


@pytest.mark.parametrize("name", [FIRST, f"{FIRST}.yaml", "minilm-to-support-intent", "minilm-to-support-intent.yaml"])
def test_a_shipped_recipe_is_found_by_its_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).name == "minilm-to-support-intent.yaml"


def test_a_file_goes_before_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-to-support-intent.yaml").write_text("name: mine")
    assert find_recipe("minilm-to-support-intent.yaml") == tmp_path / "minilm-to-support-intent.yaml"


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("minilm-to-suport-intent", "there is no file and no recipe called", f"did you mean `{FIRST}`?"),
        ("zzz", "there is no file and no recipe called 'zzz'", "`orchestrator recipes` lists"),
        ("mine.yml", "there is no file 'mine.yml'", "did you mean `mine.yaml`?"),
        (".", "is a folder", "`mine.yaml`"),
        ("a\0b", "there is no file and no recipe called", "`orchestrator recipes` lists"),
        ("", "there is no file and no recipe called", "`orchestrator recipes` lists"),
    ],
)
def test_a_name_that_leads_nowhere_gets_the_nearest_one(
    name: str, what: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine")
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    (problem,) = caught.value.problems
    assert what in problem.what
    assert problem.remedy is not None
    assert remedy in problem.remedy
