"""Token ids of texts and conversations, and which of them are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.data.examples import Examples
from orchestrator.data.fields.conversations import Sample
from orchestrator.tasks.bases.chat import Span, Template, TrainOn, lacks_end, render_sample

TEXTS_TOGETHER = 1024
TOKENS = pa.schema({"input_ids": pa.list_(pa.int32()), "learned": pa.list_(pa.int8())})


class CannotEncode(ValueError):
    """The chat template does not suit an example."""

    def __init__(self, why: str, row: int) -> None:
        super().__init__(why)
        self.row = row


def encode_in_batches(
    examples: Examples, schema: pa.Schema, encode: Callable[[Examples], pa.RecordBatch]
) -> pa.RecordBatchReader:
    """Return `encode` of a thousand examples after the other, so that few are Python objects at a time."""

    def make_batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(examples), TEXTS_TOGETHER):
            yield encode(examples.slice(start, min(start + TEXTS_TOGETHER, len(examples))))

    return pa.RecordBatchReader.from_batches(schema, make_batches())


def encode_samples(
    samples: Sequence[Sample], tokenizer: Any, template: Template, train_on: TrainOn, max_length: int
) -> pa.RecordBatch:
    """Return `input_ids` and `learned` (1 or 0 for each token, never 1 for the first), both lists of uneven length.

    Texts get the tokenizer's special tokens and an end-of-text token; conversations what their template says, and an
    end-of-text token after a last answer that no special token ends.

    Raises:
        CannotEncode: the template fails on an example.
    """
    ids: list[npt.NDArray[np.int32]] = []
    learned: list[npt.NDArray[np.int8]] = []
    written = [write(sample, template, train_on, row) for row, sample in enumerate(samples)]
    encoded = tokenize([text for text, *_ in written], [bool(sample.turns) for sample in samples], tokenizer)
    for (text, spans, is_open), (own, offsets) in zip(written, encoded, strict=True):
        kept = learned_tokens(text, spans, np.array(offsets, np.int64).reshape(-1, 2))
        row_ids = np.array(own, np.int32)
        if is_open:
            row_ids, kept = end_text(row_ids, kept, tokenizer.eos_token_id)
        kept[:1] = 0
        ids.append(row_ids[:max_length])
        learned.append(kept[:max_length])
    return pa.record_batch([as_lists(ids, pa.int32()), as_lists(learned, pa.int8())], schema=TOKENS)


def tokenize(
    texts: Sequence[str], are_chats: Sequence[bool], tokenizer: Any
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the token ids of each text, and for each token its first character and the one after its last.

    Args:
        are_chats: which texts are conversations, with the special tokens that belong there in them.
    """
    found: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for is_chat in set(are_chats):
        rows = [row for row, own in enumerate(are_chats) if own == is_chat]
        encoded = tokenizer(
            [texts[row] for row in rows],
            add_special_tokens=not is_chat,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,  # Of texts that are longer than the model reads: they are cut elsewhere.
        )
        found.update(zip(rows, zip(encoded["input_ids"], encoded["offset_mapping"], strict=True), strict=True))
    return [found[row] for row in range(len(texts))]


def longest_tokens(number: int, length: int) -> pa.RecordBatch:
    """Return made-up texts of this length, all of which is learned but the first token."""
    ids, learned = [np.ones(length, np.int32)] * number, [np.arange(length).clip(max=1).astype(np.int8)] * number
    return pa.record_batch([as_lists(ids, pa.int32()), as_lists(learned, pa.int8())], schema=TOKENS)


def write(sample: Sample, template: Template, train_on: TrainOn, row: int) -> tuple[str, list[Span], bool]:
    """Return the text of an example, the stretches that are learned, and whether it lacks an end of its own."""
    if not sample.turns:
        text = sample.prompt + sample.completion
        return text, [(0 if train_on == "all" else len(sample.prompt), len(text))], True
    from jinja2 import TemplateError

    try:
        text, spans = render_sample(sample, template, train_on)
        return text, spans, lacks_end(sample.turns, text, template)
    except (TemplateError, ValueError, TypeError) as error:
        raise CannotEncode(f"the chat template fails: {error}", row) from error


def learned_tokens(text: str, spans: Sequence[Span], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Return 1 for each token inside a span, 0 for others.

    A token that begins before a span is inside where only spaces come before the span: many tokenizers put them at the
    beginning of a word.

    Args:
        offsets: first character of each token and the one after its last; shape [num_tokens, 2].
    """
    begins, ends = offsets[:, 0], offsets[:, 1]
    learned = np.zeros(len(offsets), np.int8)
    for start, end in spans:
        inside = (ends > start) & (ends <= end) & (begins < ends)
        for token in np.flatnonzero(inside & (begins < start)):
            inside[token] = text[begins[token] : start].isspace()
        learned[inside] = 1
    return learned


def end_text(
    ids: npt.NDArray[np.int32], learned: npt.NDArray[np.int8], end: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """Append the end-of-text token, learned, unless it is there or the tokenizer has none."""
    if end is None:
        return ids, learned
    if len(ids) and ids[-1] == end:
        learned[-1] = 1
        return ids, learned
    return np.append(ids, np.int32(end)), np.append(learned, np.int8(1))


def as_lists(rows: Sequence[npt.NDArray[Any]], type_: pa.DataType) -> pa.Array:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate(rows) if rows else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type_))
