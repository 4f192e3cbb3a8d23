"""A model that a run has left, loaded to be used: on a GPU where there is one, in the precision that is asked for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator import models
from orchestrator.errors import InputError, Problem
from orchestrator.json_lines import parse_object
from orchestrator.models import SourceModel
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.runs.directory import DESCRIPTION
from orchestrator.tasks import Task, find_task
from orchestrator.training.engine.precision import Precision, dtype_of, has_bf16
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, may_cast_frozen, may_load_as_stored

Wanted = Literal["auto", "fp32", "bf16"]
"""What to compute in; `auto` is what the run computed in on a GPU, else fp32."""


@dataclass
class Trained:
    """A model directory, loaded."""

    folder: Path
    description: dict[str, Any]
    """The content of transfer.json: task, options, columns, recipe."""
    task: Task
    model: Any
    processor: Any
    device: torch.device
    precision: Precision
    formats: models.StoredFormats
    """Of its weights' files; of the source's, where it is an adapter."""

    @property
    def as_stored(self) -> bool:
        """Whether what the source stores in bf16 is loaded so."""
        return may_load_as_stored(parse_recipe(self.description["recipe"]), self.precision)


def find_trained(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model directory, or the one in a run directory, and its description; raises InputError when it is none."""
    inner = folder / "model" if (folder / "model").is_dir() else folder
    try:
        description = parse_object((inner / DESCRIPTION).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        remedy = "give the directory of a finished run (runs/NAME), or its model directory (runs/NAME/model)"
        raise InputError(Problem(f"there is no trained model: {DESCRIPTION} is missing", str(folder), remedy)) from None
    if not description:
        remedy = "run the command of the training again: it writes its model again, from its last checkpoint"
        raise InputError(Problem("it is damaged: not a JSON object", str(inner / DESCRIPTION), remedy))
    return inner, description


def load_trained(
    folder: Path, wanted: Wanted = "auto", device: torch.device | None = None, as_stored: bool | None = None
) -> Trained:
    """Load a model directory, or the one in a run directory.

    Args:
        device: None for a GPU where there is one.
        as_stored: leave weights in bf16 that are stored so, unless they are to be quantized. In fp32 the model is then
            not to be run but inside `models.ComputesInFp32`. None to do so where it is to compute in bf16.

    Raises:
        InputError: it is none of ours, or its source is not to be found; bf16 is wanted where the hardware lacks it.
    """
    inner, description = find_trained(folder)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task_class = find_task(description["task"])
    options = task_class.Options.model_validate(description["options"])
    recipe = parse_recipe(description["recipe"])
    precision = choose_for_use(wanted, recipe, device)
    adapter = recipe.transfer.adapter
    is_quantized = adapter is not None and adapter.quantize is not None
    as_stored = may_load_as_stored(recipe, precision) if as_stored is None else as_stored and not is_quantized
    model, source = load_base(inner, description, task_class.auto_class, as_stored)
    formats = models.stored_formats(source, models.load_config(source), model)
    task = task_class.restore(options, model.config)
    # The processor was saved beside the weights, also beside those of an adapter.
    here = replace(source, name=str(inner), location=str(inner), revision=None, is_local=True, where=str(inner))
    processor, _ = task.load_processor(here)
    with models.Fp32Compute() if as_stored else contextlib.nullcontext():
        task.configure_model(model, processor, source)
        model = put_adapter_on(model, inner)
    model = ready(model, recipe, precision, device)
    return Trained(inner, description, task, model, processor, device, precision, formats)


def choose_for_use(wanted: Wanted, recipe: Recipe, device: torch.device) -> Precision:
    """What a trained model computes in; raises InputError where bf16 is wanted and the hardware lacks it."""
    if wanted == "auto":
        is_narrow = device.type == "cuda" and recipe.train.precision != "fp32" and has_bf16(device)
        return "bf16" if is_narrow else "fp32"
    if wanted == "bf16" and not has_bf16(device):
        what = f"this {device.type} does not compute bf16 in hardware"
        raise InputError(Problem(what, "--precision", "leave it out, or give fp32"))
    return wanted


def ready(model: Any, recipe: Recipe, precision: Precision, device: torch.device) -> Any:
    """The model on its device, in evaluation mode; its weights and passes in the precision that it computes in."""
    model.requires_grad_(False)
    models.set_compute_dtype(model, dtype_of(precision))
    if precision == "bf16":
        if may_cast_frozen(recipe):
            cast_frozen_to_bf16(model)
        # The inner one, because peft generates with it.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.forward = torch.autocast(device.type, torch.bfloat16)(inner.forward)
    return model.to(device).eval()


def load_base(
    folder: Path, description: dict[str, Any], auto_class: str, as_stored: bool = False
) -> tuple[Any, SourceModel]:
    """The model of a folder; for one that holds an adapter, what it is to be put on."""
    if not holds_adapter(folder):
        source = models.open_folder(folder, str(folder))
        config = models.load_config(source)
        return models.load_model(source, auto_class, config, False, 0, as_stored=as_stored).model, source
    # The adapter says all that was learned since.
    source = replace(find_source_of(description), adapter=None)
    return load_source(description, auto_class, source, as_stored), source


def put_adapter_on(base: Any, folder: Path) -> Any:
    """The base with the folder's adapter on it, where there is one."""
    from peft import PeftConfig, PeftModel

    if not holds_adapter(folder):
        return base
    for name in PeftConfig.from_pretrained(str(folder)).modules_to_save or ():
        # The copy that the adapter's weights are read into has the format of the module that it is made from.
        base.get_submodule(name).float()
    return PeftModel.from_pretrained(base, folder)


def holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def find_source_of(description: dict[str, Any]) -> SourceModel:
    """The source of a trained model; raises ModelError where it is not to be found any more."""
    return models.find_source(parse_recipe(description["recipe"]))


def load_source(description: dict[str, Any], auto_class: str, source: SourceModel, as_stored: bool = False) -> Any:
    """The source's weights, in the format that the model was trained on."""
    config = models.load_config(source, **config_changes(description))
    adapter = parse_recipe(description["recipe"]).transfer.adapter
    quantize = adapter.quantize if adapter else None
    return models.load_model(source, auto_class, config, False, 0, quantize, as_stored).model


def config_changes(description: dict[str, Any]) -> dict[str, Any]:
    """What the task changed in the source's config; JSON made text of the labels' numbers."""
    changes = dict(description["config"])
    if "id2label" in changes:
        changes["id2label"] = {int(index): name for index, name in changes["id2label"].items()}
    return changes
