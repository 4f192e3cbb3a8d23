"""A run is gone on with on what it was begun with alone, also where its own records are damaged or missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import load_recipe, train
from orchestrator.errors import InputError
from orchestrator.inference.predict import evaluate
from orchestrator.recipe import Recipe
from orchestrator.runs.checkpoint import COMMITTED, find_damage, hash_file
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.identity import IDENTITY, MANIFEST, last_attempt

STEPS = ["train.steps=12", "train.save_every=4", "train.evaluate_every=4", "train.log_every=1", "train.keep=3"]


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, write_toy: Callable[..., Path], tiny_bert: Path, small_data: Path
) -> Path:
    """A folder with data, recipe.yaml, and a finished run."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(small_data, folder / "data")
    recipe = write_toy(folder / "recipe.yaml", tiny_bert, folder / "data")
    train(load_recipe(recipe, STEPS), folder / "run")
    return folder


@pytest.fixture
def interrupted(project: Path, tmp_path: Path) -> RunDirectory:
    """That run as it was after step 9, with checkpoints of the steps 4 and 8."""
    directory = RunDirectory(tmp_path / "run")
    shutil.copytree(project / "run", directory.root)
    for name in ("result.json", "predictions.parquet", "report.html"):
        (directory.root / name).unlink()
    shutil.rmtree(directory.model)
    shutil.rmtree(directory.checkpoints / "step-00000012")
    directory.forget_metrics_after(9)
    directory.update_record(status="running")
    return directory


def recipe_of(project: Path, *overrides: str) -> Recipe:
    return load_recipe(project / "recipe.yaml", [*STEPS, *overrides])


def losses(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in RunDirectory(directory).read_metrics() if row["split"] == "train"}


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_older(directory: RunDirectory) -> None:
    """Leave the checkpoints as versions wrote them that did not keep the identity."""
    for folder in directory.checkpoints.glob("step-*"):
        (folder / IDENTITY).unlink()
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["files"][IDENTITY]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        (folder / COMMITTED).write_text(hash_file(folder / MANIFEST) + "\n")
        assert find_damage(folder) is None


@pytest.mark.parametrize("how", ["torn", "missing"])
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_without_a_record_a_changed_recipe_and_changed_data_are_refused_all_the_same(
    name: str, how: str, project: Path, interrupted: RunDirectory, small_data: Path, tmp_path: Path
) -> None:
    damage(interrupted.root / name, how)
    for path in small_data.iterdir():
        shutil.copy(path, tmp_path)
    lines = (small_data / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    changed = recipe_of(project, "train.learning_rate=0.5", f"target.data={tmp_path}")
    with pytest.raises(InputError) as refused:
        train(changed, interrupted.root)
    text = str(refused.value)
    assert "has train.learning_rate: 0.001, now it is 0.5" in text
    assert "the train data changed since" in text
    assert "--fresh" in text
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize("how", ["torn", "missing"])
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_without_a_record_the_same_run_goes_on(name: str, how: str, project: Path, interrupted: RunDirectory) -> None:
    damage(interrupted.root / name, how)
    run = train(recipe_of(project), interrupted.root)
    assert run.resumed
    assert losses(run.directory) == losses(project / "run")
    record = json.loads((run.directory / "run.json").read_text())
    assert (record["status"], record["attempt"]) == ("finished", 2)
    assert load_recipe(run.directory / "recipe.yaml").name == "toy"
    told = ["run.json was damaged or missing: its earlier entries are lost"] if name == "run.json" else []
    assert list(run.notes) == told


def test_checkpoints_of_before_are_held_against_the_record(project: Path, interrupted: RunDirectory) -> None:
    make_older(interrupted)
    with pytest.raises(InputError, match=r"has train.seed: 0, now it is 1"):
        train(recipe_of(project, "train.seed=1"), interrupted.root)
    run = train(recipe_of(project), interrupted.root)
    assert losses(run.directory) == losses(project / "run")
    assert run.notes == []


@pytest.mark.parametrize("how", ["torn", "missing"])
def test_what_no_record_and_no_checkpoint_tells_is_said_not_to_be_checked(
    how: str, project: Path, interrupted: RunDirectory
) -> None:
    make_older(interrupted)
    damage(interrupted.record, how)
    damage(interrupted.recipe, how)
    run = train(recipe_of(project), interrupted.root)
    assert losses(run.directory) == losses(project / "run")
    assert [note for note in run.notes if "could not be checked" in note] == [
        "without recipe.yaml, whether the recipe is as before could not be checked",
        "without run.json, whether source and data are as before could not be checked",
    ]


def test_an_identity_whose_bytes_were_changed_refuses_nothing(project: Path, interrupted: RunDirectory) -> None:
    newest = interrupted.checkpoints / "step-00000008" / IDENTITY
    newest.write_text(newest.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    run = train(recipe_of(project), interrupted.root)
    assert losses(run.directory) == losses(project / "run")
    assert any("step-00000008 is damaged (identity.json" in note for note in run.notes)


def test_attempts_are_counted_on_from_the_checkpoints(project: Path, interrupted: RunDirectory) -> None:
    newest = interrupted.checkpoints / "step-00000008"
    identity = json.dumps({**json.loads((newest / IDENTITY).read_text()), "attempt": 6})
    (newest / IDENTITY).write_text(identity)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][IDENTITY] = {
        "bytes": len(identity.encode()),
        "sha256": hashlib.sha256(identity.encode()).hexdigest(),
    }
    (newest / MANIFEST).write_text(json.dumps(manifest))
    (newest / COMMITTED).write_text(hash_file(newest / MANIFEST) + "\n")
    interrupted.record.unlink()
    assert last_attempt(interrupted) == 6


@pytest.mark.parametrize("how", ["torn", "missing"])
def test_rows_of_metrics_that_are_lost_are_told_once(how: str, project: Path, interrupted: RunDirectory) -> None:
    lines = interrupted.metrics.read_text().splitlines(keepends=True)
    if how == "missing":
        interrupted.metrics.unlink()
    else:
        lines[3] = lines[3][:20] + "\n"  # Of step 4. That of step 9 is taken again, so it is not lost.
        interrupted.metrics.write_text("".join(lines)[:-5])
    run = train(recipe_of(project), interrupted.root)
    expected = losses(project / "run")
    kept = [9, 10, 11, 12] if how == "missing" else [1, 2, 3, *range(5, 13)]
    assert losses(run.directory) == {step: expected[step] for step in kept}
    # Eight steps and two evaluations.
    what = "10 rows" if how == "missing" else "1 row"
    verb = "were" if how == "missing" else "was"
    (note,) = run.notes
    assert note.startswith(f"{what} of metrics.jsonl up to step 8 {verb} damaged or missing")
    run.directory.joinpath("result.json").unlink()
    assert train(recipe_of(project), interrupted.root).notes == []


def test_whole_records_lead_to_no_notes(project: Path, interrupted: RunDirectory) -> None:
    assert train(recipe_of(project), interrupted.root).notes == []


@pytest.mark.parametrize("name", ["result.json", "model/transfer.json"])
def test_a_damaged_end_of_a_run_is_written_again_from_its_last_checkpoint(
    name: str, project: Path, tmp_path: Path
) -> None:
    shutil.copytree(project / "run", tmp_path / "run")
    whole = (tmp_path / "run" / name).read_bytes()
    damage(tmp_path / "run" / name, "torn")
    if name.startswith("model"):
        with pytest.raises(
            InputError, match=r"transfer.json: the file is damaged[\s\S]*run the training command again"
        ):
            evaluate(tmp_path / "run", None, "test")
    run = train(recipe_of(project), tmp_path / "run")
    again = json.loads((tmp_path / "run" / name).read_text())
    for found in (before := json.loads(whole), again):
        for clock in ("seconds", "seconds_exporting", "peak_bytes"):
            found.pop(clock, None)
    assert again == before
    assert run.result["status"] == "finished"
    evaluate(tmp_path / "run", None, "test")


def test_a_finished_run_without_its_record_is_told_only_to_the_same_recipe(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "run", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")  # Taken away, to save room: that is no damage.
    assert train(recipe_of(project), tmp_path / "run").resumed
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(InputError, match=r"train.seed"):
        train(recipe_of(project, "train.seed=1"), tmp_path / "run")
