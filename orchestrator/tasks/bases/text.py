"""Tasks that read texts with a tokenizer: their options, inputs and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.text import TextField
from orchestrator.data.ragged import Ragged
from orchestrator.errors import Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section
from orchestrator.tasks.base import Arrays, Batch, Encoded, Task
from orchestrator.tasks.bases.inputs import InputTask

if TYPE_CHECKING:
    from orchestrator.models import SourceModel

LARGEST_LIMIT = 1_000_000  # transformers writes 1e30 where a tokenizer has no limit.


class TextOptions(Section):
    """Options of tasks that read texts."""

    max_length: Annotated[int, Field(gt=0)] = 128
    """Texts are cut at this many tokens."""


@dataclass
class EncodedTexts(Encoded):
    """Token ids of each text; a task adds its targets."""

    inputs: dict[str, Ragged]
    """Arrays of the tokenizer, without attention masks."""
    fill: dict[str, int]
    """The padding of each."""

    def __post_init__(self) -> None:
        self.lengths = self.inputs["input_ids"].lengths
        self.counts = {}

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        arrays: Arrays = {name: column.pad(rows, self.fill[name]) for name, column in self.inputs.items()}
        lengths = self.lengths[rows]
        arrays["attention_mask"] = (np.arange(max(1, lengths.max(initial=1))) < lengths[:, None]).astype(np.int64)
        return Batch(arrays, {})

    def targets(self) -> Arrays:
        return {}


class TokenizerTask(Task):
    """A task whose processor is a tokenizer; its options have `max_length`."""

    processor_class = "AutoTokenizer"
    noun: ClassVar[str] = "text"
    """A word for an example, for messages."""

    def load_processor(self, source: SourceModel) -> tuple[Any, list[Problem]]:
        from orchestrator import models

        return models.load_tokenizer(source)

    def configure_model(self, model: Any, processor: Any, source: SourceModel) -> None:
        from orchestrator import models

        models.set_padding_token(model, processor, source)

    def check_model(self, processor: Any, config: Any, recipe: Recipe) -> list[Problem]:
        return check_length(self.options.max_length, processor, config, self.auto_class, recipe)

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        """Return a warning of examples that are cut."""
        length = self.options.max_length
        count = int((encoded.lengths >= length).sum())
        if count == 0:
            return []
        what = f"{count} of {len(encoded)} {self.noun}s of {split} reach {length} tokens and are cut there"
        remedy = f"raise target.options.max_length if the ends of the {self.noun}s matter"
        return [Problem(what, recipe.origin.where("target.options.max_length"), remedy, fatal=False)]

    def example_inputs(self, processor: Any) -> dict[str, Any]:
        import torch

        # No attention mask: models look into it, which they cannot where there are only shapes (the meta device).
        return {"input_ids": torch.tensor([[1, 2, 3, 1]])}


class TextTask(TokenizerTask, InputTask):
    """A task that reads a text, or a pair of texts."""

    @classmethod
    def input_columns(cls, options: Any) -> tuple[Column, ...]:
        return (
            Column("text", TextField(), aliases=("sentence", "sentence1", "content", "premise", "question1")),
            Column("text_pair", TextField(), required=False, aliases=("sentence2", "hypothesis", "question2")),
        )

    def input_cache_parts(self, processor: Any) -> list[Any]:
        return [self.options.max_length, tokenizer_state(processor)]

    def encode_inputs(self, examples: Examples, processor: Any) -> pa.Table:
        table = examples.table
        pairs = table["text_pair"].to_pylist() if "text_pair" in table.column_names else None
        return token_columns(self.tokenize(processor, table["text"].to_pylist(), pairs))

    def tokenize(
        self, processor: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **others: bool
    ) -> dict[str, list[list[Any]]]:
        """Return the tokenizer's output for texts (or pairs of texts), cut to `max_length`.

        Args:
            others: further arguments of the tokenizer, such as `return_offsets_mapping`.
        """
        length = self.options.max_length
        cut = {"truncation": True, "max_length": length, "padding": False, "return_attention_mask": False}
        return dict(processor(texts, pairs, **cut, **others))

    def wrap_inputs(self, table: pa.Table, processor: Any) -> EncodedTexts:
        fill = {name: processor.pad_token_id if name == "input_ids" else 0 for name in table.column_names}
        return EncodedTexts({name: Ragged.of(table[name]) for name in table.column_names}, fill)

    def longest_inputs(self, number: int, processor: Any) -> pa.Table:
        return pa.table({"input_ids": pa.array([np.ones(self.options.max_length, np.int32)] * number)})

    def show_inputs(self, encoded: Encoded, row: int, processor: Any) -> str:
        text: str = processor.decode(encoded.batch(np.array([row])).inputs["input_ids"][0])
        return text


def token_columns(encoded: Mapping[str, list[list[Any]]]) -> pa.Table:
    """Return lists of whole numbers, one an example, as columns."""
    return pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name, rows in encoded.items()})


def longest_input(tokenizer: Any, config: Any) -> int | None:
    """Return how many tokens the model reads at most; None where nothing says it."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return min((limit for limit in limits if limit and 0 < limit < LARGEST_LIMIT), default=None)


def longest_conversation(tokenizer: Any, model: Any) -> int | None:
    """Return how many tokens a language model reads and writes together at most; None where nothing limits it."""
    from orchestrator import models

    limits = [longest_input(tokenizer, model.config), models.find_max_length(model.config, "AutoModelForCausalLM", 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def check_length(wanted: int, tokenizer: Any, config: Any, auto_class: str, recipe: Recipe) -> list[Problem]:
    """Return a problem where texts of `target.options.max_length` (`wanted`) tokens are too long for the model.

    Config and tokenizer say what it was trained for; how many tokens it holds is tried.
    """
    from orchestrator import models

    held = models.find_max_length(config, auto_class, wanted, recipe.source.trust_remote_code)
    limits = [limit for limit in (longest_input(tokenizer, config), held) if limit is not None]
    if wanted <= min(limits, default=wanted):
        return []
    longest = min(limits)
    what = f"max_length is {wanted}, but {recipe.source.model} reads at most {longest} tokens"
    remedy = f"set target.options.max_length to {longest} or less"
    return [Problem(what, recipe.origin.where("target.options.max_length"), remedy)]


def tokenizer_state(tokenizer: Any) -> str:
    """Return everything that a tokenizer's output depends on, for the cache's key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__} {words} {tokenizer.special_tokens_map} {tokenizer.model_input_names}"
