"""Token classification: spans as seqeval finds them, tags on first tokens, entities with their characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import open_files
from orchestrator.errors import DataError
from orchestrator.tasks.bases.spans import Span, find_spans, has_prefixes, span_scores
from orchestrator.tasks.bases.tagged_words import first_tokens
from orchestrator.tasks.token_classification import TokenClassification, TokenOptions


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-x I-x O B-x", [("x", 0, 2), ("x", 3, 4)]),
        ("B-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("I-x I-x O I-x", [("x", 0, 2), ("x", 3, 4)]),  # A span may begin with I.
        ("B-x I-y I-y", [("x", 0, 1), ("y", 1, 3)]),  # Another kind begins another span.
        ("O I-x B-x I-x", [("x", 1, 2), ("x", 2, 4)]),
        ("B-x I-x E-x E-x", [("x", 0, 3), ("x", 3, 4)]),
        ("S-x I-x S-x", [("x", 0, 1), ("x", 1, 2), ("x", 2, 3)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_spans_are_those_of_seqeval(tags: str, expected: list[Any]) -> None:
    assert find_spans(tags.split(), prefixed=True) == [Span(*each) for each in expected]


def test_tags_without_prefixes_are_kinds_of_words_in_a_row() -> None:
    assert has_prefixes(["O", "B-x", "I-x"]) and not has_prefixes(["O", "x", "B-x"])
    assert find_spans(["x", "x", "O", "x", "y-z"], prefixed=False) == [
        Span("x", 0, 2),
        Span("x", 3, 4),
        Span("y-z", 4, 5),
    ]


def test_a_span_is_right_where_kind_start_and_end_are() -> None:
    found = [[Span("x", 0, 2), Span("y", 3, 4)], [Span("x", 0, 1)], []]
    expected = [[Span("x", 0, 2), Span("x", 3, 4)], [Span("x", 0, 2)], [Span("z", 0, 1)]]
    scores = span_scores(found, expected)
    assert scores["overall"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 4, "f1-score": 2 / 7, "support": 4})
    assert scores["per_class"]["x"] == pytest.approx({"precision": 0.5, "recall": 1 / 3, "f1-score": 0.4, "support": 3})
    assert scores["per_class"]["z"]["recall"] == scores["per_class"]["y"]["precision"] == 0
    assert span_scores([[]], [[]])["overall"]["f1-score"] == 0


def test_the_first_token_of_a_word_stands_for_it() -> None:
    # [CLS] New York ##ers , ?, [SEP]: a word of characters that the tokenizer drops has no token; the last one is cut.
    offsets = [(0, 0), (0, 3), (3, 8), (8, 11), (11, 12), (0, 0)]
    assert first_tokens(["New", "Yorkers", "\u200b", "cut"], offsets) == [1, 2, -1, -1]


def read(path: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_files([path], TokenClassification.columns(TokenOptions(**options)), {})


def test_whole_numbers_are_named_by_the_recipe(tmp_path: Path) -> None:
    names = ["O", "B-x", "I-x"]
    rows = [{"tokens": ["a", "b"], "ner_tags": [1, 2]}, {"tokens": ["c"], "ner_tags": [0]}]
    examples = read(tmp_path / "train.jsonl", rows, label_names=names)
    assert examples.table["tags"].to_pylist() == [["B-x", "I-x"], ["O"]]
    assert TokenClassification.prepare(TokenOptions(), {"train": examples}).label_names == tuple(names)
    with pytest.raises(DataError, match=r"train.jsonl:2.*tags holds 3 .*numbered 0 to 2"):
        read(tmp_path / "train.jsonl", [rows[0], {"tokens": ["c"], "ner_tags": [3]}], label_names=names)


def test_entities_have_their_characters_in_the_words_joined_by_spaces(tmp_path: Path) -> None:
    examples = read(tmp_path / "train.jsonl", [{"tokens": ["we", "saw", "New", "York", "."], "ner_tags": ["O"] * 5}])
    task = TokenClassification(TokenOptions(), ("O", "B-place", "I-place"))
    predictions = {"tags": [np.array([0, 0, 1, 2, 0])], "probabilities": [np.array([1, 1, 0.5, 0.75, 1])]}
    (entities,) = task.prediction_rows(predictions, examples)["prediction"]
    assert entities == [{"label": "place", "text": "New York", "start": 7, "end": 15, "score": 0.625}]
