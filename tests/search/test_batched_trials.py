"""Trials that train only the head, trained as one: each has its own numbers, and a failure of one harms no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator import load_recipe
from orchestrator.json_lines import append_json_line
from orchestrator.recipe import Recipe
from orchestrator.search import batched_heads as heads
from orchestrator.search.batched_optimizer import BatchedAdamW
from orchestrator.search.batched_trials import BatchedTrials
from orchestrator.search.batching import batch_trials, trains_only_the_head
from orchestrator.search.outcome import BEST_WEIGHTS, Outcome, Spec, history, read_outcome
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial import Trial
from orchestrator.search.trial_context import TrialContext
from orchestrator.tasks.base import MainMetric
from orchestrator.training.prepare import Prepared, prepare

FREEZE, RATE, DECAY, SCHEDULE = "transfer.freeze", "train.learning_rate", "train.weight_decay", "train.schedule"
ACCURACY = MainMetric("accuracy", higher_is_better=True)
DIFFERENT: list[dict[str, Any]] = [
    {RATE: 1.0e-3, DECAY: 0.0, SCHEDULE: "linear", "train.warmup_ratio": 0.0},
    {RATE: 3.0e-3, DECAY: 0.1, SCHEDULE: "cosine", "train.warmup_ratio": 0.3},
    {RATE: 1.0e-2, DECAY: 0.5, SCHEDULE: "constant", "train.warmup_ratio": 0.1},
    {RATE: 3.0e-2, DECAY: 0.01, SCHEDULE: "constant_with_warmup", "train.warmup_ratio": 0.2},
]

WriteToy = Callable[..., Path]


@pytest.fixture(scope="module")
def bert_with_pooler(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with a pooler of its own, which therefore is frozen with the body."""
    import shutil

    from transformers import BertModel

    folder = tmp_path_factory.mktemp("models") / "bert-with-pooler"
    shutil.copytree(tiny_bert, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertModel.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def prepare_toy(path: Path, write: WriteToy, model: Path, data: Path, **sections: Any) -> Prepared:
    sections = {"transfer": {"freeze": "all"}, **sections}
    sections["train"] = {"epochs": 3, "evaluate_every": 6, **sections.get("train", {})}
    return prepare(load_recipe(write(path, model, data, **sections)))


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, write_toy: WriteToy, bert_with_pooler: Path, small_data: Path
) -> Prepared:
    return prepare_toy(tmp_path_factory.mktemp("toy") / "recipe.yaml", write_toy, bert_with_pooler, small_data)


def specs_of(parameters: list[dict[str, Any]]) -> list[Spec]:
    return [Spec(f"{number:04d}", {FREEZE: "all", **each}) for number, each in enumerate(parameters)]


def directory_in(root: Path) -> SearchDirectory:
    directory = SearchDirectory(root)
    directory.create()
    return directory


def train_together(
    prepared: Prepared, specs: list[Spec], root: Path, metric: MainMetric = ACCURACY, keep: int = 100
) -> SearchDirectory:
    """Train the trials as one batch; fail where they are trained one after another."""
    directory = directory_in(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchedTrials, "_train_in_turn", fail_in_turn)
        result = BatchedTrials(TrialContext(prepared, [], directory.rows, metric, keep), specs, directory).advance()
    assert result.is_last
    return directory


@pytest.fixture(scope="module")
def together(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> SearchDirectory:
    """The trials of `DIFFERENT`, trained as one batch."""
    return train_together(prepared, specs_of(DIFFERENT), tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def alone(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> SearchDirectory:
    """The same trials, each trained by itself."""
    return train_alone(prepared, specs_of(DIFFERENT), tmp_path_factory.mktemp("alone"))


def fail_in_turn(self: BatchedTrials) -> None:
    raise AssertionError("the heads were not trained together")


def train_alone(
    prepared: Prepared, specs: list[Spec], root: Path, metric: MainMetric = ACCURACY, keep: int = 100
) -> SearchDirectory:
    directory = directory_in(root)
    context = TrialContext(prepared, [], directory.rows, metric, keep)
    for spec in specs:
        trial = Trial(context, spec, directory.trial(spec.id))
        while not trial.advance().is_last:
            pass
    return directory


def outcome_of(directory: SearchDirectory, id: str) -> Outcome:
    found = read_outcome(directory.trial(id))
    assert found is not None
    return found


def numbers_in(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not isinstance(value, str) and key != "seconds"}


def train_rows(directory: SearchDirectory, spec: Spec) -> list[dict[str, Any]]:
    return [row for row in directory.trial(spec.id).read_metrics() if row["split"] == "train"]


def check_same(together: SearchDirectory, alone: SearchDirectory, specs: list[Spec]) -> None:
    """Compare scores, losses, the best step with all of its metrics, its weights, and the rows of the training."""
    for spec in specs:
        rows, expected_rows = (history(each.trial(spec.id)) for each in (together, alone))
        assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
        outcome, expected = outcome_of(together, spec.id), outcome_of(alone, spec.id)
        assert outcome.status == expected.status
        # The same step, or one that is as good but for rounding: with a rate near 0, two may be.
        of_step = {row["step"]: row for row in expected_rows}
        best, expected_best = of_step[outcome.best_step], of_step[expected.best_step]
        assert best["accuracy"] == expected_best["accuracy"]
        assert best["loss"] == pytest.approx(expected_best["loss"], rel=1e-6)
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-5)
            assert row["accuracy"] == pytest.approx(expected_row["accuracy"], abs=1e-5)
            if row["step"] == outcome.best_step:
                assert numbers_in(row) == pytest.approx(numbers_in(expected_row), rel=1e-5, abs=1e-5)
        for row, expected_row in zip(*(train_rows(each, spec) for each in (together, alone)), strict=True):
            assert row.keys() == expected_row.keys()
            assert numbers_in(row) == pytest.approx(numbers_in(expected_row), rel=1e-4, abs=1e-6)
        found, kept = (load_file(each.trial(spec.id).root / BEST_WEIGHTS) for each in (together, alone))
        assert found.keys() == kept.keys()
        if outcome.best_step == expected.best_step:
            assert all(torch.allclose(value, kept[name], rtol=1e-4, atol=1e-5) for name, value in found.items())
        assert together.trial(spec.id).recipe.read_text() == alone.trial(spec.id).recipe.read_text()


def test_each_head_has_the_numbers_of_its_trial_by_itself(together: SearchDirectory, alone: SearchDirectory) -> None:
    specs = specs_of(DIFFERENT)
    check_same(together, alone, specs)
    scores = {tuple(row["loss"] for row in history(together.trial(spec.id))) for spec in specs}
    assert len(scores) == len(specs)
    assert [row["step"] for row in history(together.trial("0000"))] == [6, 12, 18, 24]


@pytest.mark.parametrize(
    "sections",
    [
        {"transfer": {"freeze": "all", "head": {"layers": [8], "dropout": 0.3, "learning_rate_multiplier": 3.0}}},
        {"train": {"max_grad_norm": None, "micro_batch_size": 4, "group_by_length": False, "steps": 14}},
        {"train": {"max_grad_norm": 0.05, "seed": 7}},
    ],
    ids=["deep head", "micro batches", "clipped"],
)
def test_it_is_so_for_other_heads_and_batches(
    sections: dict[str, Any], tmp_path: Path, write_toy: WriteToy, bert_with_pooler: Path, small_data: Path
) -> None:
    prepared = prepare_toy(tmp_path / "recipe.yaml", write_toy, bert_with_pooler, small_data, **sections)
    specs = specs_of(DIFFERENT[:3])
    together = train_together(prepared, specs, tmp_path / "together")
    check_same(together, train_alone(prepared, specs, tmp_path / "alone"), specs)


@pytest.mark.parametrize("model", ["bert without pooler", "gpt2", "vit", "mobilenet"])
def test_it_is_so_for_other_models(
    model: str,
    tmp_path: Path,
    write_toy: WriteToy,
    tiny_bert: Path,
    tiny_gpt2: Path,
    tiny_vit: Path,
    tiny_mobilenet: Path,
    small_data: Path,
    small_pictures: Path,
) -> None:
    pictures = {"vit": tiny_vit, "mobilenet": tiny_mobilenet}
    source = {"bert without pooler": tiny_bert, "gpt2": tiny_gpt2, **pictures}[model]
    target = {"target": {"task": "image-classification", "options": {}}} if model in pictures else {}
    data = small_pictures if model in pictures else small_data
    prepared = prepare_toy(tmp_path / "recipe.yaml", write_toy, source, data, train={"epochs": 2}, **target)
    specs = specs_of(DIFFERENT[1:3])
    together = train_together(prepared, specs, tmp_path / "together")
    check_same(together, train_alone(prepared, specs, tmp_path / "alone"), specs)


def test_another_metric_names_other_best_steps(prepared: Prepared, tmp_path: Path) -> None:
    specs = specs_of([{RATE: 1.0e-1, DECAY: 0.0}, {RATE: 1.0e-3, DECAY: 0.0}])
    for metric in (MainMetric("loss", higher_is_better=False), MainMetric("f1_macro", higher_is_better=True)):
        together = train_together(prepared, specs, tmp_path / f"together-{metric.name}", metric)
        alone = train_alone(prepared, specs, tmp_path / f"alone-{metric.name}", metric)
        for spec in specs:
            assert outcome_of(together, spec.id).best_step == outcome_of(alone, spec.id).best_step
            values = [[row[metric.name] for row in history(each.trial(spec.id))] for each in (together, alone)]
            assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_head_that_diverges_fails_alone(
    tmp_path: Path, write_toy: WriteToy, bert_with_pooler: Path, small_data: Path
) -> None:
    train = {"max_grad_norm": None}
    prepared = prepare_toy(tmp_path / "recipe.yaml", write_toy, bert_with_pooler, small_data, train=train)
    specs = specs_of([DIFFERENT[0], {RATE: 1.0e38}, DIFFERENT[2], {RATE: 1.0e30}])
    together = train_together(prepared, specs, tmp_path / "together")
    alone = train_alone(prepared, specs, tmp_path / "alone")
    check_same(together, alone, [specs[0], specs[2]])
    for id in ("0001", "0003"):
        outcome, expected = outcome_of(together, id), outcome_of(alone, id)
        assert (outcome.status, expected.status) == ("failed", "failed")
        assert "at step" in (outcome.reason or "")
        assert outcome.reason == expected.reason
        assert [row["step"] for row in history(together.trial(id))] == [row["step"] for row in history(alone.trial(id))]
        assert not (together.trial(id).root / BEST_WEIGHTS).exists() or history(together.trial(id))


def test_each_head_stops_early_by_itself(
    tmp_path: Path, write_toy: WriteToy, bert_with_pooler: Path, small_data: Path
) -> None:
    train = {"epochs": 6, "early_stopping": {"patience": 2}}
    prepared = prepare_toy(tmp_path / "recipe.yaml", write_toy, bert_with_pooler, small_data, train=train)
    # A head that does not move, one whose loss falls to the end, one that soon overshoots.
    specs = specs_of([{RATE: 1.0e-30}, {RATE: 1.0e-3}, {RATE: 1.0}])
    loss = MainMetric("loss", higher_is_better=False)
    together = train_together(prepared, specs, tmp_path / "together", loss)
    alone = train_alone(prepared, specs, tmp_path / "alone", loss)
    for spec in specs:
        assert outcome_of(together, spec.id).best_step == outcome_of(alone, spec.id).best_step
        assert outcome_of(together, spec.id).reason == outcome_of(alone, spec.id).reason
    counts = [[len(history(each.trial(spec.id))) for spec in specs] for each in (together, alone)]
    assert counts[0] == counts[1]
    assert (counts[0][0], counts[0][1]) == (3, 8)
    assert outcome_of(together, "0000").reason == "loss on select did not improve for 2 evaluations"


def test_what_had_ended_is_not_trained_again(prepared: Prepared, tmp_path: Path) -> None:
    specs = specs_of(DIFFERENT)
    directory = train_together(prepared, specs[:2], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in directory.trials.rglob("*")}
    train_together(prepared, specs, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert outcome_of(directory, "0003").status == "finished"
    ended = BatchedTrials(TrialContext(prepared, [], directory.rows, ACCURACY, 1), specs, directory)
    assert ended.specs == []
    assert ended.advance().is_last


def test_the_rest_of_a_batch_has_the_numbers_of_the_whole(
    prepared: Prepared, together: SearchDirectory, tmp_path: Path
) -> None:
    specs = specs_of(DIFFERENT)[2:]
    check_same(train_together(prepared, specs, tmp_path), together, specs)


def test_weights_are_kept_where_they_may_win(prepared: Prepared, tmp_path: Path) -> None:
    directory = directory_in(tmp_path)
    append_json_line(directory.rows, {"id": "x", "metrics": {"accuracy": 1.1}, "status": "finished"})
    train_together(prepared, specs_of(DIFFERENT[:2]), tmp_path, keep=1)
    assert not list(tmp_path.rglob(BEST_WEIGHTS))


@pytest.mark.parametrize("trouble", ["cannot be stacked", "no features"])
def test_heads_that_cannot_be_trained_together_are_trained_in_turn(
    trouble: str, prepared: Prepared, alone: SearchDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("vmap: there is no rule for this")

    if trouble == "cannot be stacked":
        monkeypatch.setattr(heads, "vmap", lambda *_, **__: fail)
    else:
        monkeypatch.setattr("orchestrator.training.session.extract_prefix_at_boundary", lambda *_: None)
    specs = specs_of(DIFFERENT[:2])
    directory = directory_in(tmp_path / "batch")
    assert BatchedTrials(TrialContext(prepared, [], directory.rows, ACCURACY, 100), specs, directory).advance().is_last
    check_same(directory, alone, specs)
    if trouble == "cannot be stacked":
        log = (directory.trial("0000").logs / "worker-0.log").read_text()
        assert "training several heads together: not possible" in log
        assert "Traceback" in log


def test_a_mistake_of_our_own_is_not_taken_for_heads_that_cannot_be_stacked(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: Any) -> None:
        raise RuntimeError("an index is wrong")

    monkeypatch.setattr(BatchedAdamW, "step", mistake)
    specs = specs_of(DIFFERENT[:2])
    directory = directory_in(tmp_path / "batch")
    with pytest.raises(RuntimeError, match="an index is wrong"):
        BatchedTrials(TrialContext(prepared, [], directory.rows, ACCURACY, 100), specs, directory).advance()


# ---- which trials are batched


def recipe_of(write: Callable[..., Path], **sections: Any) -> Recipe:
    return load_recipe(write(**sections))


def ids(found: tuple[list[list[Spec]], list[Spec]]) -> tuple[list[list[str]], list[str]]:
    return [[spec.id for spec in batch] for batch in found[0]], [spec.id for spec in found[1]]


def test_only_trials_of_alike_heads_are_batched(write_recipe: Callable[..., Path]) -> None:
    specs = [
        Spec("a", {FREEZE: "all", RATE: 1e-3}),
        Spec("b", {FREEZE: 1, RATE: 1e-3}),
        Spec("c", {FREEZE: "all", RATE: 1e-2, DECAY: 0.1, SCHEDULE: "cosine", "train.warmup_ratio": 0.0}),
        Spec("d", {FREEZE: "all", RATE: 1e-3, "transfer.head.dropout": 0.5}),
        Spec("e", {FREEZE: "all", RATE: 1e-2, "transfer.head.dropout": 0.5}),
        Spec("f", {FREEZE: "all", "train.epochs": 9}),
        Spec("g", {FREEZE: "all", "train.seed": 9}),
        Spec("h", {FREEZE: "100%"}),
    ]
    batches, others = ids(batch_trials(recipe_of(write_recipe), specs, 1))
    assert batches == [["a", "c"], ["d", "e"]]
    assert sorted(others) == ["b", "f", "g", "h"]


def test_there_are_as_many_batches_as_run_at_a_time_and_none_of_one(write_recipe: Callable[..., Path]) -> None:
    specs = [Spec(str(number), {FREEZE: "all", RATE: 1e-3 * (number + 1)}) for number in range(7)]
    recipe = recipe_of(write_recipe)
    assert ids(batch_trials(recipe, specs, 2)) == ([["0", "2", "4", "6"], ["1", "3", "5"]], [])
    assert [len(batch) for batch in batch_trials(recipe, specs, 4)[0]] == [3, 2, 2]
    assert ids(batch_trials(recipe, specs[:1], 2)) == ([], ["0"])
    assert ids(batch_trials(recipe, [], 2)) == ([], [])


def test_only_one_process_that_trains_a_head_on_features_is_batched(write_recipe: Callable[..., Path]) -> None:
    others = [
        {"transfer": {"freeze": 1}},
        {"train": {"cache_prefix": False}},
        {"scale": {"workers": 2}},
        {"scale": {"zero_stage": 1}},
        {"scale": {"engine": "deepspeed"}},
    ]

    def is_batched(sections: dict[str, Any]) -> bool:
        return trains_only_the_head(recipe_of(write_recipe, **{"transfer": {"freeze": "all"}, **sections}))

    assert is_batched({})
    assert not [sections for sections in others if is_batched(sections)]
