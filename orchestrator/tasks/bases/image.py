"""Tasks that read pictures with an image processor: their options, inputs and checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
from pydantic import Field

from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.decode import BrokenPicture, decode, quiet_decoding
from orchestrator.data.fields.image import ImageField
from orchestrator.data.fields.images import read_picture
from orchestrator.data.fields.pixels import Pixels, pixel_array, pixel_type, shards
from orchestrator.data.threads import map_in_threads
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section
from orchestrator.tasks.base import Arrays, Batch, Encoded, Rates
from orchestrator.tasks.bases.augmentation import Augmentation, augment
from orchestrator.tasks.bases.inputs import InputTask

if TYPE_CHECKING:
    from orchestrator.models import ImagePreprocessor, SourceModel

NUM_COLOURS = 3
_ALIASES = ("img", "picture", "image_path", "file_name", "filename", "path", "file")


class ImageOptions(Section):
    """Options of tasks that read pictures."""

    image_size: Annotated[int, Field(gt=0)] | None = None
    """Height and width, in pixels, that pictures are resized to; null for those of the source's image processor."""
    augment: Augmentation = "none"
    """Change training pictures at random: `flip` mirrors half of them, `flip-crop` also moves them by up to an eighth
    of their size. With anything but `none`, frozen blocks are computed again in every epoch."""


@dataclass
class EncodedImages(Encoded):
    """The bytes of each picture; a task adds its targets."""

    pixels: Pixels
    preprocessor: ImagePreprocessor
    augmentation: Augmentation

    def __post_init__(self) -> None:
        self.lengths = np.ones(len(self.pixels), dtype=np.int64)
        self.counts = {}
        self.augments = self.augmentation != "none"

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        pictures = self.pixels.take(rows)
        if stream is not None:
            pictures = augment(pictures, self.augmentation, stream, rows)
        return Batch({"pixel_values": self.preprocessor.numbers(pictures)}, {})

    def extra_inputs(self, rows: npt.NDArray[np.int64]) -> Batch:
        return Batch({}, {})

    def targets(self) -> Arrays:
        return {}


class ImageTask(InputTask):
    """A task that reads a picture with an image processor."""

    processor_class = "AutoImageProcessor"
    noun = "picture"

    @classmethod
    def rates(cls, num_parameters: int | None = None) -> Rates:
        return Rates((1e-5, 1e-3), (1e-4, 1e-2))

    @classmethod
    def input_columns(cls, options: Any) -> tuple[Column, ...]:
        return (Column("image", ImageField(), aliases=_ALIASES),)

    def load_processor(self, source: SourceModel) -> tuple[ImagePreprocessor, list[Problem]]:
        from orchestrator import models

        processor = models.load_image_processor(source)
        if self.options.image_size is not None:
            processor = models.set_image_size(processor, self.options.image_size, source)
        preprocessor = models.ImagePreprocessor(processor, source)
        if preprocessor.is_exact:
            return preprocessor, []
        what = f"the image processor of {source.name!r} resizes brightness as fractions, which are stored rounded: its "
        what += f"numbers are met within {preprocessor.error:.2g}"
        return preprocessor, [Problem(what, source.where, "nothing has to be done: a 256th is not seen", fatal=False)]

    def check_model(self, processor: ImagePreprocessor, config: Any, recipe: Recipe) -> list[Problem]:
        channels = getattr(config, "num_channels", NUM_COLOURS)
        if channels == NUM_COLOURS:
            return []
        what = f"{recipe.source.model} reads pictures of {channels} channels; here they have red, green and blue"
        return [Problem(what, recipe.origin.where("source.model"), "use a source model that reads RGB pictures")]

    def input_cache_parts(self, processor: ImagePreprocessor) -> list[Any]:
        return [processor.settings, PIL.__version__]

    def encode_inputs(self, examples: Examples, processor: ImagePreprocessor) -> pa.RecordBatchReader:
        height, width = processor.height, processor.width
        schema = pa.schema({"pixels": pixel_type(height, width)})

        def make_batches() -> Iterator[pa.RecordBatch]:
            for rows in shards(len(examples), height * width * NUM_COLOURS):
                yield pa.record_batch([pixel_array(make_pixels(examples, rows, processor))], schema=schema)

        return pa.RecordBatchReader.from_batches(schema, make_batches())

    def wrap_inputs(self, table: pa.Table, processor: ImagePreprocessor) -> EncodedImages:
        return EncodedImages(Pixels.of(table["pixels"]), processor, self.options.augment)

    def longest_inputs(self, number: int, processor: ImagePreprocessor) -> pa.Table:
        pictures = np.zeros((number, processor.height, processor.width, NUM_COLOURS), np.uint8)
        return pa.table({"pixels": pixel_array(pictures)})

    def show_inputs(self, encoded: Encoded, row: int, processor: ImagePreprocessor) -> str:
        return f"a picture of {processor.width} x {processor.height} pixels"

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        return []

    def example_inputs(self, processor: ImagePreprocessor) -> dict[str, Any]:
        import torch

        # Of the real size: some models read no other, and say so here.
        return {"pixel_values": torch.zeros(1, NUM_COLOURS, processor.height, processor.width)}


def make_pixels(examples: Examples, rows: range, preprocessor: ImagePreprocessor) -> npt.NDArray[np.uint8]:
    """Return the pictures of some rows as the image processor resizes them; [len(rows), height, width, 3].

    Raises:
        DataError: a picture is broken, or has changed since the data were opened.
    """
    values = examples.table["image"]

    def make(row: int) -> npt.NDArray[np.uint8]:
        try:
            return preprocessor.make(decode(read_picture(values[row].as_py(), examples.where(row))).image)
        except BrokenPicture as error:
            what, remedy = f"the picture {error}", "remove it, or save it again"
            raise DataError(Problem(what, examples.where(row), remedy)) from None

    with quiet_decoding():
        return np.stack(list(map_in_threads(make, rows)))
