"""What is wrong is refused before anything starts: exit code 2, the place, the value, a remedy, no run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.cli.main import main

Write = Callable[[Path], Any]


@dataclass(frozen=True)
class Wrong:
    """One mistake, and what its message must hold."""

    name: str
    place: str
    """Part of `where`: a file with its line, or the recipe's dotted path."""
    value: str
    """Part of `what`: the value found."""
    remedy: str
    """Part of the remedy."""


@dataclass(frozen=True)
class WrongRecipe(Wrong):
    """`old` in the recipe's text becomes `new`."""

    old: str
    new: str


@dataclass(frozen=True)
class WrongData(Wrong):
    """`write` damages a copy of the good data in its folder."""

    write: Write
    options: tuple[str, ...] = ()


GOOD_RECIPE = """\
name: toy
source:
  model: MODEL
target:
  task: text-classification
  data: DATA
  columns: {text: text, label: label}
  options: {max_length: 32}
transfer:
  freeze: 1
  head: {dropout: 0.1}
  adapter: null
train:
  epochs: 2
  learning_rate: 1e-3
  warmup_ratio: 0.1
  global_batch_size: 8
scale:
  storage: runs
  workers: 1
"""

BOMB = "\n".join(["bomb0: &b0 [x, x]", *(f"bomb{n}: &b{n} [*b{n - 1}, *b{n - 1}, *b{n - 1}]" for n in range(1, 30))])
RECIPES = [
    WrongRecipe("unknown key", "recipe.yaml:15", "learning_rat", "learning_rate", "learning_rate:", "learning_rat:"),
    WrongRecipe("unknown section", "recipe.yaml:13", "trian", "train", "train:\n", "trian:\n"),
    WrongRecipe("duplicate key", "recipe.yaml:15", "epochs", "one", "  learning_rate", "  epochs: 3\n  learning_rate"),
    WrongRecipe("rate below 0", "recipe.yaml:15", "-0.001", "default", "1e-3", "-1e-3"),
    WrongRecipe("rate is NaN", "recipe.yaml:15", "nan", "default", "1e-3", ".nan"),
    WrongRecipe("rate is text", "recipe.yaml:15", "'fast'", "default", "1e-3", "fast"),
    WrongRecipe("no epochs", "recipe.yaml:14", "0", "default", "epochs: 2", "epochs: 0"),
    WrongRecipe("warm-up beyond the end", "recipe.yaml:16", "1.5", "default", "warmup_ratio: 0.1", "warmup_ratio: 1.5"),
    WrongRecipe("freeze below 0", "recipe.yaml:10", "-1", "default", "freeze: 1", "freeze: -1"),
    WrongRecipe("freeze beyond the layers", "recipe.yaml:10", "7", "2", "freeze: 1", "freeze: 7"),
    WrongRecipe("freeze in words", "recipe.yaml:10", "'al'", "all", "freeze: 1", "freeze: al"),
    WrongRecipe("rank 0", "recipe.yaml:12", "0", "default", "adapter: null", "adapter: {type: lora, r: 0}"),
    WrongRecipe(
        "adapter target that is nowhere",
        "transfer.adapter.targets",
        "qery",
        "query",
        "adapter: null",
        "adapter: {type: lora, targets: [qery]}",
    ),
    WrongRecipe(
        "adapter in a frozen body",
        "recipe.yaml:12",
        "all",
        "lower",
        "freeze: 1\n  head: {dropout: 0.1}\n  adapter: null",
        "freeze: all\n  head: {dropout: 0.1}\n  adapter: {type: lora}",
    ),
    WrongRecipe("unknown task", "recipe.yaml:5", "txext-classification", "text-classification", "task: t", "task: tx"),
    WrongRecipe("unknown option", "recipe.yaml:8", "max_len", "max_length", "max_length: 32", "max_len: 32"),
    WrongRecipe("option of the wrong type", "recipe.yaml:8", "'32'", "quotes", "max_length: 32", "max_length: '32'"),
    WrongRecipe("longer than the model", "recipe.yaml:8", "512", "64", "max_length: 32", "max_length: 512"),
    WrongRecipe("batch that does not divide", "train.global_batch_size", "8", "6 or 9", "workers: 1", "workers: 3"),
    WrongRecipe(
        "offload without a stage",
        "recipe.yaml:21",
        "optimizer",
        "zero_stage",
        "workers: 1",
        "workers: 1\n  offload: optimizer",
    ),
    WrongRecipe("model that is nowhere", "recipe.yaml:3", "MODELS", "config.json", "model: MODEL", "model: ./MODELS"),
    WrongRecipe("data that are nowhere", "DATAS", "no such file", "check", "data: DATA", "data: ./DATAS"),
    WrongRecipe("unknown column", "recipe.yaml:7", "labels", "label", "label: label}", "labels: label}"),
    WrongRecipe("column the data lack", "train.jsonl", "intent", "label", "label: label}", "label: intent}"),
    WrongRecipe(
        "metric the task lacks",
        "metric",
        "acuracy",
        "accuracy",
        "train:\n",
        "train:\n  early_stopping: {metric: acuracy}\n",
    ),
    WrongRecipe("name that is a path", "recipe.yaml:1", "../toy", "change", "name: toy", "name: ../toy"),
    WrongRecipe(
        "python tag", "recipe.yaml:3", "python", "", "model: MODEL", "model: !!python/object/apply:os.system [ls]"
    ),
    WrongRecipe("billion laughs", "recipe.yaml", "alias", "", "name: toy\n", f"name: toy\n{BOMB}\n"),
    WrongRecipe("not YAML", "recipe.yaml", "", "", "name: toy", "name: [toy"),
    WrongRecipe("missing section", "recipe.yaml", "target.task", "add it", "  task: text-classification\n", ""),
    WrongRecipe(
        "unpinned code",
        "recipe.yaml:4",
        "trust_remote_code",
        "commit",
        "model: MODEL",
        "model: MODEL\n  trust_remote_code: true",
    ),
]


def text(content: str | bytes, name: str = "train.jsonl") -> Write:
    """Write the whole file anew."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def line(number: int, content: str, name: str = "train.jsonl") -> Write:
    """Put `content` in the place of one line (from 1)."""

    def write(folder: Path) -> None:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        lines[number - 1] = content
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def row(number: int, name: str = "train.jsonl", **values: Any) -> Write:
    """Change values of one row."""

    def write(folder: Path) -> None:
        old = json.loads((folder / name).read_text(encoding="utf-8").splitlines()[number - 1])
        line(number, json.dumps({**old, **values}), name)(folder)

    return write


def every(name: str = "train.jsonl", **values: Any) -> Write:
    """Change the same values in all rows."""

    def write(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        (folder / name).write_text("".join(json.dumps({**row, **values}) + "\n" for row in rows), encoding="utf-8")

    return write


def keep(folder: Path) -> None:
    """The data are good; an override is what is wrong with them."""


def without(name: str, column: str) -> Write:
    def write(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        kept = [{key: value for key, value in row.items() if key != column} for row in rows]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    return write


def csv(content: str | bytes) -> Write:
    """Train on this CSV file instead."""

    def write(folder: Path) -> None:
        (folder / "train.jsonl").unlink()
        text(content, "train.csv")(folder)

    return write


def torn_parquet(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    path = folder / "train.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100, "label": ["x"] * 100}), path)
    path.write_bytes(path.read_bytes()[:200])


def leaked(folder: Path) -> None:
    (folder / "test.jsonl").write_bytes((folder / "train.jsonl").read_bytes())


DATA = [
    WrongData("missing file", "data/tran.jsonl", "no such file", "train.jsonl", keep, ("target.data=data/tran.jsonl",)),
    WrongData("zero bytes", "train.jsonl", "empty", "write", text("")),
    WrongData("no rows", "train.csv", "no examples", "add", csv("text,label\n")),
    WrongData("missing column", "test.jsonl", "label", "target.columns", without("test.jsonl", "label")),
    WrongData("duplicate columns", "train.csv:1", "text", "", csv("text,text,label\na,b,x\n")),
    WrongData("text is a number", "train.jsonl", "whole numbers", "text", every(text=3)),
    WrongData("values of several types", "train.jsonl:5", "3", "", row(5, text=3)),
    WrongData("null text", "train.jsonl:7", "null", "remove", row(7, text=None)),
    WrongData("blank text", "train.jsonl:7", "blank", "remove", row(7, text="  ")),
    WrongData("NUL in a text", "train.jsonl:9", "NUL", "remove", row(9, text="a\0b")),
    WrongData("not UTF-8", "train.jsonl", "UTF-8", "", text(b'{"text": "caf\xe9", "label": "fruit"}\n')),
    WrongData("malformed line", "train.jsonl:4", "JSON", "one object", line(4, '{"text": "a cat", "label"')),
    WrongData("line that is no object", "train.jsonl:4", "object", "as an object", line(4, '["a cat", "animal"]')),
    WrongData("ragged CSV", "train.csv:3", "3", "", csv("text,label\na cat,animal\na pear,ripe,fruit\n")),
    WrongData("CSV by semicolons", "train.csv:1", "semicolons", "commas", csv("text;label\na cat;animal\n")),
    WrongData("truncated Parquet", "train.parquet", "Parquet", "", torn_parquet),
    WrongData("null label", "train.jsonl:3", "missing", "label these rows", row(3, label=None)),
    WrongData("blank label", "test.jsonl:2", "missing", "label these rows", row(2, "test.jsonl", label=" ")),
    WrongData(
        "class only in test", "test.jsonl:6", "planet", "training examples", row(6, "test.jsonl", label="planet")
    ),
    WrongData("class only in select", "select.jsonl:1", "planet", "training", row(1, "select.jsonl", label="planet")),
    WrongData("a single class", "train.jsonl:1", "animal", "two classes", every(label="animal")),
    WrongData("test is in train", "test.jsonl:1", "60 of 60", "remove them", leaked),
    WrongData(
        "named class without example",
        "train.jsonl",
        "planet",
        "list of label names",
        keep,
        ("target.options.label_names=[animal, fruit, vehicle, planet]",),
    ),
    WrongData(
        "label that no class is named",
        "train.jsonl",
        "vehicle",
        "label names",
        keep,
        ("target.options.label_names=[animal, fruit]",),
    ),
    WrongData(
        "words where numbers are needed",
        "train.jsonl:1",
        "animal",
        "number",
        keep,
        ("target.options.problem_type=regression",),
    ),
    WrongData(
        "one label where lists are needed",
        "train.jsonl:1",
        "multi_label_classification",
        "problem_type",
        keep,
        ("target.options.problem_type=multi_label_classification",),
    ),
    WrongData(
        "fewer than a batch", "train.global_batch_size", "60", "60 or less", keep, ("train.global_batch_size=64",)
    ),
    WrongData(
        "unknown format", "train.xlsx", ".xlsx", "convert", text("x", "train.xlsx"), ("target.data=data/train.xlsx",)
    ),
]


@pytest.fixture
def lay_out(tmp_path: Path, tiny_bert: Path, small_data: Path) -> Callable[[str], Path]:
    """A folder with a copy of the good data and a recipe of this text; returns the recipe."""
    (tmp_path / "data").mkdir()
    for file in small_data.iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())

    def write(content: str) -> Path:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(content.replace("MODEL\n", f"{tiny_bert}\n").replace("DATA\n", "data\n"), encoding="utf-8")
        return recipe

    return write


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """Run `train`; check what is true of every refusal, and give the problems of `--json`."""
    code = main(["train", *arguments, "--json"])
    output = capsys.readouterr()
    assert code == 2, output
    assert "Traceback" not in output.err
    found = json.loads(output.out)
    assert (found["status"], found["exit_code"]) == ("error", 2)
    problems: list[dict[str, Any]] = found["problems"]
    for problem in problems:
        assert problem["what"] in output.err.replace("\n", " ") or problem["what"].splitlines()[0] in output.err
    return problems


def check_message(problems: list[dict[str, Any]], wrong: Wrong) -> None:
    """One of the problems names place, value and remedy."""
    fatal = [problem for problem in problems if problem["fatal"]]
    assert any(
        wrong.place in f"{problem['where']} {problem['what']}"
        and wrong.value in f"{problem['where']} {problem['what']}"
        and problem["remedy"]
        and wrong.remedy in problem["remedy"]
        for problem in fatal
    ), json.dumps(fatal, indent=1)


@pytest.mark.parametrize("wrong", RECIPES, ids=lambda wrong: wrong.name)
def test_a_wrong_recipe_is_refused(
    wrong: WrongRecipe,
    lay_out: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wrong.old in GOOD_RECIPE
    recipe = lay_out(GOOD_RECIPE.replace(wrong.old, wrong.new, 1))
    check_message(refuse(capsys, str(recipe)), wrong)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong", DATA, ids=lambda wrong: wrong.name)
def test_wrong_data_are_refused(
    wrong: WrongData,
    lay_out: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = lay_out(GOOD_RECIPE)
    wrong.write(tmp_path / "data")
    check_message(refuse(capsys, str(recipe), *wrong.options), wrong)
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_of_recipe_and_data_are_told_at_once(
    lay_out: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = GOOD_RECIPE.replace("epochs: 2", "epochs: 0").replace("freeze: 1", "freeze: -1").replace("1e-3", "-1")
    assert len(refuse(capsys, str(lay_out(wrong)))) == 3
    row(3, label=None)(tmp_path / "data")
    line(4, "{", "test.jsonl")(tmp_path / "data")
    recipe = lay_out(GOOD_RECIPE.replace("{max_length: 32}", "{max_length: 0}").replace("MODEL", "./nowhere"))
    places = " ".join(str(problem["where"]) for problem in refuse(capsys, str(recipe)))
    assert "recipe.yaml:3" in places
    assert "recipe.yaml:8" in places


GOOD_DATA: list[tuple[str, Write, tuple[str, ...]]] = [
    ("as it is", keep, ()),
    ("a byte-order mark", lambda folder: add_mark(folder / "train.jsonl"), ()),
    ("Windows line ends", lambda folder: end_lines(folder / "train.jsonl"), ()),
    ("blank lines", line(60, ""), ()),
    ("further columns", every(id=7, note=None), ()),
    ("one file", keep, ("target.data=data/train.jsonl",)),
    ("quoted numbers", keep, ("train.learning_rate=1e-3", "transfer.freeze=50%")),
]


def add_mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def end_lines(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("good", GOOD_DATA, ids=[case[0] for case in GOOD_DATA])
def test_what_is_good_passes_without_a_false_alarm(
    good: tuple[str, Write, tuple[str, ...]],
    lay_out: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, write, options = good
    recipe = lay_out(GOOD_RECIPE)
    write(tmp_path / "data")
    assert main(["validate", str(recipe), *options, "--strict", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["warnings"] == []
    assert output.err == ""


def test_warnings_are_fatal_only_when_strict(
    lay_out: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = lay_out(GOOD_RECIPE)
    first = (tmp_path / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    line(4, first, "test.jsonl")(tmp_path / "data")
    assert main(["validate", str(recipe)]) == 0
    assert "warning: " in capsys.readouterr().err
    (problem,) = refuse(capsys, str(recipe), "--strict")
    assert "test.jsonl:4" in problem["where"]


def test_a_wrong_recipe_is_refused_before_torch_and_ray_are_imported(
    lay_out: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = lay_out(GOOD_RECIPE.replace("epochs: 2", "epochs: 0"))
    code = """
import sys
from orchestrator.cli.main import main
code = main(sys.argv[1:])
assert not {"torch", "ray", "transformers"} & set(sys.modules)
sys.exit(code)
"""
    command = [sys.executable, "-c", code, "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "recipe.yaml:14 (train.epochs)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
