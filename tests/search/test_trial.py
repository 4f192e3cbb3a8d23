"""One trial: evaluation by evaluation, paused and resumed at any of them, failing without harm to the others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator import load_recipe, train
from orchestrator.json_lines import append_json_line
from orchestrator.runs.directory import RunDirectory
from orchestrator.search import trial as trials
from orchestrator.search.changes import CHANGES
from orchestrator.search.outcome import BEST_WEIGHTS, OUTCOME, Spec, history, read_outcome
from orchestrator.search.trial import Trial
from orchestrator.search.trial_context import TrialContext, trial_inputs
from orchestrator.search.trial_interface import TrialResult
from orchestrator.tasks.base import MainMetric
from orchestrator.training.prepare import Prepared, prepare

RATE, EPOCHS, STEPS = "train.learning_rate", 4, 32
PARAMETERS = {RATE: 2.0e-3}
METRIC = MainMetric("accuracy", higher_is_better=True)


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, write_toy: Callable[..., Path], tiny_bert: Path, small_data: Path
) -> Prepared:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = write_toy(path, tiny_bert, small_data, transfer={"freeze": 1}, train={"epochs": EPOCHS})
    return prepare(load_recipe(recipe))


@pytest.fixture
def context(prepared: Prepared, tmp_path: Path) -> TrialContext:
    return TrialContext(prepared, [1], tmp_path / "trials.jsonl", METRIC, keep=1)


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "0000")


def run_to_the_end(trial: Trial) -> list[TrialResult]:
    results = [trial.advance()]
    while not results[-1].is_last:
        results.append(trial.advance())
    return results


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrialResult], RunDirectory]:
    """A trial that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    directory = RunDirectory(root / "0000")
    context = TrialContext(prepared, [1], root / "trials.jsonl", METRIC, keep=1)
    return run_to_the_end(Trial(context, Spec("0000", PARAMETERS), directory)), directory


@contextmanager
def saving_at_every_step() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "SAVE_INTERVAL_S", -1.0)
        yield


def kill(trial: Trial) -> None:
    """Leave a trial as a killed process does: nothing is written any more."""
    trial._stack.close()


def test_each_evaluation_is_one_report_and_the_last_says_so(whole: tuple[list[TrialResult], RunDirectory]) -> None:
    results, directory = whole
    assert [result.row["step"] for result in results] == [8, 16, 24, 32]
    assert [result.is_last for result in results] == [False, False, False, True]
    assert [result.score for result in results] == [result.row["accuracy"] for result in results]
    assert all(result.reason is None for result in results)
    assert [result.row for result in results] == history(directory)
    outcome = read_outcome(directory)
    assert outcome is not None
    assert outcome.status == "finished"
    best = max(results, key=lambda result: (result.row["accuracy"], -result.row["loss"]))
    assert outcome.best_step == best.row["step"]
    assert outcome.seconds >= results[-1].row["seconds"]
    assert outcome.core_seconds > 0


def test_a_trial_is_the_training_of_the_recipe_with_its_values(
    whole: tuple[list[TrialResult], RunDirectory], tmp_path: Path
) -> None:
    _, directory = whole
    run = train(load_recipe(directory.recipe), tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert without_times([row for row in lines if row["split"] != "test"]) == without_times(directory.read_metrics())
    exported = load_file(run.directory / "model" / "model.safetensors")
    kept = load_file(directory.root / BEST_WEIGHTS)
    assert kept
    assert all(torch.equal(exported[name], value) for name, value in kept.items())


def test_where_low_is_good_the_score_is_turned_round(prepared: Prepared, tmp_path: Path, folder: RunDirectory) -> None:
    context = TrialContext(prepared, [1], tmp_path / "trials.jsonl", MainMetric("loss", higher_is_better=False), keep=1)
    trial = Trial(context, Spec("0000", PARAMETERS), folder)
    result = trial.advance()
    assert result.score == -result.row["loss"]
    trial.stop()


@pytest.mark.parametrize("done", [1, 2, 4])
def test_an_interrupted_trial_repeats_its_evaluations_and_continues_with_the_same_losses(
    done: int, whole: tuple[list[TrialResult], RunDirectory], context: TrialContext, folder: RunDirectory
) -> None:
    expected, undisturbed = whole
    with saving_at_every_step():
        torn = Trial(context, Spec("0000", PARAMETERS), folder)
        for _ in range(done - 1):
            torn.advance()
        next(torn._rows)  # The last evaluation before the end was never reported.
        kill(torn)
    assert not (folder.root / OUTCOME).exists()
    resumed = Trial(context, Spec("0000", PARAMETERS), folder)
    results = run_to_the_end(resumed)
    assert without_times([result.row for result in results]) == without_times([result.row for result in expected])
    assert [result.is_last for result in results] == [False, False, False, True]
    assert without_times(folder.read_metrics()) == without_times(undisturbed.read_metrics())
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.seconds > results[done - 1].row["seconds"]
    expected_weights = load_file(undisturbed.root / BEST_WEIGHTS)
    found = load_file(folder.root / BEST_WEIGHTS)
    assert found.keys() == expected_weights.keys()
    assert all(torch.equal(value, expected_weights[name]) for name, value in found.items())


def test_a_trial_that_is_paused_after_each_evaluation_has_the_same_results(
    whole: tuple[list[TrialResult], RunDirectory], context: TrialContext, folder: RunDirectory
) -> None:
    expected, undisturbed = whole
    for number in range(1, EPOCHS):
        trial = Trial(context, Spec("0000", PARAMETERS), folder)
        results = [trial.advance() for _ in range(number)]
        trial.stop()
        assert without_times([result.row for result in results]) == without_times(
            [result.row for result in expected[:number]]
        )
    run_to_the_end(Trial(context, Spec("0000", PARAMETERS), folder))
    assert without_times(folder.read_metrics()) == without_times(undisturbed.read_metrics())
    expected_weights = load_file(undisturbed.root / BEST_WEIGHTS)
    found = load_file(folder.root / BEST_WEIGHTS)
    assert all(torch.equal(value, expected_weights[name]) for name, value in found.items())


def test_what_came_after_the_last_checkpoint_is_done_again(
    whole: tuple[list[TrialResult], RunDirectory], context: TrialContext, folder: RunDirectory
) -> None:
    expected, undisturbed = whole
    torn = Trial(context, Spec("0000", PARAMETERS), folder)
    with saving_at_every_step():
        torn.advance()
    torn.advance()
    kill(torn)
    assert [row["step"] for row in history(folder)] == [8, 16]
    resumed = Trial(context, Spec("0000", PARAMETERS), folder)
    first = resumed.advance()
    assert first.row["step"] == 8
    assert [row["step"] for row in history(folder)] == [8]
    assert resumed.state.step == 8
    results = [first, *run_to_the_end(resumed)]
    assert without_times([result.row for result in results]) == without_times([result.row for result in expected])
    assert without_times(folder.read_metrics()) == without_times(undisturbed.read_metrics())


def test_a_trial_without_a_checkpoint_starts_again(
    whole: tuple[list[TrialResult], RunDirectory], context: TrialContext, folder: RunDirectory
) -> None:
    torn = Trial(context, Spec("0000", PARAMETERS), folder)
    torn.advance()
    kill(torn)
    results = run_to_the_end(Trial(context, Spec("0000", PARAMETERS), folder))
    assert without_times(folder.read_metrics()) == without_times(whole[1].read_metrics())
    assert len(results) == EPOCHS


class NoTraining(TrialContext):
    """On which nothing may be trained."""

    def session(self, parameters: dict[str, Any], directory: RunDirectory) -> Any:
        raise AssertionError("a trial that had ended was trained")


def test_an_ended_trial_is_reported_again_without_training(
    whole: tuple[list[TrialResult], RunDirectory], prepared: Prepared, tmp_path: Path
) -> None:
    expected, directory = whole
    before = {path: path.stat().st_mtime_ns for path in directory.root.rglob("*")}
    context = NoTraining(prepared, [], tmp_path / "x", METRIC, 1)
    replayed = run_to_the_end(Trial(context, Spec("0000", PARAMETERS), directory))
    assert replayed == expected
    assert {path: path.stat().st_mtime_ns for path in directory.root.rglob("*")} == before


def test_a_loss_that_is_not_finite_ends_the_trial_with_a_reason(context: TrialContext, folder: RunDirectory) -> None:
    parameters = {RATE: 1.0e30, "train.max_grad_norm": None}
    results = run_to_the_end(Trial(context, Spec("0000", parameters), folder))
    assert results[-1].score is None
    assert "training was stopped" in (results[-1].reason or "")
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.status == "failed"
    assert "lower train.learning_rate" in (outcome.reason or "")
    again = run_to_the_end(Trial(NoTraining(context.prepared, [], context.trials, METRIC, 1), Spec("0000", {}), folder))
    assert (again[-1].score, again[-1].reason) == (None, outcome.reason)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"transfer.freeze": 7}, "freeze depth is 7, but the model has 2 layers"),
        ({"transfer.freeze": "all", "transfer.layer_decay": 0.9}, "`transfer.freeze` is `all`"),
    ],
)
def test_what_does_not_go_together_fails_that_trial(
    parameters: dict[str, Any], reason: str, context: TrialContext, folder: RunDirectory
) -> None:
    (result,) = run_to_the_end(Trial(context, Spec("0000", parameters), folder))
    assert result.score is None
    assert reason in (result.reason or "")
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.status == "failed"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ValueError("odd")])
def test_errors_of_the_model_end_the_trial_and_not_the_process(
    error: Exception, context: TrialContext, folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    trial = Trial(context, Spec("0000", PARAMETERS), folder)
    trial.advance()
    monkeypatch.setattr("orchestrator.training.loop.take_step", fail)
    result = trial.advance()
    assert result.is_last
    assert result.reason == (str(error) or "MemoryError")
    assert "Traceback" in (folder.logs / "worker-0.log").read_text()
    assert trial.session is None


def test_early_stopping_is_a_regular_end(prepared: Prepared, tmp_path: Path, folder: RunDirectory) -> None:
    context = TrialContext(prepared, [1], tmp_path / "trials.jsonl", METRIC, keep=1)
    parameters = {RATE: 1.0e-9, "train.early_stopping": {"patience": 1}}
    results = run_to_the_end(Trial(context, Spec("0000", parameters), folder))
    assert len(results) < EPOCHS
    assert results[-1].score == results[-1].row["accuracy"]
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.status == "finished"
    assert "did not improve" in (outcome.reason or "")


@pytest.mark.parametrize("better", [0, 1], ids=["may win", "cannot win"])
def test_a_stopped_trial_leaves_its_best_weights_where_it_may_win(
    better: int, context: TrialContext, folder: RunDirectory
) -> None:
    for number in range(better):
        append_json_line(context.trials, {"id": f"{number}", "metrics": {"accuracy": 1.1}, "status": "finished"})
    trial = Trial(context, Spec("0000", PARAMETERS), folder)
    trial.advance()
    trial.stop()
    assert (folder.root / BEST_WEIGHTS).exists() == (not better)
    assert read_outcome(folder) is None  # How it ended is for those to say who stopped it.
    assert trial.session is None
    trial.stop()


def test_the_weights_kept_are_those_of_the_best_evaluation(
    context: TrialContext, folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.training import hooks
    from orchestrator.training.evaluation import Scored

    real, scores = hooks.score, iter([0.2, 0.9, 0.5, math.nan])

    def score_as_given(*arguments: Any) -> Scored:
        scored = real(*arguments)
        return Scored({**scored.metrics, "accuracy": next(scores)}, scored.predictions)

    monkeypatch.setattr(hooks, "score", score_as_given)
    trial = Trial(context, Spec("0000", PARAMETERS), folder)
    trial.advance()
    trial.advance()
    assert trial.session is not None
    at_best = {name: value.clone() for name, value in trial.session.engine.trained_weights().items()}
    trial.advance()
    assert trial.advance().is_last
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.best_step == 16
    kept = load_file(folder.root / BEST_WEIGHTS)
    assert all(torch.equal(at_best[name], value) for name, value in kept.items())


def test_another_trial_continues_from_what_one_saved(context: TrialContext, tmp_path: Path) -> None:
    good = Trial(context, Spec("0000", PARAMETERS), RunDirectory(tmp_path / "0000"))
    poor = Trial(context, Spec("0001", {RATE: 1.0e-9}), RunDirectory(tmp_path / "0001"))
    good.advance()
    good.advance()
    handed = tmp_path / "handed"
    handed.mkdir()
    good.save(handed)
    assert good.session is not None
    expected = {name: value.clone() for name, value in good.session.engine.trained_weights().items()}
    good.stop()
    poor.advance()
    poor.restore(handed, {RATE: 3.0e-3})
    assert poor.session is not None
    found = poor.session.engine.trained_weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert poor.session.schedule.learning_rate == 3.0e-3
    result = poor.advance()
    assert result.row["step"] == 24
    poor.stop()


def test_a_trial_that_continues_from_another_has_the_weights_of_its_own_best(
    context: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.training import hooks
    from orchestrator.training.evaluation import Scored

    real, scores = hooks.score, iter([0.5, 0.7, 0.9, 0.1, 0.8, 0.6])

    def score_as_given(*arguments: Any) -> Scored:
        scored = real(*arguments)
        return Scored({**scored.metrics, "accuracy": next(scores)}, scored.predictions)

    monkeypatch.setattr(hooks, "score", score_as_given)
    good = Trial(context, Spec("0000", PARAMETERS), RunDirectory(tmp_path / "0000"))
    good.advance(), good.advance()
    (tmp_path / "handed").mkdir()
    good.save(tmp_path / "handed")
    good.stop()
    falling = Trial(context, Spec("0001", PARAMETERS), RunDirectory(tmp_path / "0001"))
    falling.advance()
    assert falling.session is not None
    at_best = {name: value.clone() for name, value in falling.session.engine.trained_weights().items()}
    falling.advance()
    falling.stop()
    # Ray Tune starts a trial again before it passes another's weights to it.
    falling = Trial(context, Spec("0001", {RATE: 3.0e-3}), falling.directory)
    falling.restore(tmp_path / "handed", {RATE: 3.0e-3})
    assert [result.score for result in run_to_the_end(falling)] == [0.8, 0.6]
    outcome = read_outcome(falling.directory)
    assert outcome is not None
    assert outcome.best_step == 8
    kept = load_file(falling.directory.root / BEST_WEIGHTS)
    assert all(torch.equal(at_best[name], value) for name, value in kept.items())


INITIAL, TAKEN_OVER = {RATE: 1.0e-9}, {RATE: 3.0e-3}


@pytest.fixture
def changed(context: TrialContext, folder: RunDirectory, tmp_path: Path) -> Trial:
    """A trial that continues from another's second evaluation, with another rate, and was evaluated once before."""
    good = Trial(context, Spec("0001", PARAMETERS), RunDirectory(tmp_path / "0001"))
    good.advance(), good.advance()
    (tmp_path / "handed").mkdir()
    good.save(tmp_path / "handed")
    good.stop()
    poor = Trial(context, Spec("0000", INITIAL), folder)
    poor.advance()
    poor.restore(tmp_path / "handed", TAKEN_OVER)
    return poor


def rates_reported(results: list[TrialResult]) -> dict[int, float]:
    return {result.row["step"]: result.parameters[RATE] for result in results}


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_resumed_trial_continues_with_the_parameters_that_its_checkpoint_was_trained_with(
    end: str, changed: Trial, context: TrialContext, folder: RunDirectory
) -> None:
    with saving_at_every_step():
        assert rates_reported([changed.advance()]) == {24: 3.0e-3}
        kill(changed) if end == "killed" else changed.stop()
    resumed = Trial(context, Spec("0000", INITIAL), folder)
    first = resumed.advance()
    assert resumed.session is not None
    assert resumed.session.schedule.learning_rate == 3.0e-3
    assert rates_reported([first, *run_to_the_end(resumed)]) == {8: 1.0e-9, 24: 3.0e-3, 32: 3.0e-3}
    assert f"learning_rate: {3.0e-3}" in folder.recipe.read_text()
    replayed = run_to_the_end(Trial(context, Spec("0000", INITIAL), folder))
    assert rates_reported(replayed) == {8: 1.0e-9, 24: 3.0e-3, 32: 3.0e-3}


@pytest.mark.parametrize("loss", ["no checkpoint", "a damaged checkpoint", "damaged changes"])
def test_a_trial_whose_changed_weights_are_lost_begins_again_with_its_initial_parameters(
    loss: str, changed: Trial, context: TrialContext, folder: RunDirectory
) -> None:
    if loss != "no checkpoint":
        with saving_at_every_step():
            changed.advance()
    kill(changed)
    if loss == "a damaged checkpoint":
        (folder.checkpoints / folder.committed()[0] / BEST_WEIGHTS).write_bytes(b"x")
    elif loss == "damaged changes":
        (folder.root / CHANGES).write_text("{")
    resumed = Trial(context, Spec("0000", INITIAL), folder)
    assert rates_reported(run_to_the_end(resumed)) == dict.fromkeys((8, 16, 24, 32), 1.0e-9)


def test_a_trial_that_takes_over_weights_twice_reports_each_evaluation_with_its_own_parameters(
    changed: Trial, context: TrialContext, folder: RunDirectory, tmp_path: Path
) -> None:
    changed.advance()
    changed.restore(tmp_path / "handed", {RATE: 5.0e-3})  # Back to step 16: what came after is taken again.
    assert rates_reported(run_to_the_end(changed)) == {24: 5.0e-3, 32: 5.0e-3}
    replayed = run_to_the_end(Trial(context, Spec("0000", INITIAL), folder))
    assert rates_reported(replayed) == {8: 1.0e-9, 24: 5.0e-3, 32: 5.0e-3}


def test_values_that_change_the_examples_have_them_read_again(context: TrialContext, folder: RunDirectory) -> None:
    trial = Trial(context, Spec("0000", {"target.limit.train": 20}), folder)
    assert trial.advance().row["step"] == 3
    assert trial.session is not None
    assert len(trial.session.prepared.encoded("train")) == 20
    trial.stop()


def test_a_trial_of_streamed_data_has_as_many_examples_as_its_steps_take(
    write_recipe: Callable[..., Path], small_data: Path
) -> None:
    target = {"data": {"path": str(small_data), "stream": True}}
    prepared = prepare(load_recipe(write_recipe(target=target, train={"steps": 2})))
    trials = [trial_inputs(prepared, parameters) for parameters in ({RATE: 1.0e-3}, {"train.steps": 5})]
    assert [len(trial.examples["train"]) for trial in trials] == [16, 40]


def test_a_deep_trial_stores_what_shallower_ones_will_want(
    prepared: Prepared, tmp_path: Path, folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    context = TrialContext(prepared, [0, 1, 2], tmp_path / "trials.jsonl", METRIC, keep=1)
    Trial(context, Spec("0000", {"transfer.freeze": 2}), folder).advance()
    assert len(list((tmp_path / "cache" / "features").glob("*/values.bin"))) == 2 * 3


def test_a_torn_outcome_is_none(folder: RunDirectory) -> None:
    folder.create()
    for text in ("", '{"status": "fini', '{"unknown": 1}'):
        (folder.root / OUTCOME).write_text(text)
        assert read_outcome(folder) is None


def test_a_step_that_was_broken_off_is_not_saved(
    context: TrialContext,
    folder: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[list[TrialResult], RunDirectory],
) -> None:
    """Its weights are half changed: a trial that went on from there would be another one."""
    trial = Trial(context, Spec("0000", PARAMETERS), folder)
    trial.advance()
    steps = iter(range(3))

    def break_off(self: Trial, step: Any, state: Any) -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "after_step", break_off)
        with pytest.raises(KeyboardInterrupt):
            trial.advance()
    trial.stop()
    assert not folder.committed()
    again = run_to_the_end(Trial(context, Spec("0000", PARAMETERS), folder))
    assert without_times([result.row for result in again]) == without_times([result.row for result in whole[0]])
