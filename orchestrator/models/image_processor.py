"""An image processor of transformers in two parts: the expensive one, whose result can be stored, and the rest.

A processor decodes, resizes and crops an image, which gives bytes. Then it rescales and normalises each channel, which
maps each of 256 values to a number. The bytes are stored. The map is read from the processor itself, so that numbers
are the same as its own to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import ModelError, Problem
from orchestrator.models.source import SourceModel

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float32]

NUM_VALUES = 256
EXACT = 1e-6
# The error of a processor that resizes floating-point numbers is at most half a step between two of the 256 values.
# One with a larger error does something else.
FARTHEST_OFF = 0.6
_SAMPLE_SIZES = ((48, 64), (67, 41))  # height and width of the sample images
# Raised by processors for options that they do not know.
_FAILURES = (TypeError, ValueError, AttributeError, KeyError, IndexError)


class ImagePreprocessor:
    """Preprocesses images as an image processor does, in two steps.

    Attributes:
        processor: the image processor of transformers.
        values: the number for each byte; float32, [3, 256]: channel, byte.
        height: height of its output in pixels; likewise `width`.
        error: the largest difference from the processor's own numbers, in the sample images.
    """

    def __init__(self, processor: Any, source: SourceModel) -> None:
        """Try the processor on sample images.

        Raises:
            ModelError: its images have different sizes, or it does more than these two steps.
        """
        self.processor = processor
        try:
            _process(processor, _sample_images()[0])
            self.values = _find_values(processor)
            made = [self.make(picture) for picture in _sample_images()]
            own = [_process(processor, picture) for picture in _sample_images()]
        except _FAILURES as error:
            raise ModelError(_unusable(source, f": {error}")) from error
        sizes = {picture.shape[:2] for picture in made}
        if len(sizes) > 1:
            what = f"the image processor of {source.name!r} returns images of different sizes"
            raise ModelError(Problem(what, source.where, "set target.options.image_size, such as 224"))
        ((self.height, self.width),) = sizes
        steps = float(np.diff(self.values, axis=1).max())
        pairs = zip(made, own, strict=True)
        self.error = max(float(np.abs(self.numbers(picture[None])[0] - numbers).max()) for picture, numbers in pairs)
        if self.error > FARTHEST_OFF * steps:
            raise ModelError(_unusable(source, " does more than resize, crop and normalise"))

    @property
    def is_exact(self) -> bool:
        """Whether the numbers are those of the processor."""
        return self.error <= EXACT

    @property
    def settings(self) -> str:
        """Return everything that determines the output for an image, except for the versions of libraries."""
        text: str = self.processor.to_json_string()
        return text

    def save_pretrained(self, folder: Path) -> None:
        """Save the image processor as transformers does."""
        self.processor.save_pretrained(folder)

    def make(self, picture: Any) -> Pixels:
        """Return the image as bytes before it is normalised; [height, width, 3].

        Args:
            picture: a PIL image in RGB.
        """
        found = _process(self.processor, picture, do_rescale=False, do_normalize=False)
        if found.dtype == np.uint8:
            return np.ascontiguousarray(found.transpose(1, 2, 0))
        # It normalises regardless, or resizes after normalising: use the bytes whose numbers are nearest.
        numbers = _process(self.processor, picture)
        nearest = [_nearest(values, colour) for values, colour in zip(self.values, numbers, strict=True)]
        return np.stack(nearest, axis=-1)

    def numbers(self, pictures: Pixels) -> Numbers:
        """Normalise bytes [n, height, width, 3] to the model's input, float32 [n, 3, height, width]."""
        found = np.empty((len(pictures), 3, *pictures.shape[1:3]), dtype=np.float32)
        for picture, numbers in zip(pictures, found, strict=True):
            for colour, values in enumerate(self.values):
                # Into contiguous memory and without bounds checks, which a byte does not need: four times as fast.
                values.take(picture[..., colour], out=numbers[colour], mode="clip")
        return found


def set_image_size(processor: Any, size: int, source: SourceModel) -> Any:
    """Set a processor to return square images of this size; the share that it crops stays the same.

    Raises:
        ModelError: the processor does not support it.
    """
    settings = processor.to_dict()
    for changes in _size_changes(settings, size):
        try:
            changed = type(processor).from_dict({**settings, **changes})
            shapes = {_process(changed, picture).shape for picture in _sample_images()}
        except _FAILURES:
            continue
        if shapes == {(3, size, size)}:
            return changed
    what = f"the image processor of {source.name!r} cannot be made to give pictures of {size} x {size}"
    raise ModelError(Problem(what, source.where, "set target.options.image_size to null"))


def _size_changes(settings: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yield settings that may give images of this size, the closest to the present ones first."""
    square = {"height": size, "width": size}
    present, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    share = size / crop["height"] if settings.get("do_center_crop") and "height" in crop else None
    if share is not None:
        scaled = {side: round(length * share) for side, length in present.items()}
        yield {"do_resize": True, "size": scaled, "crop_size": square}
    if "shortest_edge" not in present:
        yield {"do_resize": True, "size": square}
        return
    shortest = {"shortest_edge": size}
    yield {"do_resize": True, "size": shortest}
    yield {"do_resize": True, "size": shortest, "do_center_crop": True, "crop_size": square}


def _process(processor: Any, picture: Any, **options: Any) -> npt.NDArray[Any]:
    """Return the processor's output for one image; [3, height, width]."""
    made = processor(picture, **options)
    found = np.asarray(made["pixel_values"][0]) if "pixel_values" in made else None
    if found is None or found.ndim != 3 or found.shape[0] != 3:
        shapes = " and ".join(f"{name} of the shape {np.shape(values[0])}" for name, values in made.items())
        raise ValueError(f"it makes {shapes} of a picture, not pixel_values of the shape (3, height, width)")
    return found


def _find_values(processor: Any) -> Numbers:
    """Return the value that each byte is converted to, from an image that contains all of them."""
    from PIL import Image

    row = np.arange(NUM_VALUES, dtype=np.uint8)
    picture = Image.fromarray(np.broadcast_to(row[None, :, None], (2, NUM_VALUES, 3)).copy())
    found = _process(processor, picture, do_resize=False, do_center_crop=False)
    if found.shape != (3, 2, NUM_VALUES):
        raise ValueError("it resizes or crops images even if it should not")
    values: Numbers = np.ascontiguousarray(found[:, 0], dtype=np.float32)
    if not (np.diff(values, axis=1) > 0).all():
        raise ValueError("it does not keep the order of brightness")
    return values


def _nearest(values: Numbers, numbers: npt.NDArray[Any]) -> Pixels:
    between = (values[1:] + values[:-1]) / 2
    return np.searchsorted(between, numbers).astype(np.uint8)


def _sample_images() -> list[Any]:
    from PIL import Image

    generator = np.random.default_rng(0)
    sizes = ((*size, 3) for size in _SAMPLE_SIZES)
    return [Image.fromarray(generator.integers(0, NUM_VALUES, size, dtype=np.uint8)) for size in sizes]


def _unusable(source: SourceModel, why: str) -> Problem:
    what = f"the image processor of {source.name!r} cannot be used{why}"
    return Problem(what, source.where, "use a source model with an image processor such as ViT's or MobileNet's")
