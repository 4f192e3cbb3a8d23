"""Tasks that predict something for each word of a text: the token that stands for a word, its tag, checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import group_rows
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.tags import TagsField
from orchestrator.data.fields.words import WordsField
from orchestrator.data.ragged import Ragged
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Batch, Encoded, Predictions
from orchestrator.tasks.bases.text import EncodedTexts, TextTask, token_columns

IGNORED = -100
NUMBERS = pa.list_(pa.int32())


@dataclass
class EncodedWords(Encoded):
    """Encoded texts, the first token of each word, and the words' tags."""

    texts: EncodedTexts
    positions: Ragged
    """The first token of each word; -1 for words without one, which are cut off or unknown to the tokenizer."""
    tags: Ragged | None

    def __post_init__(self) -> None:
        self.lengths = self.texts.lengths
        has_token = replace(
            self.positions, chunks=tuple(np.asarray(each, np.int32) >= 0 for each in self.positions.chunks)
        )
        self.counts = {"targets": has_token.sums()}

    @property
    def is_labelled(self) -> bool:
        return self.tags is not None

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        positions = self.positions.pad(rows, -1)
        targets = {"positions": positions, "num_words": self.positions.lengths[rows]}
        if self.tags is not None:
            targets["labels"] = np.where(positions >= 0, self.tags.pad(rows, IGNORED), IGNORED)
        return Batch(self.texts.batch(rows).inputs, targets)

    def targets(self) -> Predictions:
        assert self.tags is not None, "a split without tags cannot be scored"
        return {"tags": [self.tags.join(np.array([row])) for row in range(len(self))]}


class WordsTask(TextTask):
    """A task that predicts something for each word of a text, from the word's first token."""

    @classmethod
    def input_columns(cls, options: Any) -> tuple[Column, ...]:
        return (Column("words", WordsField(), aliases=("tokens",)),)

    def check_model(self, processor: Any, config: Any, recipe: Recipe) -> list[Problem]:
        found = super().check_model(processor, config, recipe)
        if not processor.is_fast:
            what = f"the tokenizer of {recipe.source.model} does not say which characters its tokens come from"
            remedy = "use a source model with a tokenizer.json"
            found.append(Problem(what, recipe.origin.where("source.model"), remedy))
        return found

    def encode_inputs(self, examples: Examples, processor: Any) -> pa.Table:
        """Return the tokens of the words joined by spaces, and the first token of each word (`positions`)."""
        words = list(examples.values("words"))
        encoded = self.tokenize(processor, [" ".join(row) for row in words], return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")
        positions = [first_tokens(*pair) for pair in zip(words, offsets, strict=True)]
        return token_columns(encoded).append_column("positions", pa.array(positions, NUMBERS))

    def encode_tags(self, examples: Examples) -> pa.Array:
        """Return the number of each word's tag."""
        number_of = {name: number for number, name in enumerate(self.label_names)}
        return pa.array([[number_of[tag] for tag in row] for row in examples.values("tags")], NUMBERS)

    def wrap(self, table: pa.Table, processor: Any) -> EncodedWords:
        tags = Ragged.of(table["tags"]) if "tags" in table.column_names else None
        texts = table.select([name for name in table.column_names if name not in ("positions", "tags")])
        return EncodedWords(self.wrap_inputs(texts, processor), Ragged.of(table["positions"]), tags)

    def longest_examples(self, number: int, processor: Any) -> pa.Table:
        table = self.longest_inputs(number, processor)
        words = pa.array([np.zeros(self.options.max_length, np.int32)] * number, NUMBERS)
        return table.append_column("positions", words).append_column("tags", words)

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        """Return warnings of texts that are cut, and of words that no token stands for."""
        assert isinstance(encoded, EncodedWords)
        found = super().check_encoded(split, encoded, recipe)
        lost = int(encoded.positions.lengths.sum() - encoded.counts["targets"].sum())
        if lost:
            what = f"{lost} words of {split} have no token: their tags are not learned, and not predicted"
            remedy = "raise target.options.max_length if texts are cut, or remove words of invisible characters"
            found.append(Problem(what, recipe.origin.where("target.options.max_length"), remedy, fatal=False))
        return found

    def segments(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        batch = encoded.batch(np.array([row]))
        ids, positions = batch.inputs["input_ids"][0], batch.targets["positions"][0]
        shown: list[tuple[str, bool]] = []
        for number in np.flatnonzero(positions >= 0):
            after = positions[number + 1 :]
            end = int(min(after[after >= 0], default=len(ids)))
            shown.append((processor.decode(ids[positions[number] : end], skip_special_tokens=True) + " ", False))
            if encoded.is_labelled:
                shown.append((self.label_names[batch.targets["labels"][0][number]] + " ", True))
        return shown


def logits_of_words(outputs: Any, batch: Batch) -> Any:
    """Return the logits of each word's first token, in fp32; shape [num_examples, most words, num_labels]."""
    positions = batch.targets["positions"].clamp(min=0)
    logits = outputs.logits.float()
    return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


def word_starts(words: Sequence[str]) -> list[int]:
    """Return where each word begins in the text that joins them by single spaces."""
    starts = [0]
    for word in words[:-1]:
        starts.append(starts[-1] + len(word) + 1)
    return starts


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first token of each word; -1 for words that no token ends in.

    Args:
        offsets: start and end of each token in the joined words; the two are equal for special tokens.
    """
    starts = np.array(word_starts(words))
    ends = starts + [len(word) for word in words]
    spans = np.array(offsets).reshape(-1, 2)
    last = spans[:, 1] - 1  # A token may begin with the space before its word.
    owners = np.searchsorted(starts, last, side="right") - 1
    is_word = (spans[:, 1] > spans[:, 0]) & (owners >= 0) & (last < ends[owners])
    found = np.full(len(words), -1)
    tokens = np.flatnonzero(is_word)[::-1]
    found[owners[tokens]] = tokens  # The first token of a word is written last.
    return list(map(int, found))


def check_tags(examples: Examples, names: Sequence[str] | None = None) -> list[Problem]:
    """Return problems of tags that are missing, unnamed, or not as many as words.

    Args:
        names: the tags that a model knows; None where any may be.
    """
    type_ = examples.table["tags"].type
    if pa.types.is_list(type_) and pa.types.is_integer(type_.value_type):
        remedy = "name them in target.options.label_names, in the order of their numbers"
        return [Problem("tags are whole numbers, and nothing names them", examples.where(0), remedy)]
    pairs = list(zip(examples.values("words"), examples.values("tags"), strict=True))
    known = None if names is None else set(names)
    masks = {
        "is missing (null)": [tags is None or None in tags for _, tags in pairs],
        "has another number of tags than there are words": [
            tags is not None and words is not None and len(tags) != len(words) for words, tags in pairs
        ],
        f"has a tag that the model does not know ({', '.join(names or ())})": [
            known is not None and tags is not None and not known.issuperset(tags) for _, tags in pairs
        ],
    }
    found = []
    for what, mask in masks.items():
        rows = pa.chunked_array([pa.array(mask, pa.bool_())])
        found.append(group_rows(examples, "tags", rows, what, "give each word one tag", TagsField().show))
    return [problem for problem in found if problem is not None]
