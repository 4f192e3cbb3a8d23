"""The input of a plan: the recipe's source and data, or placeholders where they are not on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator import models
from orchestrator.errors import InputError, ModelError, Problem, raise_if_fatal
from orchestrator.formatting import format_bytes
from orchestrator.models import SourceModel
from orchestrator.recipe import Recipe, resolve_path, show_path
from orchestrator.recipe.paths import PACKAGE_PREFIX
from orchestrator.tasks import read_options
from orchestrator.training.assembling import ModelParts, assemble, assemble_outline
from orchestrator.training.features.build import examples_to_try, use_token_pooling
from orchestrator.training.prepare import Prepared, check_source, encode_inputs, read_examples, read_inputs
from orchestrator.transfer import read_methods

CONFIG_FILE = "config.json"
LARGEST_TO_LOAD = 2 * 2**30
"""Bytes of local weights that a plan reads: it then tries out what a run would try out."""
PICTURE_SIZE = 224


@dataclass
class PlanInput:
    """The recipe that is planned, with its data."""

    prepared: Prepared
    """Its tables may hold placeholder examples, of the longest length."""
    num_examples: int | None
    """Examples of *train*; None where their number is unknown."""
    notes: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The length of each example of *train*; placeholders stand for as many examples as there are."""
        stored = self.prepared.encoded("train").lengths
        return stored if self.num_examples is None else np.resize(stored, self.num_examples)

    def stored_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows of the encoded table that hold these examples, which may be placeholders."""
        return rows % len(self.prepared.encoded("train"))

    @property
    def reads_weights(self) -> bool:
        """Whether the plan builds the model with its weights."""
        source = self.prepared.source
        return source.is_local and self.prepared.recipe.source.config is None and _size(source) <= LARGEST_TO_LOAD


class UnknownProcessor:
    """Takes the place of a tokenizer or image processor; all it knows is the model's config."""

    pad_token_id = eos_token_id = 0
    chat_template = None

    def __init__(self, config: Any) -> None:
        size: int | tuple[int, int] = getattr(config, "image_size", None) or PICTURE_SIZE
        both = (size, size) if isinstance(size, int) else size
        self.height, self.width = both

    def __len__(self) -> int:
        return 0

    def numbers(self, pictures: Any) -> Any:
        """Return pixels as floats with channels first, as `ImagePreprocessor.numbers` does."""
        return pictures.transpose(0, 3, 1, 2).astype("float32")


def open_plan_input(recipe: Recipe, num_examples: int | None = None) -> PlanInput:
    """Find the recipe's source and data where they are on this machine; only the model's config is downloaded.

    Args:
        num_examples: of *train*, where the data are not on this machine.

    Raises:
        InputError: recipe or local data are wrong; the model's config cannot be reached.
    """
    if num_examples is not None and num_examples < 1:
        raise InputError(Problem(f"{num_examples} examples are too few", "--examples", "give 1 or more"))
    if recipe.source.config is None and not (_source_is_far(recipe) or _data_are_far(recipe)):
        prepared = encode_inputs(read_inputs(recipe))
        return PlanInput(prepared, len(prepared.encoded("train")))
    read_methods(recipe)
    source = _open_config(recipe) if recipe.source.config is not None else _find_source(recipe)
    config = models.load_config(source)
    task_class, options = read_options(recipe)
    raise_if_fatal(check_source(source, task_class), ModelError)
    if _data_are_far(recipe):
        task, number = task_class.restore(options, config), recipe.target.limit.train or num_examples
    else:
        examples = read_examples(recipe, task_class, options)
        task, number = task_class.prepare(options, examples), len(examples["train"])
    processor = UnknownProcessor(config)
    table = task.longest_examples(recipe.train.global_batch_size, processor)
    notes = ["the data are not encoded: each example counts with the largest length that target.options allow"]
    if number is None and recipe.train.steps is None:
        notes.append("the number of examples is not known: give --examples N")
    prepared = Prepared(recipe, source, task, processor, {}, {"train": table}, {}, {}, [])
    return PlanInput(prepared, number, notes)


def build(plan_input: PlanInput, recipe: Recipe, **changes: Any) -> ModelParts:
    """Build the parts, with weights where the plan reads them, otherwise as an outline.

    Args:
        changes: other values for the model's config; they always give an outline.

    Raises:
        ModelError: the source model cannot be used as the recipe asks, or shows its structure only with its weights.
    """
    prepared = replace(plan_input.prepared, recipe=recipe)
    if plan_input.reads_weights and not changes:
        whole = assemble(prepared)
        if recipe.scale.zero_stage != 3:
            use_token_pooling(whole, *examples_to_try(prepared.encoded("train"), whole))
        return whole
    transfer = recipe.transfer
    if transfer.adapter is not None and transfer.adapter.init != "zero":
        # The initial values change no size.
        transfer = transfer.model_copy(update={"adapter": transfer.adapter.model_copy(update={"init": "zero"})})
    prepared = replace(prepared, recipe=recipe.model_copy(update={"transfer": transfer}))
    parts = assemble_outline(prepared, **changes)
    if parts is None and not changes and _bytes_from_scratch(prepared) <= LARGEST_TO_LOAD:
        transfer = transfer.model_copy(update={"from_scratch": True})
        parts = assemble(replace(prepared, recipe=recipe.model_copy(update={"transfer": transfer})))
    if parts is None:
        what = f"{prepared.source.name!r} shows its structure only when it runs, and it is too large to run for a plan"
        remedy = f"plan a model of the same kind with less than {format_bytes(LARGEST_TO_LOAD)} of weights"
        raise ModelError(Problem(what, prepared.source.where, remedy))
    losses = models.find_token_losses(parts.module)
    if losses is not None:
        losses.is_direct = type(losses.layer) is torch.nn.Linear and not _changes_logits(losses.model.config)
    return parts


def _bytes_from_scratch(prepared: Prepared) -> int:
    """Return the bytes of a model's weights in fp32."""
    config = models.load_config(prepared.source, **prepared.task.config_changes())
    with torch.device("meta"):
        model = models.load_model(prepared.source, prepared.task.auto_class, config, from_scratch=True, seed=0).model
    return sum(4 * value.numel() for value in model.parameters())


def _changes_logits(config: Any) -> bool:
    """Whether a model changes its logits after the output layer, such as by a soft cap, as its config says."""
    values: Mapping[str, Any] = config.get_text_config().to_dict()
    return any("logit" in key and value not in (None, 1.0, False) for key, value in values.items())


def _source_is_far(recipe: Recipe) -> bool:
    """Whether the model would have to be downloaded."""
    text = recipe.source.model
    return not text.startswith(PACKAGE_PREFIX) and resolve_path(text, recipe.origin) is None


def _data_are_far(recipe: Recipe) -> bool:
    data = recipe.target.data if isinstance(recipe.target.data, str) else recipe.target.data.path
    return data is not None and resolve_path(data, recipe.origin) is None


def _find_source(recipe: Recipe) -> SourceModel:
    try:
        return models.find_source(recipe)
    except ModelError as error:
        other = f"or, for a plan, set source.config to a copy of its {CONFIG_FILE}"
        raise ModelError(replace(each, remedy=f"{each.remedy}; {other}") for each in error.problems) from error


def _open_config(recipe: Recipe) -> SourceModel:
    where = recipe.origin.where("source.config")
    path = recipe.origin.folder / str(recipe.source.config)
    file = path if path.is_file() else path / CONFIG_FILE
    remedy = f"name a copy of the model's {CONFIG_FILE}, or the folder that holds it"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem(f"{show_path(file)} cannot be read: {error}", where, remedy)) from error
    if not isinstance(values, dict):
        raise InputError(Problem(f"{show_path(file)} holds no JSON object", where, remedy))
    # The model's own code is next to a config file that has its usual name.
    location = str(file.parent if file.name == CONFIG_FILE else file)
    return SourceModel(recipe.source.model, location, None, True, recipe.source.trust_remote_code, None, where)


def _size(source: SourceModel) -> int:
    return sum(path.stat().st_size for path in Path(source.location).glob("*.safetensors"))
