"""Export a trained model, with its adapter as it is or merged into the weights.

An adapter is merged one layer at a time, in fp32, so that main memory holds the model in its source's format and a
single layer in fp32.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestrator import models
from orchestrator.errors import InputError, Problem, RunFailed
from orchestrator.inference.trained_model import TrainedModel, find_trained_model, has_adapter, load_trained_model
from orchestrator.runs.directory import DESCRIPTION
from orchestrator.training.engine.base import on_cpu
from orchestrator.training.model_card import card_of_merged
from orchestrator.training.written_weights import save_whole, tensors_by_name, whole_state

LARGEST_ERROR = 1e-4  # Relative to the largest output; fp32 sums are taken in another order.


def export(folder: Path, output: Path, merge: bool) -> float | None:
    """Copy a trained model to a new folder; with `merge`, its adapter is merged into the source's weights.

    Returns:
        The largest change of an output when the merged weights were rounded to the source's format, relative to the
        largest output; None if nothing was rounded.

    Raises:
        InputError: the output exists, or there is no adapter to merge.
        RunFailed: the merged model has other outputs.
    """
    if output.exists():
        raise InputError(Problem("the output exists already", str(output), "name a folder that does not exist"))
    inner, _ = find_trained_model(folder)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    moved = None
    if not merge:
        shutil.copytree(inner, partial)
    else:
        if not has_adapter(inner):
            raise InputError(Problem("the model has no adapter to merge", str(folder), "export it without --merge"))
        # On the CPU, whose memory is larger than a GPU's.
        trained = load_trained_model(folder, "fp32", torch.device("cpu"), as_stored=True)
        merged, moved = merged_model(trained)
        save_whole(merged, whole_state(merged, {}, trained.formats, None), trained.formats.main, partial)
        trained.processor.save_pretrained(partial)
        card = (inner / "README.md").read_text(encoding="utf-8")
        note = None if moved is None else rounding_note(trained.formats.main, moved)
        (partial / "README.md").write_text(card_of_merged(card, trained.task, note), encoding="utf-8")
        shutil.copy(inner / DESCRIPTION, partial)
    partial.rename(output)
    return moved


def rounding_note(dtype: torch.dtype, moved: float) -> str:
    """Return a sentence on the change of outputs by rounding the merged weights."""
    name = str(dtype).removeprefix("torch.")
    return f"the weights are in {name}, as the source's; rounding changed outputs by up to {moved:.1e} of the largest"


def merged_model(trained: TrainedModel) -> tuple[Any, float | None]:
    """Return the model with its adapter merged, in its source's format, and the change of outputs by rounding.

    The model is modified. Weights in 4 bits are dequantized.

    Raises:
        RunFailed: with the adapter merged in fp32, the outputs change.
    """
    model, formats = trained.model, trained.formats
    inputs = trained.task.example_inputs(trained.processor)
    before = compute_logits(model, inputs)
    with merging_each_layer(model):
        in_fp32 = compute_logits(model, inputs)
    refuse_changed_outputs(in_fp32, before)
    base = model.get_base_model()
    for name, layer in changed_layers(base).items():
        base.set_submodule(name, cast_to_formats(plain_layer(layer), formats, f"{name}."))
    merged = model.merge_and_unload().eval()
    if getattr(merged, "hf_quantizer", None) is not None:
        merged.hf_quantizer.remove_quantization_config(merged)
    cast_to_formats(merged, formats)
    written = compute_logits(merged, inputs)
    if formats.main == torch.float32 and not formats.others:
        refuse_changed_outputs(written, before)
        return merged, None
    return merged, difference(written, in_fp32, before)


def changed_layers(base: nn.Module) -> dict[str, Any]:
    """Return the adapted or quantized layers by name, without those inside of another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    quantized = {id(module) for module in models.quantized_layers(base).values()}
    found: dict[str, Any] = {}
    inside: set[int] = set()
    for name, module in base.named_modules():  # Modules come before those that they contain.
        if id(module) not in inside and (isinstance(module, BaseTunerLayer) or id(module) in quantized):
            found[name] = module
            inside |= {id(part) for part in module.modules()}
    return found


def plain_layer(layer: Any) -> nn.Module:
    """Return a PyTorch layer in fp32 that computes the same as an adapted or quantized layer, which is not changed."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    if not isinstance(layer, BaseTunerLayer):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(dequantize_module_weight(layer).float())
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.float())
        return plain.requires_grad_(False)
    merged: nn.Module
    if not models.quantized_layers(layer):
        copied: Any = copy.deepcopy(layer).float()
        if hasattr(copied, "unload_and_optionally_merge_module"):  # Adapted parameters, which may be nested.
            merged = copied.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            copied.merge()
            merged = copied.get_base_layer()
        return merged
    base = layer.get_base_layer()
    layer.base_layer = plain_layer(base)
    try:
        # The `merge` of a 4-bit layer would round the sum to 4 bits again.
        Linear.merge(layer)
        merged = layer.base_layer
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
    return merged


@contextlib.contextmanager
def merging_each_layer(model: Any) -> Iterator[None]:
    """Let each adapted layer compute with merged weights, which exist only during its own forward pass."""
    layers = changed_layers(model.get_base_model()).values()
    hooks = [
        layer.register_forward_hook(
            lambda layer, given, named, output: plain_layer(layer)(*given, **named), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cast_to_formats(module: nn.Module, formats: models.StoredDtypes, prefix: str = "") -> nn.Module:
    """Cast a module's weights to the formats that they are stored in; return the module.

    Args:
        prefix: of the module's parameters in its model.
    """
    for _, own, value in tensors_by_name(module):
        value.data = on_cpu(value, formats.of(prefix + own))
    return module


def difference(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> float:
    """Return the largest difference of two tensors of logits, relative to the largest value in `scale`."""
    return float((one - other).abs().max() / scale.abs().max())


def refuse_changed_outputs(after: torch.Tensor, before: torch.Tensor) -> None:
    """Raise RunFailed if a merged model computes other logits than before."""
    error = difference(after, before, before)
    if not error <= LARGEST_ERROR:
        raise RunFailed(
            f"with the adapter merged, the model's outputs differ by {error:.1e} of their size; nothing was written\n"
            "    -> export it without --merge, and load it with peft"
        )


@torch.no_grad()
def compute_logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return a model's logits for one example, computed in fp32, on the CPU."""
    with models.Fp32ComputeMode():
        logits: torch.Tensor = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
    return logits.float().cpu()
