"""Text classification: labels and their order, encoding and padding, losses and metrics against other sources."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from orchestrator import load_recipe, train
from orchestrator.data import Examples, open_files
from orchestrator.errors import InputError
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Batch
from orchestrator.tasks.bases.label_scores import (
    expected_calibration_error,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
    softmax,
)
from orchestrator.tasks.text_classification import TextClassification
from orchestrator.training.prepare import prepare

Make = Callable[..., Examples]
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.fixture
def make_examples(tmp_path: Path) -> Make:
    """Examples of these labels, with texts of their own or pairs of texts."""

    def make(labels: Sequence[Any], texts: Sequence[Any] | None = None, pairs: Sequence[str] | None = None) -> Examples:
        rows = []
        for number, label in enumerate(labels):
            row = {"text": texts[number] if texts else f"text number {number}", "label": label}
            rows.append({**row, **({"text_pair": pairs[number]} if pairs else {})})
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return open_files([path], TextClassification.columns(TextClassification.Options()), {})

    return make


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def recipe() -> Recipe:
    target = {"task": "text-classification", "data": "x.jsonl"}
    return Recipe.model_validate({"name": "test", "source": {"model": "some/model"}, "target": target})


def prepared(examples: Examples, **options: Any) -> TextClassification:
    return TextClassification.prepare(TextClassification.Options(**options), {"train": examples})


@pytest.mark.parametrize(
    "labels, problem_type, names",
    [
        (["no", "yes", "maybe"], SINGLE, ("maybe", "no", "yes")),
        ([10, 2, 2], SINGLE, ("2", "10")),
        ([True, False, True], SINGLE, ("false", "true")),
        ([["b", "a"], [], ["c"]], MULTI, ("a", "b", "c")),
        ([0.5, 1.25, 2.0], REGRESSION, ("score",)),
    ],
)
def test_labels_tell_what_kind_of_problem_it_is(
    labels: list[Any], problem_type: str, names: tuple[str, ...], make_examples: Make
) -> None:
    task = prepared(make_examples(labels))
    assert (task.problem_type, task.label_names) == (problem_type, names)
    assert task.main_metric.name == task.metrics_shown[0]
    assert set(task.metrics_shown) <= set(task.metric_directions())


def test_label_names_of_the_recipe_set_the_order_of_the_labels(make_examples: Make, tokenizer: Any) -> None:
    examples = make_examples(["no", "yes", "no"])
    task = prepared(examples, label_names=["yes", "no"])
    assert task.config_changes()["id2label"] == {0: "yes", 1: "no"}
    assert task.wrap(task.encode(examples, tokenizer), tokenizer).targets()["label"].tolist() == [1, 0, 1]


def test_label_names_of_the_recipe_name_numbered_labels(make_examples: Make, tokenizer: Any) -> None:
    examples = make_examples([1, 0, 1])
    task = prepared(examples, label_names=["no", "yes"])
    assert task.label_names == ("no", "yes")
    assert task.wrap(task.encode(examples, tokenizer), tokenizer).targets()["label"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [["a", "b"], [["a"], ["a", "b"]], [0.5, 1.0]], ids=[SINGLE, MULTI, REGRESSION])
def test_a_saved_config_restores_the_task(labels: list[Any], make_examples: Make) -> None:
    task = prepared(make_examples(labels))
    restored = TextClassification.restore(TextClassification.Options(), SimpleNamespace(**task.config_changes()))
    assert (restored.problem_type, restored.label_names) == (task.problem_type, task.label_names)


def test_batches_hold_what_the_tokenizer_gives_padded_on_the_right(make_examples: Make, tokenizer: Any) -> None:
    texts = ["a cat", "look at this old house in the garden today", "dog"]
    examples = make_examples(["x", "y", "x"], texts)
    task = prepared(examples)
    encoded = task.wrap(task.encode(examples, tokenizer), tokenizer)
    rows = np.array([2, 1, 0])
    batch = encoded.batch(rows)
    expected = tokenizer([texts[row] for row in rows], padding=True, return_tensors="np")
    assert set(batch.inputs) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(batch.inputs[name], values)
    assert batch.targets["labels"].tolist() == [0, 1, 0]
    assert encoded.lengths.tolist() == [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert encoded.counts["targets"].tolist() == [1, 1, 1]


def test_pairs_of_texts_are_encoded_together_and_cut_to_length(make_examples: Make, tokenizer: Any) -> None:
    examples = make_examples(["x", "y"], ["a cat", "a dog " * 20], ["the house", "the garden"])
    task = prepared(examples, max_length=16)
    encoded = task.wrap(task.encode(examples, tokenizer), tokenizer)
    batch = encoded.batch(np.array([0, 1]))
    expected = tokenizer("a cat", "the house")
    assert batch.inputs["input_ids"][0][: len(expected["input_ids"])].tolist() == expected["input_ids"]
    assert batch.inputs["token_type_ids"][0][: len(expected["input_ids"])].tolist() == expected["token_type_ids"]
    assert encoded.lengths.tolist() == [len(expected["input_ids"]), 16]


def test_texts_that_are_cut_are_counted(make_examples: Make, tokenizer: Any, recipe: Recipe) -> None:
    examples = make_examples(["x", "y"], ["a cat", "a dog " * 20])
    task = prepared(examples, max_length=16)
    (problem,) = task.check_encoded("train", task.wrap(task.encode(examples, tokenizer), tokenizer), recipe)
    assert "1 of 2 texts of train" in problem.what
    assert not problem.fatal


@pytest.mark.parametrize(
    "labels, problem_type",
    [(["x", "y"], MULTI), ([["x"], ["y"]], SINGLE), ([["x"], ["y"]], REGRESSION), (["x", "y"], REGRESSION)],
)
def test_labels_of_another_kind_are_refused(
    labels: list[Any], problem_type: str, make_examples: Make, recipe: Recipe
) -> None:
    examples = make_examples(labels)
    problems = TextClassification.check(
        TextClassification.Options(problem_type=problem_type), {"train": examples}, recipe
    )
    assert any(problem.fatal and "train.jsonl:1" in str(problem.where) for problem in problems)
    task = TextClassification(TextClassification.Options(), problem_type, ("x", "y"))
    assert task.check_inputs(examples)


def logits_and_truth(num_labels: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(50, num_labels)).astype(np.float32), generator.integers(0, num_labels, 50)


def test_single_label_metrics_are_those_of_scikit_learn() -> None:
    logits, truth = logits_and_truth(4)
    task = TextClassification(TextClassification.Options(), SINGLE, ("a", "b", "c", "d"))
    found = task.metrics({"logits": logits}, {"label": truth})
    predicted = logits.argmax(-1)
    assert found["accuracy"] == np.mean(predicted == truth)
    assert found["f1_macro"] == sk.f1_score(truth, predicted, average="macro")
    assert found["f1_weighted"] == sk.f1_score(truth, predicted, average="weighted")
    assert found["matthews_correlation"] == sk.matthews_corrcoef(truth, predicted)
    assert set(found) == set(task.metric_directions()) - {"loss"}
    details = task.details({"logits": logits}, {"label": truth})
    assert np.trace(details["confusion_matrix"]) == (predicted == truth).sum()
    assert details["per_class"]["b"]["support"] == (truth == 1).sum()


def test_macro_f1_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    found = single_label_metrics(probabilities, np.array([0, 0, 1, 1]))
    assert found["accuracy"] == 0.75
    assert found["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False])
    # Two examples 0.05 under their accuracy of 1, two 0.05 over theirs of 0.5.
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.05)
    assert expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0
    assert expected_calibration_error(np.ones(3), np.zeros(3, bool)) == 1
    assert math.isnan(expected_calibration_error(np.array([math.nan]), np.array([True])))


def test_probabilities_are_exact_for_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0], [0.0, -1000.0]])), [[0.5, 0.5], [1.0, 0.0]])


def test_multi_label_metrics_by_hand() -> None:
    predicted = np.array([[1, 0, 1], [0, 1, 0]], bool)
    truth = np.array([[1, 0, 0], [0, 1, 0]], bool)
    found = multi_label_metrics(predicted, truth)
    assert found["accuracy"] == 0.5
    assert found["f1_micro"] == pytest.approx(4 / 5)
    assert found["f1_macro"] == pytest.approx(2 / 3)
    assert found["f1_samples"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["hamming_loss"] == pytest.approx(1 / 6)


def test_regression_metrics_by_hand() -> None:
    found = regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 5.0]))
    assert found["mse"] == pytest.approx(2 / 3)
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / 8)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1])
    assert regression_metrics(np.ones(3), np.array([1.0, 2.0, 3.0]))["pearson"] == 0
    assert regression_metrics(np.ones(1), np.ones(1))["r2"] == 0


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_the_loss_over_its_targets_is_that_of_transformers(problem_type: str) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    names = ("score",) if problem_type == REGRESSION else ("a", "b", "c")
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=len(names))
    config.problem_type = problem_type
    model = BertForSequenceClassification(config).eval()
    labels = {SINGLE: torch.tensor([0, 2]), MULTI: torch.tensor([[1.0, 0, 1], [0, 0, 1]])}
    targets = labels.get(problem_type, torch.tensor([0.5, -1.0]))
    outputs = model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), labels=targets)
    task = TextClassification(TextClassification.Options(), problem_type, names)
    ours = task.loss(outputs, Batch({}, {"labels": targets}), {"targets": 2})
    assert ours.item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_predictions_are_told_in_the_names_of_the_labels() -> None:
    logits = np.array([[2.0, -1.0], [0.1, 0.2]], np.float32)
    single = TextClassification(TextClassification.Options(), SINGLE, ("no", "yes")).prediction_rows(
        {"logits": logits}, None
    )
    assert single["prediction"] == ["no", "yes"]
    assert sum(single["scores"][0].values()) == pytest.approx(1)
    multi = TextClassification(TextClassification.Options(), MULTI, ("no", "yes")).prediction_rows(
        {"logits": logits}, None
    )
    assert multi["prediction"] == [["no"], ["no", "yes"]]
    numbers = TextClassification(TextClassification.Options(), REGRESSION, ("score",)).prediction_rows(
        {"logits": logits[:, :1]}, None
    )
    assert numbers["prediction"] == [2.0, pytest.approx(0.1)]
    assert set(numbers) == {"prediction"}


def test_a_model_that_counts_positions_from_its_padding_on_trains_with_the_length_that_the_remedy_names(
    write_recipe: Callable[..., Path], tiny_bert: Path, tmp_path: Path
) -> None:
    """As RoBERTa does: of 34 positions one is never read where padding is token 0."""
    source = tmp_path / "source"
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(source)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=0, **sizes)
    RobertaForMaskedLM(config).save_pretrained(source)
    data = tmp_path / "long.jsonl"
    rows = [{"text": f"cat dog {number} " * 20, "label": number % 2} for number in range(48)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def recipe_of(max_length: int) -> Recipe:
        target = {"task": "text-classification", "data": str(data), "options": {"max_length": max_length}}
        return load_recipe(write_recipe(source={"model": str(source)}, target=target, train={"epochs": 1}))

    for too_long in (34, 200):
        with pytest.raises(InputError, match="reads at most 33 tokens"):
            prepare(recipe_of(too_long))
    run = train(recipe_of(33), tmp_path / "run")
    assert run.result["status"] == "finished"
