"""Token classification: a tag for each word of a text, such as the names of people and places in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data import overlap
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.tags import TagsField
from orchestrator.data.fields.words import WordsField
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Batch, MainMetric, Predictions, Totals
from orchestrator.tasks.bases.label_kinds import describe_labels, label_config, names_in
from orchestrator.tasks.bases.spans import OUTSIDE, find_spans, has_prefixes, span_scores
from orchestrator.tasks.bases.tagged_words import IGNORED, WordsTask, check_tags, logits_of_words, word_starts
from orchestrator.tasks.bases.text import TextOptions


class TokenOptions(TextOptions):
    """Options of `token-classification`."""

    label_names: list[str] | None = None
    """Names of tags 0, 1, ... where the data hold whole numbers, or the order of the tags where they hold names."""


class TokenClassification(WordsTask):
    """A tag for each word, through `AutoModelForTokenClassification`; spans of tagged words are scored as entities."""

    name = "token-classification"
    Options = TokenOptions
    auto_class = "AutoModelForTokenClassification"
    metrics_shown = ("f1", "precision", "recall", "accuracy")
    main_metric = MainMetric("f1", higher_is_better=True)

    def __init__(self, options: TokenOptions, label_names: tuple[str, ...]) -> None:
        self.options, self.label_names, self.prefixed = options, label_names, has_prefixes(label_names)
        self.decision = "BIO tags" if self.prefixed else "IO tags: words in a row that have the same one are an entity"

    @classmethod
    def columns(cls, options: TokenOptions) -> tuple[Column, ...]:
        names = None if options.label_names is None else tuple(options.label_names)
        return (*cls.input_columns(options), Column("tags", TagsField(names), aliases=("ner_tags", "labels")))

    @classmethod
    def check(cls, options: TokenOptions, splits: Mapping[str, Examples], recipe: Recipe) -> list[Problem]:
        found = WordsField().check(splits, "words")
        found += [problem for split in splits.values() for problem in check_tags(split)]
        return found or overlap.check_overlap(splits, cls.input_columns(options))

    @classmethod
    def stratify_by(cls, options: TokenOptions, train: Examples) -> str | None:
        return None

    @classmethod
    def prepare(cls, options: TokenOptions, splits: Mapping[str, Examples]) -> TokenClassification:
        declared = (tag for split in splits.values() for tag in split.names.get("tags", ()))
        used = {tag for split in splits.values() for tags in split.values("tags") for tag in tags}
        return cls(options, tuple(dict.fromkeys([*declared, *sorted(used)])))

    @classmethod
    def restore(cls, options: TokenOptions, config: Any) -> TokenClassification:
        return cls(options, names_in(config))

    def metric_directions(self) -> dict[str, bool]:
        return {**dict.fromkeys(self.metrics_shown, True), "loss": False}

    def describe(self) -> str:
        return f"a tag for each word; {describe_labels(self.label_names)}"

    def check_inputs(self, examples: Examples) -> list[Problem]:
        found = WordsField().check({"given": examples}, "words")
        has_tags = "tags" in examples.table.column_names
        return [*found, *(check_tags(examples, self.label_names) if has_tags else [])]

    def config_changes(self) -> dict[str, Any]:
        names = label_config(self.label_names, "", False)
        return {key: names[key] for key in ("num_labels", "id2label", "label2id")}

    def cache_parts(self, processor: Any) -> list[Any]:
        return [self.name, self.label_names, *self.input_cache_parts(processor)]

    def encode(self, examples: Examples, processor: Any) -> pa.Table:
        table = self.encode_inputs(examples, processor)
        has_tags = "tags" in examples.table.column_names
        return table.append_column("tags", self.encode_tags(examples)) if has_tags else table

    def loss(self, outputs: Any, batch: Batch, totals: Totals) -> Any:
        from torch.nn import functional

        logits = logits_of_words(outputs, batch).transpose(1, 2)
        losses = functional.cross_entropy(logits, batch.targets["labels"], reduction="sum", ignore_index=IGNORED)
        return losses / totals["targets"]

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        from orchestrator.tasks.bases.padded import Padded

        probabilities, tags = logits_of_words(outputs, batch).softmax(-1).max(-1)
        is_lost, lengths = batch.targets["positions"] < 0, batch.targets["num_words"]
        return {
            "tags": Padded(tags.masked_fill(is_lost, IGNORED), lengths),
            "probabilities": Padded(probabilities, lengths),
        }

    def _names(self, tags: Any) -> list[str]:
        return [OUTSIDE if tag == IGNORED else self.label_names[tag] for tag in tags]

    def _spans(self, predictions: Predictions, targets: Predictions) -> tuple[list[Any], list[Any]]:
        both = (predictions["tags"], targets["tags"])
        found, truth = ([find_spans(self._names(tags), self.prefixed) for tags in texts] for texts in both)
        return found, truth

    def metrics(self, predictions: Predictions, targets: Predictions) -> dict[str, float]:
        scores = span_scores(*self._spans(predictions, targets))["overall"]
        accuracy = np.mean(np.concatenate(predictions["tags"]) == np.concatenate(targets["tags"]))
        return {
            "f1": scores["f1-score"],
            "precision": scores["precision"],
            "recall": scores["recall"],
            "accuracy": float(accuracy),
        }

    def details(self, predictions: Predictions, targets: Predictions) -> dict[str, Any]:
        per_class = span_scores(*self._spans(predictions, targets))["per_class"]
        return {"per_class": per_class, "labels": list(per_class)}

    def prediction_rows(self, predictions: Predictions, examples: Examples) -> dict[str, list[Any]]:
        found = zip(examples.values("words"), predictions["tags"], predictions["probabilities"], strict=True)
        return {"prediction": [self._entities(*each) for each in found]}

    def _entities(self, words: list[str], tags: Any, probabilities: Any) -> list[dict[str, Any]]:
        """Return the entities of a text, with their characters in the words joined by spaces."""
        text, starts = " ".join(words), word_starts(words)
        found = []
        for kind, first, end in find_spans(self._names(tags), self.prefixed):
            start, stop = starts[first], starts[end - 1] + len(words[end - 1])
            score = float(np.mean(probabilities[first:end]))
            found.append({"label": kind, "text": text[start:stop], "start": start, "end": stop, "score": score})
        return found


TASK = TokenClassification
