"""Scores of generated answers against those of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from orchestrator.data.examples import Examples
from orchestrator.data.fields.conversations import read_samples
from orchestrator.data.fields.forms import Form, forms_of
from orchestrator.data.messages import NUM_SHOWN, show_some
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section

Metric = Literal["exact_match", "rouge1", "rouge2", "rougeL", "chrf"]
EXTRA = "scores"
_PACKAGES = {"rouge1": "rouge_score", "rouge2": "rouge_score", "rougeL": "rouge_score", "chrf": "sacrebleu"}
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3})")


class Generation(Section):
    """Generation of answers that are scored, before the first step and after the last."""

    examples: Annotated[int, Field(gt=0)] = 64
    """The number of examples drawn from each reported split."""
    metrics: Annotated[list[Metric], Field(min_length=1)] = Field(default=["exact_match"])
    """`exact_match`: the share of answers that are the data's; `rouge1`, `rouge2`, `rougeL` (Lin 2004), F-measures from
    0 to 1; `chrf` (Popovic 2015), 0 to 100. All but the first need the extra `scores`."""
    answer: str | None = None
    """A regular expression for the part of an answer that counts, in both texts: its last match, or the one group in it
    (`#### (-?[0-9.,]+)`). null: the whole text."""


def check_generation(
    chosen: Generation, splits: Mapping[str, Examples], form: Form | None, recipe: Recipe
) -> list[Problem]:
    """Return what keeps answers from being scored."""
    place = recipe.origin.where("target.options.generate")
    if any("text" in forms_of(examples, form) for examples in splits.values()):
        return [Problem("plain texts have no answers to score", place, "set target.options.generate to null")]
    problems: list[Problem] = []
    if chosen.answer is None:
        return problems
    where = recipe.origin.where("target.options.generate.answer")
    try:
        pattern = re.compile(chosen.answer)
    except re.error as error:
        return [*problems, Problem(f"{chosen.answer!r} is not a regular expression: {error}", where, "correct it")]
    if pattern.groups > 1:
        what = f"{chosen.answer!r} has {pattern.groups} groups, so it is not clear which one is the answer"
        return [*problems, Problem(what, where, "keep one group; write the others as (?:...)")]
    for name in ("select", "test"):
        if name in splits:
            expected = expected_answers(splits[name], form)
            without = [row for row, text in enumerate(expected) if find_answer(text, pattern) is None]
            if without:
                places = show_some([splits[name].where(row) for row in without[:NUM_SHOWN]], len(without))
                what = f"{len(without)} answers of {name} hold nothing that {chosen.answer!r} matches: {places}"
                problems.append(Problem(what, where, "correct the expression, or those answers"))
    return problems


def packages(chosen: Generation) -> dict[str, str]:
    """Return the packages that the metrics need, each with the extra that installs it."""
    return {_PACKAGES[name]: EXTRA for name in chosen.metrics if name in _PACKAGES}


def expected_answers(examples: Examples, form: Form | None) -> list[str]:
    """Return the last answer of each example."""
    samples = read_samples(examples, form)
    return [_text(sample.turns[-1]["content"]) if sample.turns else sample.completion.strip() for sample in samples]


def score_answers(chosen: Generation, expected: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """Return means over the examples; for `chrf` the score of all texts together, as is usual."""
    pattern = None if chosen.answer is None else re.compile(chosen.answer)
    wanted, found = ([find_answer(text, pattern) for text in texts] for texts in (expected, written))
    return {name: _METRICS.get(name, _rouge(name))(wanted, found) for name in chosen.metrics}


def find_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """Return the part of a text that counts; None where there is none. Thousands are written without commas."""
    if pattern is not None:
        matches = list(pattern.finditer(text))
        if not matches:
            return None
        text = matches[-1].group(pattern.groups)
    return _SEPARATOR.sub("", text.strip())


Texts = Sequence[str | None]


def _exact_match(wanted: Texts, found: Texts) -> float:
    return float(np.mean([a is not None and a == b for a, b in zip(wanted, found, strict=True)]))


def _chrf(wanted: Texts, found: Texts) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_chrf([text or "" for text in found], [[text or "" for text in wanted]]).score)


def _rouge(name: str) -> Callable[[Texts, Texts], float]:
    def score(wanted: Texts, found: Texts) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], use_stemmer=True)
        pairs = zip(wanted, found, strict=True)
        return float(np.mean([scorer.score(a or "", b or "")[name].fmeasure for a, b in pairs]))

    return score


_METRICS: dict[str, Callable[[Texts, Texts], float]] = {"exact_match": _exact_match, "chrf": _chrf}


def _text(content: object) -> str:
    return content.strip() if isinstance(content, str) else ""
