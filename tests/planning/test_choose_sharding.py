"""`zero_stage: auto`: a plan chooses how a training is spread, so that it fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from orchestrator import load_recipe, train
from orchestrator.cli.main import main
from orchestrator.planning import Machine
from orchestrator.planning import choose_sharding as fitting
from orchestrator.planning.plan import plan

WriteRecipe = Callable[..., Path]
UseMachine = Callable[[int], None]
LARGE = 2**40


def machine_from_nodes(memory: int) -> Machine:
    """A machine by its memory; with a GPU, since a plan without one begins with what this process holds, and that
    changes from test to test."""
    return Machine("a small machine", 1, 1, memory, 1e12, 1e9, 1e9, is_gpu=True, has_bf16=False)


@pytest.fixture
def use_machine(monkeypatch: pytest.MonkeyPatch) -> UseMachine:
    def use(memory: int) -> None:
        monkeypatch.setattr(fitting, "local_machine", lambda recipe: machine_from_nodes(memory))

    return use


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Path:
    return write_recipe(train={"steps": 4, "epochs": None, "save_every": 2}, scale={"zero_stage": "auto"})


def needed(recipe: Path) -> int:
    """Bytes of memory that the training takes as it stands, and a plan's reserve."""
    return int(plan(load_recipe(recipe), machine_from_nodes(LARGE)).chosen.memory.total / 0.95)


def test_what_fits_stays_as_it_is(recipe: Path, use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(LARGE)
    train(load_recipe(recipe), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chosen"] == {}


def test_what_does_not_fit_is_cut_into_smaller_passes_and_goes_on_so(
    recipe: Path, use_machine: UseMachine, tmp_path: Path
) -> None:
    use_machine(needed(recipe) - 10_000)
    run = train(load_recipe(recipe), tmp_path / "run")
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]
    assert chosen["train.micro_batch_size"] < 8
    assert f"chosen so that it fits: train.micro_batch_size={chosen['train.micro_batch_size']}" in run.notes
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["train"]["micro_batch_size"] == chosen["train.micro_batch_size"]
    (tmp_path / "run" / "result.json").unlink()
    use_machine(LARGE)
    assert train(load_recipe(recipe), tmp_path / "run").resumed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chosen"] == chosen


def test_what_fits_in_no_way_is_refused_with_what_it_needs(
    recipe: Path, use_machine: UseMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_machine(10**6)
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 3
    told = capsys.readouterr().err
    assert "a worker needs" in told
    assert "on a small machine" in told
    assert not (tmp_path / "run" / "run.json").exists()
