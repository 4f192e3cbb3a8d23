"""A trained model used: the same answers for any batch size, those of the run itself, and without this package."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import orchestrator
from orchestrator.errors import DataError, InputError
from orchestrator.inference.merge import export
from orchestrator.inference.predict import evaluate, predict
from orchestrator.inference.trained_model import load_trained_model

TRANSFERS: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"adapter": {"type": "lora", "r": 4}},
    "deep-head": {"head": {"layers": [16]}},
    "decoder": {},
}
every_transfer = pytest.mark.parametrize("transfer", TRANSFERS)

# What a reader of the model card does: run its code, then the model.
PLAIN = """
import json, re, sys
found = {}
for folder in sys.argv[2:]:
    code = re.search("```python\\n(.*?)```", open(f"{folder}/README.md", encoding="utf-8").read(), re.S).group(1)
    names = {}
    exec(code.replace("path/to/this/folder", folder), names)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    texts = json.loads(sys.argv[1])
    found[folder] = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist() for text in texts]
assert "orchestrator" not in sys.modules
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Trainer:
    """Trains on demand, each kind once for all tests of this file."""

    root: Path
    data: Path
    models: dict[str, Path]

    def run(self, transfer: str) -> Path:
        """The run directory of a kind of transfer to the toy problem."""
        return self._run(transfer, self.data, "decoder" if transfer == "decoder" else "encoder", TRANSFERS[transfer])

    def run_on(self, rows: list[dict[str, Any]], name: str) -> Path:
        """A run on other data."""
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return self._run(name, path, "encoder", {}, split={"test": 0.2, "select": 0.2})

    def _run(self, name: str, data: Path, model: str, transfer: dict[str, Any], **target: Any) -> Path:
        directory = self.root / name
        if not directory.exists():
            recipe = {
                "name": name,
                "source": {"model": str(self.models[model])},
                "target": {"task": "text-classification", "data": str(data), **target},
                "transfer": transfer,
                "train": {"epochs": 4, "learning_rate": 3e-3, "global_batch_size": 8, "precision": "fp32"},
            }
            if model == "decoder":
                recipe["target"]["options"] = {"max_length": 64}
            else:
                recipe["target"]["options"] = {"max_length": 32}
            file = self.root / f"{name}.yaml"
            file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            orchestrator.train(orchestrator.load_recipe(file), directory)
        return directory


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_gpt2: Path, small_data: Path) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("runs"), small_data, {"encoder": tiny_bert, "decoder": tiny_gpt2})


def read_result(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return found


def predict_lines(model: Path, data: Path, batch_size: int = 32, **options: Any) -> list[dict[str, Any]]:
    out = io.StringIO()
    count = predict(model, str(data), None, batch_size, out, **options)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(rows) == count
    return rows


def scores_of(rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.array([list(row["scores"].values()) for row in rows])


@every_transfer
def test_predictions_do_not_depend_on_the_batch_size(transfer: str, trainer: Trainer) -> None:
    model, data = trainer.run(transfer), trainer.data / "test.jsonl"
    alone, by_three, together = (predict_lines(model, data, size) for size in (1, 3, 32))
    np.testing.assert_allclose(scores_of(alone), scores_of(by_three), atol=1e-5)
    np.testing.assert_allclose(scores_of(alone), scores_of(together), atol=1e-5)
    given = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in ("text", "label")} for row in together] == given


def assert_same_scores(found: dict[str, float], expected: dict[str, float]) -> None:
    """The same outputs up to another order of sums. Bins of confidence, and the correlation of outputs that hardly
    differ, magnify that."""
    assert found == pytest.approx(expected, abs=1e-3)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@every_transfer
def test_evaluation_agrees_with_the_result_of_the_run(transfer: str, trainer: Trainer) -> None:
    directory = trainer.run(transfer)
    result = read_result(directory)
    for split in ("select", "test"):
        found = evaluate(directory, None, split)
        assert_same_scores(found["metrics"], result["metrics"][split])
        assert found["examples"] == 30
    assert found["details"]["confusion_matrix"] == result["details"]["test"]["confusion_matrix"]
    by_file = evaluate(directory / "model", str(trainer.data / "test.jsonl"), "test")
    assert_same_scores(by_file["metrics"], result["metrics"]["test"])


def test_predictions_of_the_run_are_those_of_predict(trainer: Trainer) -> None:
    directory = trainer.run("full")
    kept = pq.read_table(directory / "predictions.parquet").to_pylist()
    rows = predict_lines(directory, trainer.data / "test.jsonl")
    assert [row["prediction"] for row in kept] == [row["prediction"] for row in rows]
    assert kept[0]["source"].endswith("test.jsonl:1")
    np.testing.assert_allclose(scores_of(kept), scores_of(rows), atol=1e-5)


def test_what_is_exported_loads_without_this_package_as_its_card_says(trainer: Trainer, tmp_path: Path) -> None:
    folders = {transfer: tmp_path / transfer for transfer in TRANSFERS}
    for transfer, folder in folders.items():
        export(trainer.run(transfer), folder, merge=False)
    folders["merged"] = tmp_path / "merged"
    export(trainer.run("adapter"), folders["merged"], merge=True)
    rows = (trainer.data / "test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    texts = json.dumps([json.loads(row)["text"] for row in rows])
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PLAIN, texts, *map(str, folders.values())]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **caches}, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout.splitlines()[-1])
    for transfer, folder in folders.items():
        ours = predict_lines(folder, trainer.data / "test.jsonl")[:6]
        np.testing.assert_allclose(plain[str(folder)], scores_of(ours), atol=1e-5, err_msg=transfer)
    np.testing.assert_allclose(plain[str(folders["adapter"])], plain[str(folders["merged"])], atol=1e-5)
    assert not (folders["merged"] / "adapter_config.json").exists()
    of_run = read_result(trainer.run("adapter"))["metrics"]["test"]
    assert_same_scores(evaluate(folders["merged"], None, "test")["metrics"], of_run)


def test_the_model_card_tells_source_data_and_results(trainer: Trainer) -> None:
    directory = trainer.run("full")
    card = (directory / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["base_model"] == str(trainer.models["encoder"])
    for told in ("3 labels: animal, fruit, vehicle", "60 train, 30 select, 30 test", "not stated by the source"):
        assert told in card
    assert f"{read_result(directory)['metrics']['test']['accuracy']:.4f}" in card
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert recipe is not None
    assert orchestrator.recipe.parse_recipe(recipe.group(1)).name == "full"


def test_predictions_are_written_as_json_lines_or_parquet(trainer: Trainer, tmp_path: Path) -> None:
    model, data = trainer.run("full"), trainer.data / "test.jsonl"
    printed = predict_lines(model, data)
    for name in ("out.jsonl", "out.parquet"):
        assert predict(model, str(data), tmp_path / name, 32, io.StringIO()) == 30
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == printed
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.parquet"]


def test_columns_with_other_names_are_found_or_named(trainer: Trainer, tmp_path: Path) -> None:
    model = trainer.run("full")
    known, unknown = tmp_path / "known.csv", tmp_path / "unknown.csv"
    known.write_text("sentence,id\ni saw a cat today,7\n", encoding="utf-8")
    unknown.write_text("body,kind\ni saw a cat today,animal\n", encoding="utf-8")
    (row,) = predict_lines(model, known)
    assert (row["sentence"], row["id"]) == ("i saw a cat today", "7")
    with pytest.raises(DataError, match=r"no column text; the columns are body, kind"):
        predict_lines(model, unknown)
    (same,) = predict_lines(model, unknown, overrides=["target.columns.text=body"])
    assert same["scores"] == pytest.approx(row["scores"])
    columns = ["target.columns.text=body", "target.columns.label=kind"]
    assert evaluate(model, str(unknown), "test", overrides=columns)["examples"] == 1
    with pytest.raises(InputError, match=r"train.seed=1 has no effect"):
        predict_lines(model, unknown, overrides=["train.seed=1"])


def test_standard_input_is_read_as_json_lines(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(text: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return predict_lines(trainer.run("full"), Path("-"))

    assert len(loader('{"text": "a cat"}\n{"text": "a bus"}\n')) == 2
    for wrong in ("", "a cat", '{"text": " "}', '{"words": "a cat"}'):
        with pytest.raises(DataError) as refused:
            loader(wrong)
        assert str(refused.value.problems[0].where).startswith("standard input")


Wrong = Callable[[Trainer, Path], Any]
WRONG: dict[str, tuple[Wrong, str]] = {
    "no model": (lambda trainer, folder: load_trained_model(folder), "no trained model"),
    "no split": (lambda trainer, _: evaluate(trainer.run("full"), None, "dev"), "no split 'dev'"),
    "no file": (lambda trainer, _: evaluate(trainer.run("full"), "./none.jsonl", "test"), "no such file"),
    "an unknown label": (lambda trainer, folder: evaluate(trainer.run("full"), planet(folder), "test"), "planet"),
    "a blank text": (lambda trainer, folder: predict_lines(trainer.run("full"), Path(blank(folder))), "blank"),
    "a blank text, scored": (lambda trainer, folder: evaluate(trainer.run("full"), blank(folder), "test"), "blank"),
    "batches of none": (lambda trainer, _: predict_lines(trainer.run("full"), trainer.data / "test.jsonl", 0), "0"),
    "an unknown format": (
        lambda trainer, folder: predict(trainer.run("full"), blank(folder), folder / "x.csv", 1, io.StringIO()),
        ".csv",
    ),
    "a folder that is not there": (
        lambda trainer, folder: predict(trainer.run("full"), blank(folder), folder / "a" / "x.jsonl", 1, io.StringIO()),
        "no folder",
    ),
    "an export over something": (lambda trainer, folder: export(trainer.run("full"), folder, False), "exists already"),
    "no adapter to merge": (lambda trainer, folder: export(trainer.run("full"), folder / "x", True), "no adapter"),
}


def planet(folder: Path) -> str:
    path = folder / "planet.jsonl"
    path.write_text('{"text": "look at mars", "label": "planet"}\n', encoding="utf-8")
    return str(path)


def blank(folder: Path) -> str:
    path = folder / "blank.jsonl"
    path.write_text('{"text": " ", "label": "animal"}\n', encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_done_is_refused_with_a_remedy(wrong: str, trainer: Trainer, tmp_path: Path) -> None:
    action, message = WRONG[wrong]
    with pytest.raises(InputError) as refused:
        action(trainer, tmp_path)
    assert message in str(refused.value)
    assert all(problem.remedy for problem in refused.value.problems)
    assert not (tmp_path / "x").exists()


def sentences(count: int) -> list[tuple[str, list[str]]]:
    """Different sentences of one to three words, and the words."""
    draw = random.Random(0)
    words = ["cat", "dog", "apple", "pear", "car", "truck", "boat", "bird"]
    every = {" ".join(chosen): chosen for chosen in (draw.sample(words, draw.randint(1, 3)) for _ in range(10 * count))}
    return [(f"i saw {text}", chosen) for text, chosen in list(every.items())[:count]]


def test_several_labels_are_predicted_and_scored(trainer: Trainer) -> None:
    rows = [{"text": text, "label": sorted(set(words) & {"cat", "dog", "car"})} for text, words in sentences(100)]
    directory = trainer.run_on(rows, "several-labels")
    found = predict_lines(directory, trainer.data / "test.jsonl")
    assert all(row["prediction"] == [name for name, on in row["scores"].items() if on > 0.5] for row in found)
    assert list(found[0]["scores"]) == ["car", "cat", "dog"]
    expected = read_result(directory)["metrics"]["test"]
    assert_same_scores(evaluate(directory, None, "test")["metrics"], expected)


def test_numbers_are_predicted_and_scored(trainer: Trainer) -> None:
    directory = trainer.run_on([{"text": text, "label": len(words) / 2} for text, words in sentences(100)], "numbers")
    found = predict_lines(directory, trainer.data / "test.jsonl")
    assert all(isinstance(row["prediction"], float) for row in found)
    expected = read_result(directory)["metrics"]["test"]
    assert_same_scores(evaluate(directory, None, "test")["metrics"], expected)
    with pytest.raises(DataError, match="not a finite number"):
        evaluate(directory, str(trainer.data / "test.jsonl"), "test")
