"""Load a trained model for inference, on a GPU if there is one, in a chosen precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator import models
from orchestrator.errors import ClusterError, InputError, Problem
from orchestrator.json_lines import parse_object
from orchestrator.models import SourceModel
from orchestrator.models.shortcuts.forward import AroundForward, wrap_forward
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.runs.directory import DESCRIPTION
from orchestrator.tasks import Task, find_task
from orchestrator.training.engine.devices import driver_remedy, find_gpu_problem
from orchestrator.training.engine.precision import Precision, dtype_of, has_bf16
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, may_cast_frozen, may_load_as_stored

PrecisionChoice = Literal["auto", "fp32", "bf16"]
"""The precision to compute in; `auto` is that of the run on a GPU, and fp32 on a CPU."""


@dataclass
class TrainedModel:
    """A trained model with its task and processor."""

    folder: Path
    description: dict[str, Any]
    """The content of transfer.json: task, options, columns, recipe."""
    task: Task
    model: Any
    processor: Any
    device: torch.device
    precision: Precision
    formats: models.StoredDtypes
    """Formats of its weight files; for an adapter, of its source's."""

    @property
    def as_stored(self) -> bool:
        """Whether weights that the source stores in bf16 stay in bf16."""
        return may_load_as_stored(parse_recipe(self.description["recipe"]), self.precision)


def find_trained_model(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Find a model directory, which may be given by its run directory; return it with its description.

    Raises:
        InputError: there is no trained model, or its description is damaged.
    """
    inner = folder / "model" if (folder / "model").is_dir() else folder
    try:
        description = parse_object((inner / DESCRIPTION).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        remedy = "give the directory of a finished run (runs/NAME), or its model directory (runs/NAME/model)"
        raise InputError(Problem(f"there is no trained model: {DESCRIPTION} is missing", str(folder), remedy)) from None
    if not description:
        remedy = "run the training command again: it writes the model again, from the last checkpoint"
        raise InputError(Problem("the file is damaged: it holds no JSON object", str(inner / DESCRIPTION), remedy))
    return inner, description


def load_trained_model(
    folder: Path, choice: PrecisionChoice = "auto", device: torch.device | None = None, as_stored: bool | None = None
) -> TrainedModel:
    """Load a model directory, which may be given by its run directory.

    Args:
        device: None for a GPU if there is one.
        as_stored: keep weights in bf16 that are stored in bf16, unless they are quantized; a model that computes in
            fp32 must then run inside `models.Fp32Compute`. None to keep them if the model computes in bf16.

    Raises:
        InputError: there is no trained model, or its source is missing; the hardware does not compute bf16.
        ClusterError: this machine has a GPU that PyTorch cannot use.
    """
    inner, description = find_trained_model(folder)
    device = device or choose_inference_device()
    task_class = find_task(description["task"])
    options = task_class.Options.model_validate(description["options"])
    recipe = parse_recipe(description["recipe"])
    precision = choose_inference_precision(choice, recipe, device)
    adapter = recipe.transfer.adapter
    is_quantized = adapter is not None and adapter.quantize is not None
    as_stored = may_load_as_stored(recipe, precision) if as_stored is None else as_stored and not is_quantized
    model, source = load_base(inner, description, task_class.auto_class, as_stored)
    formats = models.stored_dtypes(source, models.load_config(source), model)
    task = task_class.restore(options, model.config)
    # The processor is saved with the weights, also with those of an adapter.
    saved = replace(source, name=str(inner), location=str(inner), revision=None, is_local=True, where=str(inner))
    processor, _ = task.load_processor(saved)
    with models.Fp32ComputeMode() if as_stored else contextlib.nullcontext():
        task.configure_model(model, processor, source)
        model = load_adapter(model, inner)
    model = prepare_for_inference(model, recipe, precision, device)
    return TrainedModel(inner, description, task, model, processor, device, precision, formats)


def choose_inference_device() -> torch.device:
    """Return a GPU if there is one, otherwise the CPU.

    Raises:
        ClusterError: this machine has a GPU that PyTorch cannot use.
    """
    reason = find_gpu_problem()
    if reason is not None:
        what = f"this machine has a GPU that PyTorch cannot use: {reason}"
        remedy = f"{driver_remedy()}, or export CUDA_VISIBLE_DEVICES= before the command, which computes on the CPU"
        raise ClusterError(str(Problem(what, remedy=remedy)))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_inference_precision(choice: PrecisionChoice, recipe: Recipe, device: torch.device) -> Precision:
    """Return the precision to compute in; raises InputError if it is bf16 and the hardware does not compute it."""
    if choice == "auto":
        is_bf16 = device.type == "cuda" and recipe.train.precision != "fp32" and has_bf16(device)
        return "bf16" if is_bf16 else "fp32"
    if choice == "bf16" and not has_bf16(device):
        what = f"this {device.type} does not compute bf16 in hardware"
        raise InputError(Problem(what, "--precision", "leave it out, or give fp32"))
    return choice


def prepare_for_inference(model: Any, recipe: Recipe, precision: Precision, device: torch.device) -> Any:
    """Move a model to a device, in evaluation mode, and have it compute in a precision; return it."""
    model.requires_grad_(False)
    models.set_compute_dtype(model, dtype_of(precision))
    if precision == "bf16":
        if may_cast_frozen(recipe):
            cast_frozen_to_bf16(model)
        # Of the inner model, because peft generates with that.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        wrap_forward(inner, _in_bf16(device))
    return model.to(device).eval()


def _in_bf16(device: torch.device) -> AroundForward:
    """Return a function around a forward function that runs it under autocast."""

    def run(_: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return original(*args, **kwargs)

    return run


def load_base(
    folder: Path, description: dict[str, Any], auto_class: str, as_stored: bool = False
) -> tuple[Any, SourceModel]:
    """Load the model of a folder, and return it with its source; for an adapter, the model below it."""
    if not has_adapter(folder):
        source = models.open_folder(folder, str(folder))
        config = models.load_config(source)
        return models.load_model(source, auto_class, config, False, 0, as_stored=as_stored).model, source
    # The adapter holds everything that was learned after the source.
    source = replace(find_source_of(description), adapter=None)
    return load_source(description, auto_class, source, as_stored), source


def load_adapter(base: Any, folder: Path) -> Any:
    """Return the model with the folder's adapter on it; the model itself if there is none."""
    from peft import PeftConfig, PeftModel

    if not has_adapter(folder):
        return base
    for name in PeftConfig.from_pretrained(str(folder)).modules_to_save or ():
        # peft copies this module, and reads the adapter's fp32 weights into the copy.
        base.get_submodule(name).float()
    return PeftModel.from_pretrained(base, folder)


def has_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def find_source_of(description: dict[str, Any]) -> SourceModel:
    """Find the source of a trained model; raises ModelError if it is missing."""
    return models.find_source(parse_recipe(description["recipe"]))


def load_source(description: dict[str, Any], auto_class: str, source: SourceModel, as_stored: bool = False) -> Any:
    """Load the source's model, quantized if the training did so."""
    config = models.load_config(source, **config_changes(description))
    adapter = parse_recipe(description["recipe"]).transfer.adapter
    quantize = adapter.quantize if adapter else None
    return models.load_model(source, auto_class, config, False, 0, quantize, as_stored).model


def config_changes(description: dict[str, Any]) -> dict[str, Any]:
    """Return the task's changes of the source's config, with the label ids as numbers, which JSON has as text."""
    changes = dict(description["config"])
    if "id2label" in changes:
        changes["id2label"] = {int(index): name for index, name in changes["id2label"].items()}
    return changes
