"""Text classification: one label, several labels, or a number for each text (or pair of texts)."""

from __future__ import annotations

from orchestrator.tasks.bases.classification import ClassificationTask
from orchestrator.tasks.bases.label_kinds import LabelOrNumberOptions
from orchestrator.tasks.bases.text import TextOptions, TextTask


class TextClassificationOptions(TextOptions, LabelOrNumberOptions):
    """Options of `text-classification`."""


class TextClassification(TextTask, ClassificationTask):
    """A label (or labels, or a number) for each text, through `AutoModelForSequenceClassification`."""

    name = "text-classification"
    Options = TextClassificationOptions
    auto_class = "AutoModelForSequenceClassification"
    label_aliases = ("labels", "target", "intent", "category", "class", "score")


TASK = TextClassification
