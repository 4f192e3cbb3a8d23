"""Two answers to one prompt, in the forms that people keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.examples import Examples
from orchestrator.data.fields.conversations import Sample
from orchestrator.data.fields.preferences import check_pairs, read_pairs
from orchestrator.data.sources import open_files
from orchestrator.tasks.preference import PreferenceOptions, PreferenceTuning

Open = Callable[[list[dict[str, Any]]], Examples]
ASKED, GOOD, BAD = (
    {"role": role, "content": content} for role, content in (("user", "hi"), ("assistant", "ho"), ("assistant", "no"))
)


@pytest.fixture
def open_rows(tmp_path: Path) -> Open:
    def open_rows(rows: list[dict[str, Any]]) -> Examples:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return open_files([path], PreferenceTuning.columns(PreferenceOptions()), {})

    return open_rows


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        # As some data sets have it: the prompt again in both conversations.
        {"prompt": "hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_conversations_have_their_prompt_beside_them_or_in_them(row: dict[str, Any], open_rows: Open) -> None:
    examples = open_rows([row])
    assert check_pairs(examples) == []
    assert read_pairs(examples) == ([Sample((ASKED, GOOD), num_given=1)], [Sample((ASKED, BAD), num_given=1)])


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", ("2", "3")),
        ({"chosen": "Q: is it? A: yes", "rejected": "Q: is it? A: no"}, "Q: is it? A:", (" yes", " no")),
        ({"chosen": "so bright", "rejected": "so bring"}, "so", (" bright", " bring")),
        ({"chosen": "yes", "rejected": "no"}, "", ("yes", "no")),
        ({"chosen": "it is", "rejected": "it is not"}, "it is", ("", " not")),
    ],
)
def test_texts_have_their_prompt_beside_them_or_begin_with_it(
    row: dict[str, Any], prompt: str, answers: tuple[str, str], open_rows: Open
) -> None:
    (chosen,), (rejected,) = read_pairs(open_rows([row]))
    assert (chosen.prompt, rejected.prompt) == (prompt, prompt)
    assert (chosen.completion, rejected.completion) == answers


@pytest.mark.parametrize(
    ("row", "expected", "fatal"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected is missing (null)", True),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is blank", True),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen is the same as rejected in 1 of 2 rows", False),
    ],
)
def test_what_prefers_nothing_is_told(row: dict[str, Any], expected: str, fatal: bool, open_rows: Open) -> None:
    good = {"prompt": "x", "chosen": "y", "rejected": "z"}
    (problem,) = check_pairs(open_rows([good, row]))
    assert expected in problem.what
    assert problem.fatal is fatal
    assert str(problem.where).endswith(":2")


def test_answers_in_two_forms_and_turns_that_answer_nothing_are_refused(open_rows: Open) -> None:
    (problem,) = check_pairs(open_rows([{"prompt": "a", "chosen": "b", "rejected": [BAD]}]))
    assert "chosen holds text, rejected holds lists of text" in problem.what
    (problem,) = check_pairs(open_rows([{"chosen": [ASKED], "rejected": [ASKED, BAD]}]))
    assert "chosen has no assistant turn" in problem.what
