"""Runs on pictures, from recipe to prediction: convolutional nets with batch norm, and vision transformers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from orchestrator import load_recipe, train
from orchestrator.errors import DataError, InputError, ModelError
from orchestrator.inference.predict import evaluate, predict
from orchestrator.training import hooks
from orchestrator.training.evaluation import Scored

Weights = dict[str, np.ndarray[Any, Any]]
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


@pytest.fixture(scope="module")
def run_pictures(
    tmp_path_factory: pytest.TempPathFactory,
    write_toy: Callable[..., Path],
    small_pictures: Path,
    tiny_mobilenet: Path,
    tiny_vit: Path,
) -> Callable[..., Path]:
    """Train on the toy pictures; each set of overrides once for all tests of this file."""
    root = tmp_path_factory.mktemp("pictures")
    models = {"mobilenet": tiny_mobilenet, "vit": tiny_vit}

    def run(name: str, model: str, *overrides: str, data: Path = small_pictures) -> Path:
        if not (root / name / "result.json").exists():
            target = {"task": "image-classification", "options": {}}
            recipe = write_toy(root / f"{name}.yaml", models[model], data, target=target)
            train(load_recipe(recipe, ["train.steps=6", "train.log_every=1", *overrides]), root / name)
        return root / name

    return run


def weights_of(directory: Path) -> Weights:
    return dict(load_file(directory / "model" / "model.safetensors"))


def predict_rows(model: Path, data: Path | str, **options: Any) -> list[dict[str, Any]]:
    out = io.StringIO()
    predict(model, str(data), None, 16, out, **options)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_it_learns_the_toy_problem(run_pictures: Callable[..., Path]) -> None:
    directory = run_pictures("vit-learns", "vit", "train.steps=60", "train.learning_rate=5e-3")
    result = json.loads((directory / "result.json").read_text())
    assert result["metrics"]["test"]["accuracy"] > 0.9
    assert result["metrics_shown"][:2] == ["accuracy", "f1_macro"]
    assert np.array(result["details"]["test"]["confusion_matrix"]).shape == (3, 3)


@pytest.mark.parametrize("freeze", ["3", "all"])
@pytest.mark.parametrize("cache", ["true", "false"])
def test_frozen_blocks_and_their_statistics_are_bit_identical_after_training(
    freeze: str, cache: str, run_pictures: Callable[..., Path], tiny_mobilenet: Path
) -> None:
    overrides = [f"transfer.freeze={freeze}", f"train.cache_prefix={cache}"]
    after = weights_of(run_pictures(f"frozen-{freeze}-{cache}", "mobilenet", *overrides))
    before = load_file(tiny_mobilenet / "model.safetensors")
    frozen = [f"mobilenet_v2.{part}." for part in ("conv_stem", "layer.0", "layer.1", "layer.2")]
    body = [name for name in after if name.startswith("mobilenet_v2.")]
    expected = body if freeze == "all" else [name for name in body if name.startswith(tuple(frozen))]
    assert len([name for name in expected if name.endswith(STATISTICS)]) >= 27
    moved = {name for name in body if (before[name] != after[name]).any()}
    assert not moved & set(expected)
    assert bool(moved) == (freeze == "3")
    if freeze == "3":
        assert "mobilenet_v2.layer.3.expand_1x1.normalization.running_mean" in moved


def test_augmented_training_is_the_same_again_and_however_batches_are_cut(run_pictures: Callable[..., Path]) -> None:
    def losses(name: str, *overrides: str) -> list[float]:
        directory = run_pictures(name, "vit", "transfer.head.dropout=0", *overrides)
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["split"] == "train"]

    on = "target.options.augment=flip-crop"
    augmented = losses("augmented", on)
    assert losses("augmented-again", on) == augmented
    assert losses("augmented-cut", on, "train.micro_batch_size=4") == pytest.approx(augmented, rel=1e-5)
    assert losses("not-augmented") != pytest.approx(augmented, rel=1e-3)


def test_the_exported_model_has_the_statistics_of_the_best_step(
    run_pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hooks.score
    scores = iter([0.9, 0.1])

    def score_falling(*arguments: Any) -> Scored:
        scored = real(*arguments)
        return Scored({**scored.metrics, "accuracy": next(scores)}, scored.predictions)

    short = run_pictures("three-steps", "mobilenet", "train.steps=3", "train.schedule=constant")
    monkeypatch.setattr(hooks, "score", score_falling)
    overrides = ["train.schedule=constant", "train.evaluate_every=3", "train.save_every=3"]
    long = run_pictures("six-steps", "mobilenet", *overrides)
    assert json.loads((long / "result.json").read_text())["best_step"] == 3
    expected, found = weights_of(short), weights_of(long)
    assert [name for name in found if (found[name] != expected[name]).any()] == []


def test_a_run_that_goes_on_has_the_statistics_of_one_that_was_not_interrupted(
    run_pictures: Callable[..., Path],
) -> None:
    overrides = ["train.save_every=2", "train.evaluate_every=6", "train.keep=3"]
    whole = run_pictures("whole", "mobilenet", *overrides)
    torn = run_pictures("torn", "mobilenet", *overrides)
    (torn / "result.json").unlink()
    for step in (4, 6):
        shutil.rmtree(torn / "checkpoints" / f"step-0000000{step}")
    run_pictures("torn", "mobilenet", *overrides)
    expected, found = weights_of(whole), weights_of(torn)
    assert [name for name in found if (found[name] != expected[name]).any()] == []


def test_predictions_of_the_run_hold_paths_and_no_bytes(
    run_pictures: Callable[..., Path], small_pictures: Path
) -> None:
    table = pq.read_table(run_pictures("plain", "vit") / "predictions.parquet")
    assert table.schema.field("image").type == pa.string()
    assert table["image"][0].as_py() == table["source"][0].as_py() == str(small_pictures / "test" / "blue" / "0.png")


def test_predictions_are_made_for_folders_files_and_columns_of_pictures(
    run_pictures: Callable[..., Path], small_pictures: Path, tmp_path: Path
) -> None:
    directory = run_pictures("vit-learns", "vit", "train.steps=60", "train.learning_rate=5e-3")
    kept = pq.read_table(directory / "predictions.parquet").to_pylist()
    by_folder = predict_rows(directory, small_pictures / "test")
    assert [row["image"] for row in by_folder][:2] == ["blue/0.png", "blue/1.png"]
    assert [row["prediction"] for row in by_folder] == [row["prediction"] for row in kept]
    (alone,) = predict_rows(directory, small_pictures / "test" / "red" / "3.png")
    assert alone["image"] == "3.png"
    assert alone["scores"] == pytest.approx(by_folder[19]["scores"], abs=1e-5)
    files = [small_pictures / "test" / row["image"] for row in by_folder]
    data = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    pq.write_table(pa.table({"picture": data, "number": range(24)}), tmp_path / "rows.parquet")
    by_column = predict_rows(directory, tmp_path / "rows.parquet")
    assert (by_column[0]["picture"], by_column[5]["number"]) == ("0.png", 5)
    assert [row["prediction"] for row in by_column] == [row["prediction"] for row in kept]
    shutil.copytree(small_pictures / "test", tmp_path / "test")
    lines = [json.dumps({"img": f"test/{row['image']}"}) for row in by_folder]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert [row["prediction"] for row in predict_rows(directory, tmp_path / "rows.jsonl")] == [
        row["prediction"] for row in kept
    ]


def test_classes_are_named_after_their_folders_also_where_these_are_numbers(
    run_pictures: Callable[..., Path], small_pictures: Path, tmp_path: Path
) -> None:
    names = {"red": "1.0", "green": "2.0", "blue": "1"}
    for split in ("train", "select", "test"):
        for colour, name in names.items():
            shutil.copytree(small_pictures / split / colour, tmp_path / split / name)
    directory = run_pictures("numbers", "vit", data=tmp_path)
    config = json.loads((directory / "model" / "config.json").read_text())
    assert set(config["id2label"].values()) == set(names.values())
    for row in predict_rows(directory, tmp_path / "test"):
        assert row["prediction"] in names.values()
        assert row["scores"].keys() == set(names.values())
    found = evaluate(directory / "model", str(tmp_path / "test"), "test")
    assert found["metrics"] == evaluate(directory, None, "test")["metrics"]


def test_evaluation_agrees_with_the_run_on_its_data_and_on_a_folder(
    run_pictures: Callable[..., Path], small_pictures: Path
) -> None:
    directory = run_pictures("plain", "vit")
    expected = json.loads((directory / "result.json").read_text())["metrics"]["test"]
    assert evaluate(directory, None, "test")["metrics"] == pytest.approx(expected, abs=1e-5)
    found = evaluate(directory / "model", str(small_pictures / "test"), "test")
    assert found["metrics"] == pytest.approx(expected, abs=1e-5)
    assert found["examples"] == 24


def test_many_pictures_are_predicted_a_part_at_a_time(
    run_pictures: Callable[..., Path], small_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run_pictures("plain", "vit")
    whole = evaluate(directory, None, "test")
    monkeypatch.setattr("orchestrator.inference.predict.EXAMPLES_ENCODED_AT_ONCE", 7)
    in_parts = evaluate(directory, None, "test")
    assert in_parts["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)
    assert in_parts["details"] == whole["details"]


def test_a_broken_picture_is_refused_before_it_is_predicted(run_pictures: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"is empty \(0 bytes\) in 1 of 1 rows"):
        predict_rows(run_pictures("plain", "vit"), tmp_path)


def test_the_exported_folder_works_without_this_package(
    run_pictures: Callable[..., Path], small_pictures: Path
) -> None:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    directory = run_pictures("plain", "vit")
    processor = AutoImageProcessor.from_pretrained(directory / "model")
    model = AutoModelForImageClassification.from_pretrained(directory / "model").eval()
    picture = Image.open(small_pictures / "test" / "red" / "3.png")
    with torch.no_grad():
        scores = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
    (row,) = predict_rows(directory, small_pictures / "test" / "red" / "3.png")
    assert row["scores"] == pytest.approx({model.config.id2label[i]: float(x) for i, x in enumerate(scores)}, abs=1e-5)
    card = (directory / "model" / "README.md").read_text()
    assert "from transformers import AutoModelForImageClassification, AutoImageProcessor" in card
    assert "image_processor = AutoImageProcessor" in card


def test_an_adapter_comes_with_code_that_loads_it(run_pictures: Callable[..., Path], small_pictures: Path) -> None:
    directory = run_pictures("lora", "vit", "transfer.adapter={type: lora, r: 2}")
    code = (directory / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(directory / "model")), names)
    from PIL import Image

    picture = Image.open(small_pictures / "test" / "red" / "3.png")
    scores = names["model"].eval()(**names["image_processor"](picture, return_tensors="pt")).logits.softmax(-1)[0]
    (row,) = predict_rows(directory, small_pictures / "test" / "red" / "3.png")
    assert list(row["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_size_that_the_model_does_not_read_is_refused_before_anything_starts(
    run_pictures: Callable[..., Path],
) -> None:
    with pytest.raises(ModelError, match=r"cannot read the task's inputs: Input image size \(48\*48\)") as refused:
        run_pictures("too-large", "vit", "target.options.image_size=48")
    assert "target.options" in (refused.value.problems[0].where or "")


def test_everything_wrong_with_pictures_and_labels_comes_in_one_report(
    run_pictures: Callable[..., Path], small_pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_pictures, tmp_path / "data")
    (tmp_path / "data/train/red/0.png").write_bytes(b"")
    (tmp_path / "data/test/violet").mkdir()
    shutil.copy(small_pictures / "test/red/0.png", tmp_path / "data/test/violet/0.png")
    (tmp_path / "data/select/red/link.png").symlink_to(small_pictures / "test/red/0.png")
    with pytest.raises(InputError) as refused:
        run_pictures("wrong", "vit", data=tmp_path / "data")
    text = str(refused.value)
    for what in ("is empty (0 bytes)", "leads out of the folder", "violet (1)"):
        assert what in text


@pytest.fixture(scope="module")
def small_convolutions(tmp_path_factory: pytest.TempPathFactory, tiny_mobilenet: Path) -> dict[str, Path]:
    """Folders with a MobileNetV1 a quarter as wide, and a MobileViT, which has batch norms beside linear layers."""
    from transformers import AutoModelForImageClassification, MobileNetV1Config, MobileViTConfig

    configs = {
        "mobilenet-v1": MobileNetV1Config(image_size=32, depth_multiplier=0.25, num_labels=5),
        "mobilevit": MobileViTConfig(
            image_size=32,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
            output_stride=8,
            num_labels=5,
        ),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp(name)
        shutil.copy(tiny_mobilenet / "preprocessor_config.json", folders[name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForImageClassification.from_config(config).train()
            # With statistics of no data nothing comes through many layers.
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            with torch.no_grad():
                model(torch.randn(16, 3, 32, 32))
            model.save_pretrained(folders[name])
    return folders


def test_the_score_on_select_follows_that_on_train_where_batch_norms_are_tuned(
    small_convolutions: dict[str, Path], small_pictures: Path, write_toy: Callable[..., Path], tmp_path: Path
) -> None:
    target = {"task": "image-classification", "options": {}}
    path = write_toy(tmp_path / "recipe.yaml", small_convolutions["mobilenet-v1"], small_pictures, target=target)
    train(load_recipe(path, ["transfer.freeze=50%", "train.epochs=16", "train.global_batch_size=12"]), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [row for row in rows if row["split"] == "select"]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < 0.2
    # Statistics that lag behind, or follow the last batch, have losses above that of a guess, which is 1.1.
    assert max(row["loss"] for row in scores[8:]) < 0.9
    (note,) = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert "instead of the model's 0.9997" in note


def test_statistics_stay_beneath_an_adapter_because_they_are_not_exported_with_it(
    small_convolutions: dict[str, Path], small_pictures: Path, write_toy: Callable[..., Path], tmp_path: Path
) -> None:
    target = {"task": "image-classification", "options": {}}
    path = write_toy(tmp_path / "recipe.yaml", small_convolutions["mobilevit"], small_pictures, target=target)
    overrides = [
        "transfer.freeze=0",
        "transfer.adapter={type: lora, r: 4}",
        "train.steps=8",
        "train.learning_rate=1e-2",
    ]
    train(load_recipe(path, overrides), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    again = evaluate(tmp_path / "run" / "model", str(small_pictures / "test"), "test")
    assert again["metrics"]["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-6)
