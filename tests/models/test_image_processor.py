"""Image processors in two parts: the bytes that are stored and the numbers made of them are the processor's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from orchestrator.errors import ModelError
from orchestrator.models import ImagePreprocessor, SourceModel, load_image_processor, set_image_size

# As their models have them: resize and crop, resize alone, resize by a share, other order of colours, normalised twice.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenet-v2": ("MobileNetV2ImageProcessorPil", {}),
    "mobilenet-v1": ("MobileNetV1ImageProcessorPil", {"size": {"height": 128, "width": 128}, "do_center_crop": False}),
    "vit": ("ViTImageProcessorPil", {}),
    "vit-old": ("ViTImageProcessorPil", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    "convnext-and-resnet": ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    "convnext-large": ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
    "clip": ("CLIPImageProcessorPil", {}),
    "deit": ("DeiTImageProcessorPil", {}),
    "beit": ("BeitImageProcessorPil", {}),
    "mobilevit": ("MobileViTImageProcessorPil", {}),
    "efficientnet": ("EfficientNetImageProcessorPil", {}),
}
SIZES = ((37, 53), (300, 260), (32, 32), (5, 90))


def source_of(folder: Path) -> SourceModel:
    return SourceModel(str(folder), str(folder), None, True, False, None, "recipe.yaml:2 (source.model)")


def build(name: str, folder: Path) -> Any:
    """The processor as it comes back from a folder that it was saved to."""
    class_name, settings = PROCESSORS[name]
    getattr(transformers, class_name)(**settings).save_pretrained(folder)
    return load_image_processor(source_of(folder))


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.mark.parametrize("name", PROCESSORS)
def test_numbers_are_the_processors_own(name: str, tmp_path: Path) -> None:
    processor = build(name, tmp_path)
    maker = ImagePreprocessor(processor, source_of(tmp_path))
    assert maker.is_exact
    for picture in pictures():
        made = maker.make(picture)
        assert (made.dtype, made.shape) == (np.uint8, (maker.height, maker.width, 3))
        expected = processor(picture, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(maker.numbers(made[None]), expected, rtol=0, atol=1e-6)


def test_several_pictures_become_numbers_at_once(tmp_path: Path) -> None:
    maker = ImagePreprocessor(build("vit-old", tmp_path), source_of(tmp_path))
    made = np.stack([maker.make(picture) for picture in pictures()])
    together = maker.numbers(made)
    assert (together.dtype, together.flags.c_contiguous) == (np.float32, True)
    for index in range(len(SIZES)):
        np.testing.assert_array_equal(together[index], maker.numbers(made[index : index + 1])[0])


def test_pillow_computes_whatever_else_is_installed(tmp_path: Path) -> None:
    assert build("vit", tmp_path).backend == "pil"


@pytest.mark.parametrize(
    ("name", "before_crop"),
    [
        ("mobilenet-v2", 110),
        ("mobilenet-v1", 96),
        ("vit", 96),
        ("clip", 96),
        ("deit", 110),
        ("convnext-and-resnet", 96),
    ],
)
def test_another_size_keeps_the_share_that_is_cut_off(name: str, before_crop: int, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    changed = set_image_size(build(name, tmp_path), 96, source)
    maker = ImagePreprocessor(changed, source)
    assert (maker.height, maker.width) == (96, 96)
    assert before_crop in changed.to_dict()["size"].values()
    # What is saved with a model and set again stays as it is.
    changed.save_pretrained(tmp_path / "saved")
    again = set_image_size(load_image_processor(source_of(tmp_path / "saved")), 96, source)
    assert again.to_dict() == changed.to_dict()


def test_a_processor_of_uneven_sizes_needs_one(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessorPil(size={"shortest_edge": 40})
    processor.save_pretrained(tmp_path)
    source = source_of(tmp_path)
    with pytest.raises(ModelError, match=r"images of different sizes\n.*set target\.options\.image_size") as refused:
        ImagePreprocessor(load_image_processor(source), source)
    assert refused.value.problems[0].where == source.where
    maker = ImagePreprocessor(set_image_size(processor, 40, source), source)
    assert (maker.height, maker.width) == (40, 40)


class InFractions(transformers.ViTImageProcessorPil):
    """Scales to fractions before it resizes them, so that brightness between two bytes comes out."""

    def _preprocess(self, images: Any, do_resize: bool, size: Any, do_rescale: bool, **options: Any) -> Any:
        arrays = [torch.tensor(image)[None].float() / 255 for image in images]
        if do_resize:
            arrays = [torch.nn.functional.interpolate(array, (12, 12), mode="bilinear") for array in arrays]
        return transformers.BatchFeature({"pixel_values": [(array[0].numpy() - 0.5) / 0.5 for array in arrays]})


class Stretching(InFractions):
    """Stretches the brightness of each picture by itself, which no table of bytes can tell."""

    def _preprocess(self, images: Any, *arguments: Any, **options: Any) -> Any:
        made = super()._preprocess(images, *arguments, **options)
        made["pixel_values"] = [array / np.abs(array).mean() for array in made["pixel_values"]]
        return made


def test_a_processor_that_resizes_fractions_is_met_within_half_a_step(tmp_path: Path) -> None:
    maker = ImagePreprocessor(InFractions(), source_of(tmp_path))
    assert not maker.is_exact
    assert 1e-3 < maker.error <= 1 / 255 + 1e-6
    picture = pictures()[0]
    expected = maker.processor(picture)["pixel_values"][0]
    assert np.abs(maker.numbers(maker.make(picture)[None])[0] - expected).max() <= 1 / 255 + 1e-6


class OfOneSize(transformers.ViTImageProcessorPil):
    """Makes pictures of one size, whatever it is told."""

    def resize(self, image: Any, size: Any, *arguments: Any, **options: Any) -> Any:
        return super().resize(image, type(size)(height=24, width=24), *arguments, **options)


def test_a_size_that_the_processor_cannot_make_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    assert ImagePreprocessor(OfOneSize(), source).height == 24
    with pytest.raises(ModelError, match="cannot be made to give pictures of 64 x 64"):
        set_image_size(OfOneSize(), 64, source)


def test_a_processor_that_does_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does more than resize, crop and normalise"):
        ImagePreprocessor(Stretching(), source_of(tmp_path))


def test_a_model_without_an_image_processor_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no image processor \(preprocessor_config.json\)"):
        load_image_processor(source_of(tiny_bert))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_image_processor(source_of(tmp_path))


def test_another_setting_is_another_text(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    processor = build("mobilenet-v2", tmp_path)
    texts = {ImagePreprocessor(each, source).settings for each in (processor, set_image_size(processor, 96, source))}
    assert len(texts) == 2
    assert ImagePreprocessor(processor, source).settings in texts
