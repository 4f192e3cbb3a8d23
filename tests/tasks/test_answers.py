"""What a language model writes is scored before and after training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import InputError
from orchestrator.inference.predict import evaluate
from orchestrator.tasks.bases.answer_scores import Generation, find_answer, score_answers
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]


def score(expected: list[str], written: list[str], **chosen: Any) -> dict[str, float]:
    return score_answers(Generation.model_validate(chosen), expected, written)


def test_an_answer_is_right_when_it_is_the_expected_one_but_for_space_around_it() -> None:
    assert score([" moo", "woof", "meow"], ["moo\n", "Woof", "meow meow"]) == {"exact_match": 1 / 3}


def test_an_expression_finds_the_last_answer_in_both_texts() -> None:
    pattern = "#### (-?[0-9.,]+)"
    expected = ["so 3 + 4 = 7\n#### 7", "#### 1,000", "#### 5"]
    written = ["#### 6, no: #### 7", "that is #### 1000", "it is 5"]
    assert score(expected, written, answer=pattern) == {"exact_match": 2 / 3}
    assert find_answer("a 1 b 22", re.compile("[0-9]+")) == "22"
    assert find_answer("none", re.compile("[0-9]+")) is None


def test_rouge_and_chrf_are_those_of_their_packages() -> None:
    expected, written = ["the cat sat on the mat", "a dog"], ["the cat lay on the mat", "a dog"]
    found = score(expected, written, metrics=["rouge1", "rouge2", "rougeL", "chrf"])
    # Of six words five are shared, in order; of five pairs three.
    assert found["rouge1"] == pytest.approx((5 / 6 + 1) / 2)
    assert found["rouge2"] == pytest.approx((3 / 5 + 1) / 2)
    assert found["rougeL"] == pytest.approx((5 / 6 + 1) / 2)
    assert 50 < found["chrf"] < 100
    assert score(expected, expected, metrics=["chrf"])["chrf"] == pytest.approx(100)


def test_a_run_tells_what_it_wrote_before_and_after(write: WriteRecipe, tmp_path: Path) -> None:
    options = {"max_new_tokens": 14, "generate": {"examples": 8, "metrics": ["exact_match", "chrf"]}}
    recipe = write(
        options, transfer={"freeze": 1}, train={"epochs": 20, "learning_rate": 1.0e-2, "evaluate_every": 120}
    )
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    before, after = run.result["before"]["test"], run.result["metrics"]["test"]
    assert before["exact_match"] == 0
    assert after["exact_match"] > 0.5
    assert after["chrf"] > before["chrf"]
    samples = run.result["samples"]
    assert len(samples) == 8
    right = [sample["expected"] == sample["written"] for sample in samples]
    assert sum(right) / 8 == after["exact_match"]
    assert all(sample["before"] != sample["written"] for sample in samples)
    assert all(re.fullmatch(r".*test\.jsonl:\d+", sample["source"]) for sample in samples)
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["exact_match"] == after["exact_match"]
    scored = evaluate(run.directory, None, "test")["metrics"]
    assert scored["exact_match"] == after["exact_match"]
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert "Answers" in page
    assert samples[0]["expected"] in page


@pytest.mark.parametrize(
    ("generate", "words"),
    [
        ({"answer": "(a"}, "not a regular expression"),
        ({"answer": "(a)(b)"}, "has 2 groups"),
        ({"answer": "[0-9]+"}, "hold nothing that"),
        ({"metrics": ["rouge"]}, "rouge1"),
        ({"examples": 0}, "examples"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(generate: dict[str, Any], words: str, write: WriteRecipe) -> None:
    with pytest.raises(InputError, match=words):
        prepare(orchestrator.load_recipe(write({"generate": generate})))


def test_plain_texts_have_no_answers(write: WriteRecipe, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(20)), encoding="utf-8")
    with pytest.raises(InputError, match="plain texts have no answers"):
        prepare(orchestrator.load_recipe(write({"generate": {}}, data=str(path))))


def test_a_missing_package_is_named_with_its_remedy(
    write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = orchestrator.load_recipe(write({"generate": {"examples": 1, "metrics": ["rouge1", "exact_match"]}}))
    run = orchestrator.train(recipe, tmp_path / "run")
    monkeypatch.setattr("orchestrator.tasks.find_spec", lambda name: None)
    named = r"rouge_score is not installed[\s\S]*transfer-orchestrator\[scores\]"
    with pytest.raises(InputError, match=named):
        prepare(recipe)
    with pytest.raises(InputError, match=named):
        evaluate(run.directory, None, "test")
