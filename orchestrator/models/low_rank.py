"""Low-rank deltas of weights: read from a LoRA adapter, added to a model, saved as one adapter of all their ranks.

A LoRA adds s B A to a weight (Hu et al. 2021). The sum of several is one again: [s1 B1, s2 B2] [A1; A2].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import ModelError, Problem
from orchestrator.models.adapter import ADAPTER_NAME
from orchestrator.models.folder import ADAPTER_CONFIG_FILE, ADAPTER_FILE, MERGE

LoraDeltas: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""By a module's name: A of shape [rank, inputs], and B of shape [outputs, rank], multiplied by the scaling."""
PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
OVERSAMPLING, POWER_ITERATIONS = 8, 16


def read_lora_deltas(folder: Path) -> LoraDeltas:
    """Return what a LoRA adapter of peft adds to weights; modules that it saves whole are left out.

    Raises:
        ModelError: it changes stacked weights of experts.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    config = LoraConfig.from_pretrained(str(folder))
    if config.target_parameters:
        what = f"the adapter changes weights of experts ({min(config.target_parameters)}, ...), which are not added up"
        raise ModelError(Problem(what, str(folder), MERGE))
    weights = load_file(folder / ADAPTER_FILE)
    changes = {}
    for key, first in weights.items():
        if not key.endswith(_A):
            continue
        name = key.removeprefix(PREFIX).removesuffix(_A)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        scaling = alpha / (len(first) ** 0.5 if config.use_rslora else len(first))
        changes[name] = (first.float(), weights[key.removesuffix(_A) + _B].float() * scaling)
    return changes


def add_lora_deltas(model: nn.Module, changes: LoraDeltas, where: str) -> None:
    """Add deltas to a model's weights.

    Args:
        where: the adapter's place in the user's terms, for messages.

    Raises:
        ModelError: the model has no such modules, or they have other shapes.
    """
    modules = dict(model.named_modules())
    for name, (first, second) in changes.items():
        change = second @ first
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(modules.get(name), Conv1D):
            change = change.T
        if weight is None or weight.shape != change.shape:
            found = "lacks it" if weight is None else f"has it as {tuple(weight.shape)}"
            what = f"the adapter changes {name} of shape {tuple(change.shape)}, but its model {found}"
            raise ModelError(Problem(what, where, "name the adapter and the model that belong together"))
        with torch.no_grad():
            weight += change


def extend_adapter(folder: Path, others: Sequence[LoraDeltas]) -> None:
    """Write further deltas into a saved adapter, which adds the sum of all of them to its model then."""
    path = folder / ADAPTER_CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in load_file(folder / ADAPTER_FILE).items() if ".lora_" not in key}
    every = [read_lora_deltas(folder), *others]
    ranks: dict[str, int] = {}
    for name in dict.fromkeys(name for changes in every for name in changes):
        parts = [changes[name] for changes in every if name in changes]
        first, second = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
        kept[f"{PREFIX}{name}{_A}"], kept[f"{PREFIX}{name}{_B}"] = first.contiguous(), second.contiguous()
        ranks[name] = len(first)
    most = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != most}
    # B is multiplied by the scaling already, so that peft's scaling, alpha / rank, must be 1.
    config |= {"r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": other, "use_rslora": False}
    config |= {"target_modules": sorted(ranks), "init_lora_weights": True}
    save_file(kept, folder / ADAPTER_FILE, metadata={"format": "pt"})
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def init_pissa(model: Any) -> LoraDeltas:
    """Initialise adapters with the largest singular values of their weights, which keep the remainder (PiSSA).

    PiSSA (Meng et al. 2024): A = sqrt(S / s) V^T and B = U sqrt(S / s). The output of the model stays the same. The
    decomposition (Halko et al. 2011) uses the caller's random stream, and is computed in fp64, so that it can be
    repeated exactly. Modules without values are skipped.

    Args:
        model: a `peft.PeftModel`, just built.

    Returns:
        The factors whose products were subtracted from the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    initial_factors = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer.get_base_layer().weight.is_meta:
            continue
        base = layer.get_base_layer()
        first, second, scaling = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME], layer.scaling[ADAPTER_NAME]
        weight = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data
        rank = min(layer.r[ADAPTER_NAME], *weight.shape)
        size = min(rank + OVERSAMPLING, *weight.shape)
        left, values, right = torch.svd_lowrank(weight.double(), size, POWER_ITERATIONS)
        roots = (values[:rank] / scaling).sqrt()
        with torch.no_grad():
            for part, vectors in ((first.weight, right), (second.weight.T, left)):
                part.zero_()[:rank] = (vectors[:, :rank] * roots).T.float()
            change = scaling * second.weight @ first.weight
            base.weight -= change.T if isinstance(base, Conv1D) else change
            initial_factors[name] = (first.weight.detach().clone(), scaling * second.weight.detach())
    return initial_factors
