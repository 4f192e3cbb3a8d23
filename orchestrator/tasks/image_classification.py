"""Image classification: one label, or several labels, for each picture."""

from __future__ import annotations

from orchestrator.tasks.bases.classification import ClassificationTask
from orchestrator.tasks.bases.image import ImageOptions, ImageTask
from orchestrator.tasks.bases.label_kinds import LabelOptions


class ImageClassificationOptions(ImageOptions, LabelOptions):
    """Options of `image-classification`."""


class ImageClassification(ImageTask, ClassificationTask):
    """A label (or labels) for each picture, through `AutoModelForImageClassification`."""

    name = "image-classification"
    Options = ImageClassificationOptions
    auto_class = "AutoModelForImageClassification"
    label_aliases = ("labels", "fine_label", "target", "category", "class")


TASK = ImageClassification
