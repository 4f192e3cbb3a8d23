"""Image classification: one label for each picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
from pydantic import Field

from orchestrator.data import checks, overlap
from orchestrator.data.column_types import describe_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields import image_checks, labels
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.decode import BrokenPicture, decode, quiet_decoding
from orchestrator.data.fields.image import ImageField
from orchestrator.data.fields.images import read_picture
from orchestrator.data.fields.label import LabelField
from orchestrator.data.fields.label_columns import Numbers
from orchestrator.data.fields.pixels import Pixels, pixel_array, pixel_type, shards
from orchestrator.data.threads import in_threads
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section
from orchestrator.tasks.base import Arrays, Batch, Encoded, MainMetric, Predictions, Task, Totals
from orchestrator.tasks.bases.classification import (
    DIRECTIONS,
    accuracy,
    class_report,
    describe_labels,
    label_config,
    names_in,
    numbers_are_codes,
    predicted_labels,
    single_label_metrics,
    softmax,
)
from orchestrator.tasks.bases.image import Augmentation, augment

if TYPE_CHECKING:
    from orchestrator.models import ImagePreprocessor, SourceModel

PROBLEM_TYPE = "single_label_classification"
NUM_COLOURS = 3


class ImageOptions(Section):
    """Options of `image-classification`."""

    image_size: Annotated[int, Field(gt=0)] | None = None
    """Height and width, in pixels, that pictures are brought to; null for those of the source's image processor."""
    augment: Augmentation = "none"
    """Change training pictures at random: `flip` mirrors half of them, `flip-crop` also moves them by up to an eighth
    of their size. With anything but `none`, frozen blocks are computed anew in every epoch."""
    label_names: list[str] | None = None
    """Names of labels 0, 1, ... where the data hold whole numbers; or the order of the labels where they hold names."""


@dataclass
class EncodedImages(Encoded):
    """The bytes of each picture, and its label."""

    pixels: Pixels
    preprocessor: ImagePreprocessor
    labels: npt.NDArray[np.int64] | None
    augmentation: Augmentation

    def __post_init__(self) -> None:
        self.lengths = np.ones(len(self.pixels), dtype=np.int64)
        self.counts = {"targets": np.ones(len(self.pixels), dtype=np.int64)}
        self.augments = self.augmentation != "none"

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        pictures = self.pixels.take(rows)
        if stream is not None:
            pictures = augment(pictures, self.augmentation, stream, rows)
        return Batch({"pixel_values": self.preprocessor.numbers(pictures)}, self.extra_inputs(rows).targets)

    def extra_inputs(self, rows: npt.NDArray[np.int64]) -> Batch:
        return Batch({}, {} if self.labels is None else {"labels": self.labels[rows]})

    def targets(self) -> Arrays:
        assert self.labels is not None, "a split without labels cannot be scored"
        return {"label": self.labels}


class ImageClassification(Task):
    """A label for each picture, through `AutoModelForImageClassification`."""

    name = "image-classification"
    Options = ImageOptions
    auto_class = "AutoModelForImageClassification"
    processor_class = "AutoImageProcessor"
    metrics_shown = ("accuracy", "f1_macro")
    main_metric = MainMetric("accuracy", higher_is_better=True)

    def __init__(self, options: ImageOptions, label_names: tuple[str, ...], are_codes: bool = False) -> None:
        """
        Args:
            are_codes: whole numbers in data are positions among the names, rather than names.
        """
        self.options = options
        self.are_codes = are_codes
        self.label_names = label_names

    @classmethod
    def columns(cls, options: ImageOptions) -> tuple[Column, ...]:
        numbers: Numbers = "classes" if options.label_names is None else "text"
        return (
            Column(
                "image", ImageField(), aliases=("img", "picture", "image_path", "file_name", "filename", "path", "file")
            ),
            Column("label", LabelField(numbers), aliases=("labels", "fine_label", "target", "category", "class")),
        )

    @classmethod
    def check(cls, options: ImageOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        found = image_checks.check_images(splits, "image")
        wrong = [problem for split in splits.values() for problem in check_label_kind(split)]
        try:
            found += wrong or checks.check_class_labels(splits, "label", options.label_names)
        except DataError as error:
            found += error.problems
        return found + overlap.check_overlap(splits, cls.columns(options)[:1], "label")

    @classmethod
    def stratify_by(cls, options: ImageOptions, train: Examples) -> str | None:
        return "label"

    @classmethod
    def prepare(cls, options: ImageOptions, splits: Mapping[str, Examples]) -> ImageClassification:
        names = labels.find_label_names(splits, "label", options.label_names)
        return cls(options, names, labels.declares_names(splits, "label", options.label_names))

    @classmethod
    def restore(cls, options: ImageOptions, config: Any) -> ImageClassification:
        return cls(options, names_in(config), numbers_are_codes(config))

    def metric_directions(self) -> dict[str, bool]:
        return dict(DIRECTIONS)

    def describe(self) -> str:
        return describe_labels(self.label_names)

    def check_inputs(self, examples: Examples) -> list[Problem]:
        found = image_checks.check_images({"given": examples}, "image")
        found = [problem for problem in found if problem.fatal]
        return found + (check_label_kind(examples) if "label" in examples.table.column_names else [])

    def config_changes(self) -> dict[str, Any]:
        return label_config(self.label_names, PROBLEM_TYPE, self.are_codes)

    def load_processor(self, source: SourceModel) -> tuple[ImagePreprocessor, list[Problem]]:
        from orchestrator import models

        processor = models.load_image_processor(source)
        if self.options.image_size is not None:
            processor = models.set_image_size(processor, self.options.image_size, source)
        maker = models.ImagePreprocessor(processor, source)
        if maker.is_exact:
            return maker, []
        what = f"the image processor of {source.name!r} resizes brightness as fractions, which are stored rounded: its "
        what += f"numbers are met within {maker.error:.2g}"
        return maker, [Problem(what, source.where, "nothing has to be done: a 256th is not seen", fatal=False)]

    def check_model(self, processor: ImagePreprocessor, config: Any, recipe: Recipe) -> list[Problem]:
        channels = getattr(config, "num_channels", NUM_COLOURS)
        if channels == NUM_COLOURS:
            return []
        what = f"{recipe.source.model} reads pictures of {channels} channels; here they have red, green and blue"
        return [Problem(what, recipe.origin.where("source.model"), "use a source model that reads RGB pictures")]

    def cache_parts(self, processor: ImagePreprocessor) -> list[Any]:
        return [self.name, self.label_names, self.are_codes, processor.settings, PIL.__version__]

    def encode(self, examples: Examples, processor: ImagePreprocessor) -> pa.RecordBatchReader:
        columns = {"pixels": pixel_type(processor.height, processor.width)}
        encoded = None
        if "label" in examples.table.column_names:
            encoded = labels.encode_labels(examples, "label", self.label_names, self.are_codes)
            columns["label"] = pa.int64()
        schema = pa.schema(columns)

        def make_batches() -> Iterator[pa.RecordBatch]:
            for rows in shards(len(examples), processor.height * processor.width * NUM_COLOURS):
                parts = [pixel_array(make_pixels(examples, rows, processor))]
                if encoded is not None:
                    parts.append(pa.array(encoded[rows.start : rows.stop]))
                yield pa.record_batch(parts, schema=schema)

        return pa.RecordBatchReader.from_batches(schema, make_batches())

    def wrap(self, table: pa.Table, processor: ImagePreprocessor) -> EncodedImages:
        known = table["label"].to_numpy() if "label" in table.column_names else None
        return EncodedImages(Pixels.of(table["pixels"]), processor, known, self.options.augment)

    def longest_examples(self, number: int, processor: ImagePreprocessor) -> pa.Table:
        pictures = np.zeros((number, processor.height, processor.width, NUM_COLOURS), np.uint8)
        return pa.table({"pixels": pixel_array(pictures), "label": pa.array(np.zeros(number, np.int64))})

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        return []

    def example_inputs(self, processor: ImagePreprocessor) -> dict[str, Any]:
        import torch

        # Of the real size: some models read no other, and say so here.
        return {"pixel_values": torch.zeros(1, NUM_COLOURS, processor.height, processor.width)}

    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        from torch.nn import functional

        losses = functional.cross_entropy(outputs.logits.float(), batch.targets["labels"], reduction="sum")
        return losses / totals["targets"]

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        return {"logits": outputs.logits.float()}

    def metrics(self, predictions: Predictions, targets: Arrays) -> dict[str, float]:
        return single_label_metrics(softmax(predictions["logits"]), targets["label"])

    def score(self, metric: str, predictions: Predictions, targets: Arrays) -> float:
        if metric == "accuracy":
            return accuracy(predictions["logits"], targets["label"])
        return super().score(metric, predictions, targets)

    def details(self, predictions: Predictions, targets: Arrays) -> dict[str, Any]:
        return class_report(targets["label"], predictions["logits"].argmax(-1), self.label_names)

    def prediction_rows(self, predictions: Predictions) -> dict[str, list[Any]]:
        return predicted_labels(predictions["logits"], self.label_names)


TASK = ImageClassification


def check_label_kind(examples: Examples) -> list[Problem]:
    """Lists of labels, or numbers with fractions, where one class is needed for each picture."""
    kind = examples.table["label"].type
    if pa.types.is_list(kind):
        what = f"label holds {describe_type(kind)}, but {ImageClassification.name} needs one label for each picture"
        return [Problem(what, examples.where(0), "write one label for each, or map `label` to another column")]
    try:
        labels.label_texts(examples, "label")
    except DataError as error:
        return list(error.problems)
    return []


def make_pixels(examples: Examples, rows: range, maker: ImagePreprocessor) -> npt.NDArray[np.uint8]:
    """What the image processor makes of the pictures of some rows; [len(rows), height, width, 3].

    Raises:
        DataError: a picture is broken, or not the one that was there when the data were opened.
    """
    values = examples.table["image"]

    def make(row: int) -> npt.NDArray[np.uint8]:
        try:
            return maker.make(decode(read_picture(values[row].as_py(), examples.where(row))).image)
        except BrokenPicture as error:
            raise DataError(
                Problem(f"the picture {error}", examples.where(row), "remove it, or save it anew")
            ) from None

    with quiet_decoding():
        return np.stack(list(in_threads(make, rows)))
