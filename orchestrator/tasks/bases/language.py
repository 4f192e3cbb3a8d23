"""Tasks of language models: options, tokens and which of them are learned, prompts, the model's losses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.conversations import Sample, check_prompts, read_prompts
from orchestrator.data.fields.forms import Form, prompt_columns
from orchestrator.data.messages import show_value
from orchestrator.data.ragged import Ragged
from orchestrator.errors import DataError, Problem
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Section, Text
from orchestrator.tasks.base import Arrays, Batch, Encoded
from orchestrator.tasks.bases.chat import SHIPPED, Template, TrainOn, read_template
from orchestrator.tasks.bases.generation import (
    as_prompt,
    closings,
    end_tokens,
    plain_closing,
    set_ends,
    turn_marks,
    write_answers,
)
from orchestrator.tasks.bases.loss_mask import CannotEncode, encode_samples
from orchestrator.tasks.bases.text import TokenizerTask, tokenizer_state

if TYPE_CHECKING:
    from orchestrator.models import SourceModel

CHAT_FORMS = {"messages", "sharegpt", "alpaca"}
IGNORED = -100  # As models.token_loss has it, which needs torch.


class LanguageOptions(Section):
    """Options of every task of a language model."""

    max_length: Annotated[int, Field(gt=1)] = 1024
    """Examples are cut at this many tokens."""
    chat_template: str | None = None
    """`plain` or `chatml`, or a file with a Jinja template (relative to the recipe); null: the tokenizer's own. Its
    text after an answer is learned; where that holds no special token, the end-of-text token follows the last one."""
    system: str | None = None
    """A system prompt for conversations that have none."""
    add_tokens: list[Text] = Field(default_factory=list)
    """Tokens that the source's tokenizer lacks, such as `<tool>`. Each begins as the mean of all others, so embeddings
    must be trained: without a frozen stem, or as `modules_to_save` of an adapter. Those that the chat template writes
    around turns are special tokens."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """The most tokens that `predict` and `chat` generate."""


Options = TypeVar("Options", bound=LanguageOptions)


@dataclass
class EncodedTokens(Encoded):
    """Token ids of each example, and which of them are learned."""

    ids: Ragged
    learned: Ragged
    """1 where a token is learned."""
    pad_token_id: int
    packs: bool

    def __post_init__(self) -> None:
        self.lengths = self.ids.lengths
        self.counts = {"targets": self.learned.sums()}

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        ids = self.ids.pad(rows, self.pad_token_id)
        learned = self.learned.pad(rows, 0) > 0
        # The model at one position predicts the next one.
        targets = np.full_like(ids, IGNORED)
        targets[:, :-1] = np.where(learned[:, 1:], ids[:, 1:], IGNORED)
        lengths = self.lengths[rows]
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "target_ids": targets}
        return Batch(inputs, {"num_targets": self.counts["targets"][rows]})

    def packed_batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        ids, learned = (ragged.join(rows) for ragged in (self.ids, self.learned))
        lengths = self.lengths[rows]
        starts = np.cumsum(lengths) - lengths
        targets = np.where(learned.astype(bool), ids.astype(np.int64), IGNORED)
        targets[starts] = IGNORED  # No text predicts the first token of the next one.
        inputs = {
            "input_ids": ids[None].astype(np.int64),
            "position_ids": (np.arange(len(ids)) - np.repeat(starts, lengths))[None],
            "text_lengths": lengths,
            "target_ids": np.append(targets[1:], IGNORED)[None],
        }
        return Batch(inputs, {"num_targets": self.counts["targets"][rows]})

    def targets(self) -> Arrays:
        return {"num_targets": self.counts["targets"]}


class LanguageTask(TokenizerTask):
    """A task of `AutoModelForCausalLM`, whose output layer is the source's."""

    pipeline_tag = "text-generation"
    auto_class = "AutoModelForCausalLM"
    head = "kept"
    is_language_model = True
    tunes_adapters = True
    noun = "example"
    label_names = ()
    forms: tuple[Form, ...]
    """The forms of the data; empty where they are not known."""

    @classmethod
    def locate(cls, options: LanguageOptions, folder: Path) -> LanguageOptions:
        named = options.chat_template
        if named is None or named in SHIPPED:
            return options
        return options.model_copy(update={"chat_template": str(folder / named)})

    @staticmethod
    def without_template(options: Options) -> Options:
        """Return the options of a trained model: its template was saved with its tokenizer."""
        return options.model_copy(update={"chat_template": None})

    @classmethod
    def stratify_by(cls, options: Any, train: Examples) -> str | None:
        return None

    @classmethod
    def prompt_columns(cls, options: Any) -> tuple[Column, ...]:
        return prompt_columns(getattr(options, "form", None))

    @property
    def _form(self) -> Form | None:
        """Return the form of all files, where they have one in common."""
        return self.forms[0] if len(self.forms) == 1 else None

    def check_prompts(self, examples: Examples) -> list[Problem]:
        return check_prompts(examples, self._form)

    def config_changes(self) -> dict[str, Any]:
        return {}

    def load_processor(self, source: SourceModel) -> tuple[Any, list[Problem]]:

        tokenizer, problems = super().load_processor(source)
        if self.options.chat_template is not None:
            tokenizer.chat_template = read_template(self.options.chat_template)
        elif not tokenizer.chat_template:
            tokenizer.chat_template = SHIPPED["plain"]
            if CHAT_FORMS.intersection(self.forms):
                what = f"{source.name!r} has no chat template; `plain` is used, and saved with the model"
                remedy = "set target.options.chat_template to another one (chatml, a file)"
                problems = [*problems, Problem(what, source.where, remedy, fatal=False)]
        # Nothing where the recipe names a file that is missing, which `check_model` reports.
        marks = turn_marks(self.options.add_tokens, Template.of(tokenizer, tokenizer.chat_template or ""))
        for token in self.options.add_tokens:
            tokenizer.add_tokens([token], special_tokens=token in marks)
        return tokenizer, problems

    def configure_model(self, model: Any, processor: Any, source: SourceModel) -> None:
        from orchestrator import models

        if self.options.add_tokens:
            models.add_embeddings(model, processor)
        super().configure_model(model, processor, source)
        if processor.chat_template is not None:  # As it is for plans that know the model's config alone.
            set_ends(model, processor, Template.of(processor, processor.chat_template))
        models.return_token_losses(model)
        models.attend_within_sequences(model)

    def check_trained(self, model: Any, recipe: Recipe) -> list[Problem]:
        if not self.options.add_tokens:
            return []
        names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
        parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
        frozen = [names[part] for part in parts if not any(value.requires_grad for value in part.parameters())]
        if not frozen:
            return []
        what = f"target.options.add_tokens adds {len(self.options.add_tokens)} tokens, but {' and '.join(frozen)} "
        key = "transfer.freeze" if recipe.transfer.adapter is None else "transfer.adapter.modules_to_save"
        remedy = "set it to 0" if recipe.transfer.adapter is None else f"set it to [{', '.join(frozen)}]"
        return [Problem(f"{what}would not learn them", recipe.origin.where(key), f"{key}: {remedy}")]

    def check_model(self, processor: Any, config: Any, recipe: Recipe) -> list[Problem]:
        problems = []
        named = self.options.chat_template
        if named is not None and read_template(named) is None:
            where = recipe.origin.where("target.options.chat_template")
            problems.append(Problem(f"there is no chat template {named}", where, "use plain or chatml, or a file"))
        else:
            problems += self._check_ends(processor, recipe)
        if recipe.transfer.head.layers:
            where = recipe.origin.where("transfer.head.layers")
            what = "a language model keeps its output layer, so it takes no extra head layers"
            problems.append(Problem(what, where, "set transfer.head.layers to []"))
        if not processor.is_fast:
            what = f"the tokenizer of {recipe.source.model} does not say which characters its tokens come from"
            remedy = "use a source model with a tokenizer.json"
            problems.append(Problem(what, recipe.origin.where("source.model"), remedy))
        return problems + super().check_model(processor, config, recipe)

    def _check_ends(self, processor: Any, recipe: Recipe) -> list[Problem]:
        """Return a warning where no token of the chat template ends an answer."""
        template = Template.of(processor, processor.chat_template)
        found = closings(template)
        has_chats = self.options.chat_template is not None or CHAT_FORMS.intersection(self.forms)
        if not has_chats or not found or template.first_end(found[-1]) is not None:
            return []
        closing = show_value(found[-1]) if found[-1] else "nothing"
        end = processor.eos_token
        after = (
            f"{end} follows the last answer of a conversation" if end is not None else "nothing ends what is written"
        )
        what = f"the chat template closes answers with {closing}, not with a special token; {after}"
        remedy = "name the token that closes answers in target.options.add_tokens, or use the template `plain`"
        return [Problem(what, recipe.origin.where("target.options.chat_template"), remedy, fatal=False)]

    def cache_parts(self, processor: Any) -> list[Any]:
        return [
            self.name,
            self.options.model_dump(mode="json", exclude={"generate", "max_new_tokens"}),
            processor.chat_template,
            tokenizer_state(processor),
        ]

    def encode_texts(
        self, samples: list[Sample], examples: Examples, processor: Any, train_on: TrainOn
    ) -> pa.RecordBatch:
        """Return token ids, and which are learned; raises DataError where the template fails on an example."""
        template = Template.of(processor, processor.chat_template)
        given = [self._with_system(sample) for sample in samples]
        try:
            return encode_samples(given, processor, template, train_on, self.options.max_length)
        except CannotEncode as error:
            remedy = "set target.options.chat_template to a template that fits the data, or correct the data"
            raise DataError(Problem(str(error), examples.where(error.row), remedy)) from error

    def _with_system(self, sample: Sample) -> Sample:
        if self.options.system is None or not sample.turns or sample.turns[0]["role"] in ("system", "developer"):
            return sample
        turns = ({"role": "system", "content": self.options.system}, *sample.turns)
        return Sample(turns, sample.num_given + 1 if sample.num_given else 0)

    def wrap_texts(self, table: pa.Table, processor: Any, packs: bool) -> EncodedTokens:
        ids, learned = (Ragged.of(table[name]) for name in ("input_ids", "learned"))
        return EncodedTokens(ids, learned, processor.pad_token_id, packs)

    def check_encoded(self, split: str, encoded: Encoded, recipe: Recipe) -> list[Problem]:
        """Return a warning of examples that are cut, and a problem of those that have nothing left to learn."""
        problems = super().check_encoded(split, encoded, recipe)
        empty = int((encoded.counts["targets"] == 0).sum())
        if empty:
            where = recipe.origin.where("target.options.max_length")
            what = f"{empty} of {len(encoded)} examples of {split} have no token left to learn"
            remedy = "raise target.options.max_length, or remove them: they add nothing to training and scores"
            problems.append(Problem(what, where, remedy, fatal=empty == len(encoded)))
        return problems

    def segments(self, encoded: Encoded, row: int, processor: Any) -> list[tuple[str, bool]]:
        inputs = encoded.batch(np.array([row])).inputs
        ids, learned = inputs["input_ids"][0], np.concatenate([[False], inputs["target_ids"][0][:-1] != IGNORED])
        edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
        return [(processor.decode(ids[start:end]), bool(learned[start])) for start, end in pairwise(edges)]

    def generate(
        self, model: Any, processor: Any, examples: Examples, batch_size: int, in_step: bool = False
    ) -> dict[str, list[Any]]:
        template = Template.of(processor, processor.chat_template)
        samples = [self._with_system(sample) for sample in read_prompts(examples, self._form)]
        prompts = [as_prompt(sample, template) for sample in samples]
        are_chats = [bool(sample.turns) for sample in samples]
        ends, closing = end_tokens(model, processor, template), plain_closing(template)
        length = self.options.max_new_tokens
        written = write_answers(model, processor, prompts, are_chats, ends, batch_size, length, in_step, closing)
        return {"prediction": written}
