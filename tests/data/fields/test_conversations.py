"""Texts, completions, instructions and conversations, in the forms that people keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.examples import Examples
from orchestrator.data.fields.conversations import Sample, check_samples, read_prompts, read_samples
from orchestrator.data.fields.forms import columns_of, find_form, forms_of
from orchestrator.data.overlap import check_overlap
from orchestrator.data.sources import open_files
from orchestrator.errors import DataError

Rows = list[dict[str, Any]]
Open = Callable[..., Examples]


@pytest.fixture
def open_rows(tmp_path: Path) -> Open:
    def open_rows(rows: Rows, form: Any = None, name: str = "train.jsonl") -> Examples:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return open_files([path], columns_of(form), {})

    return open_rows


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FORMS: dict[str, tuple[Rows, Sample]] = {
    "text": ([{"text": "once"}], Sample(completion="once")),
    "prompt-completion": ([{"prompt": "1+1=", "completion": "2"}], Sample(prompt="1+1=", completion="2")),
    "alpaca": (
        [{"instruction": "Add.", "input": "1 1", "output": "2"}],
        Sample((turn("user", "Add.\n\n1 1"), turn("assistant", "2")), num_given=1),
    ),
    "messages": (
        [{"messages": [turn("user", "hi"), turn("assistant", "ho")]}],
        Sample((turn("user", "hi"), turn("assistant", "ho"))),
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}],
        Sample((turn("user", "hi"), turn("assistant", "ho"))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_known_by_its_columns_and_read(form: Any, open_rows: Open) -> None:
    rows, expected = FORMS[form]
    for given in (None, form):
        examples = open_rows(rows, given)
        assert find_form(examples.table.column_names) == form
        assert check_samples({"train": examples}, form) == []
        assert read_samples(examples, form) == [expected]


def test_prompts_and_completions_may_be_conversations(open_rows: Open) -> None:
    rows = [{"prompt": [turn("user", "hi")], "completion": [turn("assistant", "ho")]}]
    examples = open_rows(rows)
    assert check_samples({"train": examples}, "prompt-completion") == []
    expected = Sample((turn("user", "hi"), turn("assistant", "ho")), num_given=1)
    assert read_samples(examples, "prompt-completion") == [expected]


def test_an_instruction_may_have_no_input_and_a_system_prompt(open_rows: Open) -> None:
    rows = [{"instruction": "Sing.", "input": "", "output": "la", "system": "You sing."}]
    (sample,) = read_samples(open_rows(rows), "alpaca")
    assert sample.turns == (turn("system", "You sing."), turn("user", "Sing."), turn("assistant", "la"))
    assert sample.num_given == 2


def test_keys_that_only_some_turns_have_are_kept_there_alone(open_rows: Open) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {"zone": "UTC"}}]}
    rows = [
        {"messages": [turn("user", "time?"), call, {"role": "tool", "content": "noon", "name": "clock"}]},
        {"messages": [turn("user", "hi"), turn("assistant", "ho")]},
    ]
    samples = read_samples(open_rows(rows), "messages")
    assert [list(sample.turns) for sample in samples] == [row["messages"] for row in rows]


def test_a_conversation_wins_over_the_text_beside_it() -> None:
    assert find_form(["text", "messages", "prompt"]) == "messages"
    assert find_form(["prompt", "text"]) == "text"
    assert find_form(["prompt"]) is None


@pytest.fixture
def open_mixture(tmp_path: Path) -> Open:
    """Files of several forms as one split: the rows of each by its name."""

    def open_mixture(files: dict[str, Rows], mapping: dict[str, str] | None = None) -> Examples:
        for name, rows in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return open_files([tmp_path / name for name in files], columns_of(None), mapping or {})

    return open_mixture


def test_the_files_of_a_split_may_each_have_a_form_of_their_own(open_mixture: Open) -> None:
    files = {f"{form}.jsonl": rows for form, (rows, _) in FORMS.items()}
    examples = open_mixture(files)
    assert check_samples({"train": examples}, None) == []
    assert forms_of(examples, None) == list(FORMS)
    expected = [sample for _, sample in FORMS.values()]
    assert read_samples(examples, None) == expected
    backwards = examples.take(range(len(examples))[::-1])
    assert read_samples(backwards, None) == expected[::-1]
    assert [sample.completion for sample in read_prompts(examples, None)] == ["once", "", "", "", ""]


def test_a_form_is_told_by_what_its_own_file_has(open_mixture: Open) -> None:
    chat = {"messages": [turn("user", "hi"), turn("assistant", "ho")], "text": "user: hi"}
    examples = open_mixture({"chats.jsonl": [chat], "texts.jsonl": [{"text": "once"}]})
    first, second = read_samples(examples, None)
    assert [each["content"] for each in first.turns] == ["hi", "ho"]
    assert second == Sample(completion="once")


def test_what_is_wrong_in_a_mixture_is_told_for_the_file_that_has_it(open_mixture: Open) -> None:
    bad = {"instruction": "Add.", "output": None}
    (chats, _), (sums, _) = FORMS["messages"], FORMS["alpaca"]
    examples = open_mixture({"chats.jsonl": chats, "sums.jsonl": [*sums, bad]})
    (problem,) = check_samples({"train": examples}, None)
    assert "output is missing (null) in 1 of 2 rows" in problem.what
    assert str(problem.where).endswith("sums.jsonl:2")
    half = open_mixture({"chats.jsonl": chats, "half.jsonl": [{"prompt": "1+1="}]})
    (problem,) = check_samples({"train": half}, None)
    assert "prompt" in problem.what
    assert str(problem.where).endswith("half.jsonl")


def test_some_instructions_have_an_input_though_another_file_has_none(open_mixture: Open) -> None:
    first, second = {"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Sing.", "output": "la"}
    samples = read_samples(open_mixture({"sums.jsonl": [first], "songs.jsonl": [second]}), "alpaca")
    assert [sample.turns[0]["content"] for sample in samples] == ["Add.\n\n1 1", "Sing."]


def test_a_mapping_holds_for_the_files_that_have_its_column(open_mixture: Open) -> None:
    (chats, _), asked = FORMS["messages"], [{"question": "1+1=", "answer": "2"}]
    mapping = {"prompt": "question", "completion": "answer"}
    samples = read_samples(open_mixture({"chats.jsonl": chats, "sums.jsonl": asked}, mapping), None)
    assert samples[1] == Sample(prompt="1+1=", completion="2")
    with pytest.raises(DataError, match="no column quesiton"):
        open_mixture({"chats.jsonl": chats, "sums.jsonl": asked}, {**mapping, "prompt": "quesiton"})


def test_the_same_conversation_is_found_in_another_split_of_other_forms(open_mixture: Open) -> None:
    (chats, _), (sums, _) = FORMS["messages"], FORMS["alpaca"]
    train, test = open_mixture({"chats.jsonl": chats, "sums.jsonl": sums}), open_mixture({"test.jsonl": chats})
    (problem,) = check_overlap({"train": train, "test": test}, columns_of(None))
    assert "1 of 1 examples of test (100.0%) are also in train" in problem.what


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("messages", {"messages": None}, "is missing (null)"),
        ("messages", {"messages": []}, "has no turns"),
        ("messages", {"messages": [turn("user", "hi")]}, "has no assistant turn"),
        (
            "messages",
            {"messages": [turn("human", "hi"), turn("assistant", "ho")]},
            'unknown role in 1 of 2 rows: .*"human"',
        ),
        ("messages", {"messages": [{"role": "user"}, turn("assistant", "ho")]}, "a turn without content"),
        ("messages", {"messages": [{"content": "hi"}, turn("assistant", "ho")]}, "a turn without its keys"),
        ("messages", {"messages": [turn("user", "hi"), turn("assistant", " ")]}, "a blank assistant turn"),
        ("messages", {"messages": [None, turn("assistant", "ho")]}, "a turn that is null"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "hi"}]}, 'unknown role in 1 of 2 rows: .*"robot"'),
        ("prompt-completion", {"prompt": "1+1=", "completion": " "}, "completion is blank in 1 of 2 rows"),
        ("prompt-completion", {"prompt": "1+1=", "completion": None}, r"completion is missing \(null\) in 1 of 2"),
        ("alpaca", {"instruction": "", "input": "", "output": "x"}, "instruction is blank in 1 of 2 rows"),
        ("text", {"text": "\0"}, "holds NUL characters"),
    ],
)
def test_what_cannot_be_learned_is_told_with_its_row(
    form: Any, row: dict[str, Any], expected: str, open_rows: Open
) -> None:
    import re

    (good,), _ = FORMS[form]
    (problem,) = check_samples({"train": open_rows([good, row], form)}, form)
    assert problem.fatal
    assert re.search(re.escape(expected) if "*" not in expected and "\\" not in expected else expected, problem.what)
    assert str(problem.where).endswith("train.jsonl:2")
    assert problem.remedy


def test_many_mistakes_are_told_once(open_rows: Open) -> None:
    rows = [{"messages": [turn("user", "hi")]} for _ in range(5)]
    (problem,) = check_samples({"train": open_rows(rows)}, "messages")
    assert "in 5 of 5 rows" in problem.what
    assert "and 2 more" in problem.what


def test_a_prompt_may_be_empty(open_rows: Open) -> None:
    examples = open_rows([{"prompt": "", "completion": "all of it"}])
    assert check_samples({"train": examples}, "prompt-completion") == []


def test_text_where_conversations_belong_is_refused(open_rows: Open) -> None:
    (problem,) = check_samples({"train": open_rows([{"messages": "user: hi"}])}, "messages")
    assert "messages holds text" in problem.what


def test_few_conversations_are_objects_at_a_time_and_places_stay_right(
    open_rows: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.data.examples._ROWS_TOGETHER", 2)
    monkeypatch.setattr("orchestrator.data.fields.turns._ROWS_TOGETHER", 2)
    good, bad = ([turn("user", "hi"), turn("assistant", text)] for text in ("ho", " "))
    examples = open_rows([{"messages": messages} for messages in (good, good, good, bad, good)])
    assert read_samples(examples.slice(2, 4), "messages")[0].turns == tuple(good)
    (problem,) = check_samples({"train": examples}, "messages")
    assert str(problem.where).endswith("train.jsonl:4")
