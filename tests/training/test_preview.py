"""Examples as the model reads them, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orchestrator import load_recipe
from orchestrator.cli.main import main
from orchestrator.training.preview import first_of_each_file, preview

WriteRecipe = Callable[..., Path]


@pytest.fixture
def language_recipe(write_recipe: WriteRecipe, tiny_gpt2: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{number} and 1 is", "completion": " " + "1" * (number % 7 + 1)} for number in range(80)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    target = {"task": "causal-lm", "data": str(data), "options": {"max_length": 20}}
    return write_recipe(source={"model": str(tiny_gpt2)}, target=target)


def test_what_is_learned_is_marked(language_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(language_recipe), "--count", "2"]) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[:2]
    assert "sums.jsonl:" in first[0]
    assert "tokens," in first[0]
    assert first[1].count("[[") == first[1].count("]]") == 1
    assert first[1].split("[[")[0].endswith(" and 1 is")
    assert "padding" in out.splitlines()[-1]


def test_lengths_and_padding_are_counted(language_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = preview(load_recipe(language_recipe))
    train = found.splits["train"]
    assert train.shortest <= train.median <= train.longest <= 20
    assert train.targets < train.tokens
    assert 0.0 <= found.padding < 0.5
    unpacked = preview(load_recipe(language_recipe, ["target.options.pack=false"]))
    assert found.padding <= unpacked.padding
    assert main(["preview", str(language_recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["examples"] == train.examples


def test_something_of_every_file_is_shown() -> None:
    files = np.array([0, 0, 0, 0, 1, 1, 2])
    assert first_of_each_file(files, 3) == [0, 4, 6]
    assert first_of_each_file(files, 5) == [0, 1, 4, 5, 6]
    assert first_of_each_file(files, 9) == list(range(7))
