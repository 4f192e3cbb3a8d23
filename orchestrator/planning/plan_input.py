"""What a plan is made of: the recipe's source and data where they are at hand, and what stands in for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator import models
from orchestrator.errors import InputError, ModelError, Problem
from orchestrator.models import SourceModel
from orchestrator.recipe import Recipe, resolve_path, show_path
from orchestrator.recipe.paths import PACKAGE_PREFIX
from orchestrator.tasks import read_options
from orchestrator.training.assembling import Parts, assemble, assemble_outline
from orchestrator.training.features.build import examples_to_try, pick_position
from orchestrator.training.prepare import Prepared, encode_inputs, read_examples, read_inputs
from orchestrator.transfer import read_methods

CONFIG_FILE = "config.json"
LARGEST_TO_LOAD = 2 * 2**30
"""Bytes of weights that are read for a plan where they lie here: what a run finds out by trying it then finds too."""
PICTURE_SIZE = 224


@dataclass
class PlanInput:
    """What is planned."""

    prepared: Prepared
    """Its tables may hold made-up examples, of the longest length."""
    num_examples: int | None
    """Of *train*; None where nobody knows."""
    notes: list[str] = field(default_factory=list)

    @property
    def reads_weights(self) -> bool:
        source = self.prepared.source
        return source.is_local and self.prepared.recipe.source.config is None and _size(source) <= LARGEST_TO_LOAD


class UnknownProcessor:
    """Stands in for a tokenizer or image processor of which nothing is known but what the model's config says."""

    pad_token_id = eos_token_id = 0
    chat_template = None

    def __init__(self, config: Any) -> None:
        size: int | tuple[int, int] = getattr(config, "image_size", None) or PICTURE_SIZE
        both = (size, size) if isinstance(size, int) else size
        self.height, self.width = both

    def __len__(self) -> int:
        return 0

    def numbers(self, pictures: Any) -> Any:
        """As `PictureMaker.numbers`."""
        return pictures.transpose(0, 3, 1, 2).astype("float32")


def open_plan_input(recipe: Recipe, num_examples: int | None = None) -> PlanInput:
    """Find what the recipe names, as far as it is on this machine; nothing is downloaded but the model's config.

    Args:
        num_examples: of *train*, where the data are not at hand.

    Raises:
        InputError: recipe or local data are wrong; the model's config is out of reach.
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
    if _data_are_far(recipe):
        task, number = task_class.restore(options, config), recipe.target.limit.train or num_examples
    else:
        examples = read_examples(recipe, task_class, options)
        task, number = task_class.prepare(options, examples), len(examples["train"])
    processor = UnknownProcessor(config)
    table = task.longest_examples(recipe.train.global_batch_size, processor)
    notes = ["the data are not encoded: each example counts as long as target.options allow"]
    if number is None and recipe.train.steps is None:
        notes.append("how many examples there are is not known: give --examples N")
    prepared = Prepared(recipe, source, task, processor, {}, {"train": table}, {}, {}, [])
    return PlanInput(prepared, number, notes)


def build(plan_input: PlanInput, recipe: Recipe, **changes: Any) -> Parts:
    """The parts, with weights where those are read, else their outline.

    Args:
        changes: other values for the model's config; not with weights.

    Raises:
        ModelError: the source model cannot be used as the recipe asks, or shows its structure only with its weights.
    """
    prepared = replace(plan_input.prepared, recipe=recipe)
    if plan_input.reads_weights and not changes:
        whole = assemble(prepared)
        if recipe.scale.zero_stage != 3:
            pick_position(whole, *examples_to_try(prepared.encoded("train"), whole))
        return whole
    transfer = recipe.transfer
    if transfer.adapter is not None and transfer.adapter.init != "zero":
        # What it begins with changes no size.
        transfer = transfer.model_copy(update={"adapter": transfer.adapter.model_copy(update={"init": "zero"})})
    prepared = replace(prepared, recipe=recipe.model_copy(update={"transfer": transfer}))
    parts = assemble_outline(prepared, **changes)
    if parts is None and not changes and _bytes_from_scratch(prepared) <= LARGEST_TO_LOAD:
        transfer = transfer.model_copy(update={"from_scratch": True})
        parts = assemble(replace(prepared, recipe=recipe.model_copy(update={"transfer": transfer})))
    if parts is None:
        what = f"{prepared.source.name!r} shows its structure only when it runs, for which a plan takes it as too large"
        remedy = f"plan a model of less than {LARGEST_TO_LOAD / 2**30:.0f} GB of the same kind"
        raise ModelError(Problem(what, prepared.source.where, remedy))
    losses = models.find_token_losses(parts.module)
    if losses is not None:
        losses.is_direct = type(losses.layer) is torch.nn.Linear and not _bends_logits(losses.model.config)
    return parts


def _bytes_from_scratch(prepared: Prepared) -> int:
    """Of a model's weights in fp32."""
    config = models.load_config(prepared.source, **prepared.task.config_changes())
    with torch.device("meta"):
        model = models.load_model(prepared.source, prepared.task.auto_class, config, from_scratch=True, seed=0).model
    return sum(4 * value.numel() for value in model.parameters())


def _bends_logits(config: Any) -> bool:
    """Whether a model does something to its logits after the output layer, by the names that this goes by."""
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
    # Code of the model's own lies beside a file that has its usual name.
    location = str(file.parent if file.name == CONFIG_FILE else file)
    return SourceModel(recipe.source.model, location, None, True, recipe.source.trust_remote_code, None, where)


def _size(source: SourceModel) -> int:
    return sum(path.stat().st_size for path in Path(source.location).glob("*.safetensors"))
