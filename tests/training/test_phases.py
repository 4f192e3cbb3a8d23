"""Phases: trainings one after the other over one sequence of steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from orchestrator import load_recipe, train
from orchestrator.errors import InputError
from orchestrator.launch.train import check
from orchestrator.runs.directory import RunDirectory
from orchestrator.training.hooks import Saver, TrainingState
from orchestrator.training.phases import find_phases
from orchestrator.training.prepare import prepare
from orchestrator.training.session import CHANGED_EARLIER, open_session
from orchestrator.training.worker import evaluations, make_saver, resume

WriteRecipe = Callable[..., Path]
PROBE_THEN_TUNE = [
    {"name": "probe", "freeze": "all", "epochs": 1, "learning_rate": 1.0e-2},
    {"name": "tune", "freeze": 1, "epochs": 2},
]
EVERY_STEP = {"epochs": 3, "log_every": 1, "keep": 100, "global_batch_size": 12}
"""The toy's 60 examples are 5 steps an epoch."""


def rows_of(run: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if row["split"] == split]


def weights_of(run: Path) -> dict[str, Any]:
    return dict(load_file(run / "model" / "model.safetensors"))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_toy: WriteRecipe, tiny_bert: Path, small_data: Path
) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    recipe = write_toy(
        folder / "recipe.yaml", tiny_bert, small_data, transfer={"phases": PROBE_THEN_TUNE}, train=EVERY_STEP
    )
    return train(load_recipe(recipe), folder / "run").directory


def test_steps_and_epochs_go_on_and_each_row_has_its_phase(finished: Path) -> None:
    rows = rows_of(finished)
    assert [(row["step"], row["phase"]) for row in rows] == [
        (step, "probe" if step <= 5 else "tune") for step in range(1, 16)
    ]
    assert [row["epoch"] for row in rows] == pytest.approx([step / 5 for step in range(1, 16)])
    assert [(row["step"], row["phase"]) for row in rows_of(finished, "select")] == [
        (5, "probe"),
        (10, "tune"),
        (15, "tune"),
    ]


def test_each_phase_has_a_schedule_of_its_own(finished: Path) -> None:
    rates = [row["learning_rate"] for row in rows_of(finished)]
    # Linear, after a tenth of warm-up, to 0 after the phase's last step.
    assert rates[:5] == pytest.approx([0.0, 1.0e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert rates[5:] == pytest.approx([0.0, *(1.0e-3 * (9 - step) / 9 for step in range(9))])


def test_the_model_has_the_changes_of_all_phases_and_what_none_trained_is_bit_identical(
    finished: Path, tiny_bert: Path
) -> None:
    source, trained = load_file(tiny_bert / "model.safetensors"), weights_of(finished)
    same = {name for name in trained if name in source and (source[name] == trained[name]).all()}
    frozen = {name for name in trained if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))}
    assert frozen == same
    result = json.loads((finished / "result.json").read_text())
    assert result["steps"] == 15 and result["best_phase"] in ("probe", "tune")


def test_a_checkpoint_knows_its_phase(finished: Path) -> None:
    states = {
        step: json.loads((finished / f"checkpoints/step-{step:08d}/state.json").read_text()) for step in (5, 10, 15)
    }
    assert [(states[step]["phase"], states[step]["phase_start"]) for step in (5, 10, 15)] == [(0, 0), (1, 5), (1, 5)]


def test_the_first_phase_is_as_if_it_were_alone(finished: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    training = {**EVERY_STEP, "epochs": 1, "learning_rate": 1.0e-2}
    alone = train(load_recipe(write_recipe(transfer={"freeze": "all"}, train=training)), tmp_path / "run").directory
    assert rows_of(finished)[:5] == [{**row, "phase": "probe"} for row in rows_of(alone)]


def test_one_phase_is_to_the_bit_as_none(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    plain = train(load_recipe(write_recipe("a.yaml", train=EVERY_STEP)), tmp_path / "plain").directory
    phases = {"phases": [{"name": "tune"}]}
    phased = train(load_recipe(write_recipe("b.yaml", train=EVERY_STEP, transfer=phases)), tmp_path / "one").directory
    assert rows_of(plain) == rows_of(phased)
    first, second = weights_of(plain), weights_of(phased)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("last", [3, 5, 8])
def test_a_run_goes_on_exactly_in_any_phase(
    finished: Path, last: int, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(
        write_recipe(transfer={"phases": PROBE_THEN_TUNE}, train={**EVERY_STEP, "save_every": 1}), ["train.keep=100"]
    )
    save = Saver.after_step

    def save_then_die(self: Saver, step: Any, state: Any) -> None:
        save(self, step, state)
        if step.number == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    directory = train(recipe, tmp_path / "run").directory
    assert rows_of(directory) == rows_of(finished)
    assert rows_of(directory, "select") == rows_of(finished, "select")
    whole, again = weights_of(finished), weights_of(directory)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def refreezing(write_recipe: WriteRecipe, **training: Any) -> Path:
    phases = [{"name": "all", "freeze": 0, "epochs": 1}, {"name": "head", "freeze": "all", "epochs": 2}]
    return write_recipe(transfer={"phases": phases}, train={**EVERY_STEP, **training})


def test_what_an_earlier_phase_has_changed_stays_so_where_it_is_frozen_again(
    write_recipe: WriteRecipe, tmp_path: Path, tiny_bert: Path
) -> None:
    recipe = load_recipe(refreezing(write_recipe))
    device = torch.device("cpu")
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    with open_session(prepare(recipe), directory, 0, device, None) as session:
        state = resume(session)
        steps = evaluations(session, state, [make_saver(session)])
        next(steps)
        tuned = {name: value.clone() for name, value in session.trained_weights().items()}
        for _ in steps:
            pass
        assert session.loaders["train"].features is None, "the source's features are not those of the changed body"
        after = session.trained_weights()
        # The source has no pooler: it is new, and trained with the head.
        body = [name for name in tuned if name.startswith("bert.") and ".pooler." not in name]
        assert body and all(torch.equal(tuned[name], after[name]) for name in body)
        assert any(not torch.equal(tuned[name], after[name]) for name in tuned)
    assert any(CHANGED_EARLIER in note for note in directory.read_record()["notes"])
    # Another process finds all of it in the last checkpoint.
    with open_session(prepare(recipe), directory, 0, device, None) as session:
        state = resume(session)
        assert (state.phase, session.phase.name) == (1, "head")
        again = session.trained_weights()
        assert all(torch.equal(after[name], again[name]) for name in after)


def test_the_best_checkpoint_may_lie_in_an_earlier_phase(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    # The rate of the second phase destroys what the first one has learned.
    phases = [
        {"name": "good", "freeze": 1, "epochs": 6},
        {"name": "bad", "freeze": 0, "epochs": 1, "learning_rate": 30.0, "schedule": "constant"},
    ]
    recipe = load_recipe(write_recipe(transfer={"phases": phases}, train={**EVERY_STEP, "learning_rate": 3.0e-3}))
    run = train(recipe, tmp_path / "run").directory
    result = json.loads((run / "result.json").read_text())
    best = next(row for row in rows_of(run, "select") if row["step"] == result["best_step"])
    assert result["best_phase"] == best["phase"] == "good"
    assert result["metrics"]["select"]["accuracy"] == best["accuracy"]


def test_a_phase_that_stops_early_gives_way_to_the_next(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    # At a rate of next to nothing no evaluation is better than the one before.
    phases = [
        {"name": "still", "freeze": "all", "epochs": 9, "learning_rate": 1.0e-12},
        {"name": "tune", "freeze": 0, "epochs": 1},
    ]
    training = {**EVERY_STEP, "early_stopping": {"patience": 2}}
    run = train(load_recipe(write_recipe(transfer={"phases": phases}, train=training)), tmp_path / "run").directory
    evaluated = [(row["step"], row["phase"]) for row in rows_of(run, "select")]
    assert len(evaluated) < 9
    still = [step for step, phase in evaluated if phase == "still"]
    assert evaluated[-1] == (still[-1] + 5, "tune")
    assert json.loads((run / "result.json").read_text())["stopped_early"] is None


def test_stored_features_are_used_in_each_phase_that_can(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    phases = [{"name": "probe", "freeze": "all", "epochs": 2}, {"name": "tune", "freeze": 1, "epochs": 2}]
    curves = []
    for cached in (True, False):
        recipe = load_recipe(write_recipe(transfer={"phases": phases}, train={**EVERY_STEP, "cache_prefix": cached}))
        directory = RunDirectory(tmp_path / f"run-{cached}")
        directory.create()
        with open_session(prepare(recipe), directory, 0, torch.device("cpu"), None) as session:
            state = TrainingState()
            uses = {}
            for _ in evaluations(session, state, []):
                uses[session.phase.name] = session.loaders["train"].features is not None
            assert uses == {"probe": cached, "tune": cached}
        curves.append([row["loss"] for row in rows_of(directory.root)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_a_depth_that_the_model_does_not_have_is_refused_at_its_line(write_recipe: WriteRecipe) -> None:
    phases = [{"name": "probe", "freeze": "all", "epochs": 1}, {"name": "tune", "freeze": 7, "epochs": 2}]
    with pytest.raises(
        InputError, match=r"\(transfer.phases.1.freeze\): freeze depth is 7, but the model has 2 layers"
    ):
        check(load_recipe(write_recipe(transfer={"phases": phases}, train={"epochs": 3})))


def test_a_phase_takes_what_it_leaves_out_from_the_recipe(write_recipe: WriteRecipe) -> None:
    phases = [{"name": "a"}, {"name": "b", "steps": 3, "schedule": "constant", "freeze": "stem"}]
    recipe = load_recipe(write_recipe(transfer={"freeze": 1, "phases": phases}, train={"epochs": 4}))
    first, second = (phase.recipe for phase in find_phases(prepare(recipe)))
    assert (first.train, first.transfer.freeze) == (recipe.train, 1)
    assert (second.train.steps, second.train.epochs, second.train.schedule) == (3, None, "constant")
    assert second.transfer.freeze == "stem"
