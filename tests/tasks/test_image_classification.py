"""Image classification: what the model is fed, what changes at random and what does not, labels, checks, scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from orchestrator.data import Examples, open_files
from orchestrator.data.cache import as_table
from orchestrator.errors import DataError
from orchestrator.models import find_source
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Batch
from orchestrator.tasks.bases.augmentation import augment
from orchestrator.tasks.bases.classification import EncodedExamples
from orchestrator.tasks.bases.label_scores import single_label_metrics, softmax
from orchestrator.tasks.image_classification import ImageClassification


def recipe_with(model: Path) -> Recipe:
    target = {"task": "image-classification", "data": "x"}
    return Recipe.model_validate({"name": "test", "source": {"model": str(model)}, "target": target})


def open_split(folder: Path) -> Examples:
    return open_files([folder], ImageClassification.columns(ImageClassification.Options()), {})


@pytest.fixture
def train(small_pictures: Path) -> Examples:
    return open_split(small_pictures / "train")


def encode(train: Examples, model: Path, **options: Any) -> EncodedExamples:
    task = ImageClassification.prepare(ImageClassification.Options(**options), {"train": train})
    processor, _ = task.load_processor(find_source(recipe_with(model)))
    return task.wrap(as_table(task.encode(train, processor)), processor)


@pytest.mark.parametrize("model", ["tiny_mobilenet", "tiny_vit"])
def test_batches_hold_what_the_image_processor_gives(
    model: str, train: Examples, small_pictures: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoImageProcessor

    folder = request.getfixturevalue(model)
    encoded = encode(train, folder)
    rows = np.array([40, 0, 17])
    files = [train.where(row) for row in rows]
    expected = AutoImageProcessor.from_pretrained(folder)([Image.open(file) for file in files], return_tensors="np")
    batch = encoded.batch(rows)
    pixels = batch.inputs["pixel_values"]
    np.testing.assert_allclose(pixels, expected["pixel_values"], rtol=0, atol=1e-6)
    assert pixels.dtype == np.float32
    assert [encoded_label(name) for name in files] == batch.targets["labels"].tolist()
    assert (len(encoded), encoded.counts["targets"].sum()) == (48, 48)
    assert encoded.targets()["label"].tolist() == sorted(encoded.targets()["label"].tolist())


def encoded_label(file: str) -> int:
    return ("blue", "green", "red").index(Path(file).parent.name)


def test_beside_stored_features_stand_only_the_labels(train: Examples, tiny_vit: Path) -> None:
    beside = encode(train, tiny_vit).extra_inputs(np.array([47, 0]))
    assert {name: values.tolist() for name, values in beside.targets.items()} == {"labels": [2, 0]}
    assert not beside.inputs


def test_pictures_come_in_the_size_that_is_asked_for(train: Examples, tiny_mobilenet: Path) -> None:
    assert encode(train, tiny_mobilenet).batch(np.arange(2)).inputs["pixel_values"].shape == (2, 3, 32, 32)
    encoded = encode(train, tiny_mobilenet, image_size=16)
    assert encoded.batch(np.arange(2)).inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_what_is_drawn_depends_on_the_epoch_and_the_example_alone(train: Examples, tiny_vit: Path) -> None:
    encoded = encode(train, tiny_vit, augment="flip-crop")
    assert encoded.augments
    together = encoded.batch(np.arange(20), stream=(0, 3)).inputs["pixel_values"]
    for cut in ([7], [19, 7, 2]):
        np.testing.assert_array_equal(encoded.batch(np.array(cut), stream=(0, 3)).inputs["pixel_values"], together[cut])
    plain = encoded.batch(np.arange(20)).inputs["pixel_values"]
    changed = [(one != other).any() for one, other in zip(together, plain, strict=True)]
    assert sum(changed) > 15
    assert (encoded.batch(np.arange(20), stream=(0, 4)).inputs["pixel_values"] != together).any()
    assert (encoded.batch(np.arange(20), stream=(1, 3)).inputs["pixel_values"] != together).any()


def test_nothing_is_drawn_in_evaluation_or_when_it_is_off(train: Examples, tiny_vit: Path) -> None:
    plain = encode(train, tiny_vit)
    assert not plain.augments
    rows = np.arange(10)
    expected = plain.batch(rows).inputs["pixel_values"]
    np.testing.assert_array_equal(plain.batch(rows, stream=(0, 1)).inputs["pixel_values"], expected)
    np.testing.assert_array_equal(encode(train, tiny_vit, augment="flip").batch(rows).inputs["pixel_values"], expected)


PICTURES = np.random.default_rng(0).integers(0, 256, (64, 16, 24, 3), dtype=np.uint8)


def test_flipping_mirrors_about_half_of_the_pictures() -> None:
    changed = augment(PICTURES, "flip", (0, 0), np.arange(64))
    is_same = (changed == PICTURES).all((1, 2, 3))
    is_mirrored = (changed == PICTURES[:, :, ::-1]).all((1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    assert 20 < is_mirrored.sum() < 44


def test_cropping_moves_within_an_eighth_of_the_mirrored_border() -> None:
    changed = augment(PICTURES, "flip-crop", (0, 0), np.arange(64))
    moves = set()
    for picture, before in zip(changed, PICTURES, strict=True):
        padded = np.pad(before, ((2, 2), (3, 3), (0, 0)), mode="reflect")
        found = [
            (down, across, flipped)
            for down in range(5)
            for across in range(7)
            for flipped in (False, True)
            if (picture == padded[down : down + 16, across : across + 24][:, :: -1 if flipped else 1]).all()
        ]
        assert len(found) == 1
        moves.update(found)
    assert {down for down, _, _ in moves} == set(range(5))
    assert {across for _, across, _ in moves} == set(range(7))


def test_the_encoding_is_kept_by_what_decides_it(train: Examples, tiny_mobilenet: Path, tiny_vit: Path) -> None:
    def parts(model: Path, **options: Any) -> str:
        task = ImageClassification.prepare(ImageClassification.Options(**options), {"train": train})
        return json.dumps(task.cache_parts(task.load_processor(find_source(recipe_with(model)))[0]))

    assert parts(tiny_vit) == parts(tiny_vit, augment="flip")
    different = [(tiny_vit, {}), (tiny_mobilenet, {}), (tiny_mobilenet, {"image_size": 16})]
    different.append((tiny_vit, {"label_names": ["red", "green", "blue"]}))
    assert len({parts(model, **options) for model, options in different}) == 4


def test_label_names_of_the_recipe_set_the_order_of_the_labels(train: Examples, tiny_vit: Path) -> None:
    task = ImageClassification.prepare(
        ImageClassification.Options(label_names=["red", "green", "blue"]), {"train": train}
    )
    assert task.describe() == "3 labels: red, green, blue"
    assert task.config_changes()["id2label"] == {0: "red", 1: "green", 2: "blue"}
    encoded = encode(train, tiny_vit, label_names=["red", "green", "blue"])
    assert encoded.targets()["label"][[0, 47]].tolist() == [2, 0]
    config = SimpleNamespace(id2label={0: "x", 1: "y"}, num_labels=2, problem_type=None)
    assert ImageClassification.restore(ImageClassification.Options(), config).label_names == ("x", "y")


def test_a_broken_picture_that_nobody_checked_is_named(tmp_path: Path, tiny_vit: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a/1\.png: the picture is in none of the formats"):
        encode(open_split(tmp_path), tiny_vit)


def test_numbers_that_are_no_classes_are_refused(train: Examples, tmp_path: Path) -> None:
    data = [Path(train.where(row)).read_bytes() for row in (0, 20)]
    pq.write_table(pa.table({"image": data, "label": [0.5, 1.5]}), tmp_path / "train.parquet")
    examples = open_split(tmp_path / "train.parquet")
    (problem,) = ImageClassification.check(ImageClassification.Options(), {"train": examples}, recipe_with(tmp_path))
    assert "which is no class" in problem.what


def test_lists_of_labels_are_several_labels_for_each_picture(train: Examples, tmp_path: Path, tiny_vit: Path) -> None:
    data = [Path(train.where(row)).read_bytes() for row in (0, 20, 40)]
    pq.write_table(
        pa.table({"image": data, "label": [["red"], ["red", "round"], ["round"]]}), tmp_path / "train.parquet"
    )
    examples = open_split(tmp_path / "train.parquet")
    problems = ImageClassification.check(ImageClassification.Options(), {"train": examples}, recipe_with(tmp_path))
    assert not any(problem.fatal for problem in problems)
    encoded = encode(examples, tiny_vit)
    assert encoded.batch(np.array([1, 2])).targets["labels"].tolist() == [[1, 1], [0, 1]]
    task = ImageClassification.prepare(ImageClassification.Options(), {"train": examples})
    assert task.config_changes()["problem_type"] == "multi_label_classification"
    assert task.describe() == "any of 2 labels: red, round"


def test_a_model_of_other_channels_is_refused(train: Examples) -> None:
    task = ImageClassification.prepare(ImageClassification.Options(), {"train": train})
    assert task.check_model(None, SimpleNamespace(num_channels=3), recipe_with(Path("x"))) == []
    (problem,) = task.check_model(None, SimpleNamespace(num_channels=1), recipe_with(Path("x")))
    assert "reads pictures of 1 channels" in problem.what


def test_the_example_has_the_size_that_the_model_is_fed(train: Examples, tiny_mobilenet: Path) -> None:
    task = ImageClassification.prepare(ImageClassification.Options(image_size=48), {"train": train})
    processor, _ = task.load_processor(find_source(recipe_with(tiny_mobilenet)))
    assert task.example_inputs(processor)["pixel_values"].shape == (1, 3, 48, 48)


def test_loss_and_scores_are_those_of_one_label(train: Examples) -> None:
    task = ImageClassification.prepare(ImageClassification.Options(), {"train": train})
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    labels = torch.tensor([0, 1])
    outputs = SimpleNamespace(logits=logits.bfloat16())
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    batch = Batch({}, {"labels": labels})
    assert float(task.loss(outputs, batch, {"targets": 2})) == pytest.approx(float(expected) / 2)
    predictions = {name: values.numpy() for name, values in task.predict(outputs, batch).items()}
    targets = {"label": labels.numpy()}
    expected = single_label_metrics(softmax(predictions["logits"]), targets["label"])
    assert task.metrics(predictions, targets) == expected
    assert {metric: task.score(metric, predictions, targets) for metric in expected} == expected
    assert set(task.metrics_shown) <= set(task.metric_directions()) - {task.name}
    assert task.details(predictions, targets)["confusion_matrix"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    rows = task.prediction_rows(predictions, train)
    assert rows["prediction"] == ["blue", "red"]
    assert rows["scores"][0] == pytest.approx({"blue": 0.787, "green": 0.107, "red": 0.107}, abs=1e-3)
