"""Which directories a training goes into: an empty one, or its own; never one that holds something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import load_recipe, search, train
from orchestrator.errors import InputError
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.occupancy import find_kind
from orchestrator.search.records import SearchDirectory

WriteRecipe = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("start", [train, search])
def test_a_folder_with_other_files_is_refused_and_left_as_it_was(
    start: Callable[..., object], fresh: bool, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"do not belong to a \w+: thesis.txt[\s\S]*--output") as refused:
        start(load_recipe(write_recipe()), folder, fresh=fresh)
    assert refused.value.exit_code == 2
    assert contents(folder) == {"thesis.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["mine"]


def test_the_folders_that_a_recipe_reads_are_refused_and_left_as_they_were(
    write_recipe: WriteRecipe, small_data: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    for name, folder in (("data", small_data), ("model", tiny_bert)):
        shutil.copytree(folder, tmp_path / "project" / name)
    named = {"source": {"model": "./model"}, "target": {"data": "./data"}}
    # Under this name a run, too, keeps its recipe.
    recipe = load_recipe(write_recipe("project/recipe.yaml", **named))
    before = contents(tmp_path)
    for folder, role in (("project", "data and source model"), ("project/data", "data"), ("project/model", "source")):
        for start in (train, search):
            with pytest.raises(InputError, match=rf"{role}[\s\S]*--output"):
                start(recipe, tmp_path / folder)
    assert contents(tmp_path) == before


def test_a_training_does_not_go_into_a_search_nor_a_search_into_a_training(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(name="toy-search"), ["train.steps=1"])
    run = train(recipe).directory
    assert find_kind(RunDirectory(run)) == "run"
    before = contents(run)
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"holds a training, and a search needs[\s\S]*--output"):
            search(recipe, fresh=fresh)
    assert contents(run) == before
    shutil.rmtree(run)
    (run / "trials").mkdir(parents=True)
    (run / "search.json").write_text('{"status": "fin')  # Torn, but it says what the directory is.
    (run / "result.json").write_text("{}")
    assert find_kind(RunDirectory(run)) == "search"
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"holds a search, and a training needs[\s\S]*--output"):
            train(recipe, fresh=fresh)


def test_a_run_is_known_also_without_its_record(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(), ["train.steps=2"])
    train(recipe, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "my-notes.txt").write_text("of the user")
    assert train(recipe, tmp_path / "run").resumed
    again = train(recipe, tmp_path / "run", fresh=True)
    assert (tmp_path / "run.old-1" / "my-notes.txt").exists()
    assert not again.resumed


def test_what_a_killed_command_made_before_its_first_record_is_no_obstacle(tmp_path: Path) -> None:
    for directory in (RunDirectory(tmp_path / "run"), SearchDirectory(tmp_path / "search")):
        directory.create()
        (directory.root / ".lock").touch()
        assert find_kind(directory) is None
        assert not directory.names() - {"checkpoints", "logs", "trials"}


def test_a_source_that_starting_over_would_move_away_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    first = train(load_recipe(write_recipe(), ["train.steps=1"]))
    onward = load_recipe(write_recipe("onward.yaml", source={"model": str(first.directory / "model")}))
    with pytest.raises(InputError, match="--fresh"):
        train(onward)
    with pytest.raises(InputError, match=r"reads its source model from .*--fresh would move away\n.*--output"):
        train(onward, fresh=True)
    assert (first.directory / "model" / "model.safetensors").exists()


def test_a_search_in_an_object_store_is_refused_wherever_it_is_named(write_recipe: WriteRecipe) -> None:
    with pytest.raises(InputError, match=r"--output: a search needs a folder, and s3://bucket/x is a URL"):
        search(load_recipe(write_recipe()), "s3://bucket/x")
