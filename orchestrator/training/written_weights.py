"""Write a model's weights, under the names of its state dict and in its source's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.folder import CONFIG_FILE, INDEX_FILE
from orchestrator.models.stored import StoredDtypes
from orchestrator.training.engine.base import on_cpu

SHARD_SIZE = "5GB"


def tensors_by_name(module: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each entry of a model's state dict: its name, its name in `named_parameters`, the tensor.

    Tied entries have one name in `named_parameters`.
    """
    names = {id(value): name for name, value in module.named_parameters()}
    for name, value in module.state_dict(keep_vars=True).items():
        yield name, names.get(id(value), name), value


def under_all_names(module: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under every name that the state dict has for them; tied weights have several."""
    return {name: weights[own] for name, own, _ in tensors_by_name(module) if own in weights}


def whole_state(
    module: Any, weights: dict[str, Tensor], formats: StoredDtypes, rebuild: Callable[[], Any] | None
) -> dict[str, Tensor]:
    """Return a model's state dict on the CPU, with trained weights.

    Args:
        weights: trained weights by their names in `named_parameters`, in the formats to write.
        rebuild: builds the model again, for the values of all other weights; None to take them from `module`.
    """
    entries = list(tensors_by_name(module))
    if rebuild is not None and any(own not in weights and value.is_floating_point() for _, own, value in entries):
        # The rebuilt model has the same names.
        entries = list(tensors_by_name(rebuild()))
    whole = dict(weights)
    for _, own, value in entries:
        if own not in whole:
            whole[own] = on_cpu(value, formats.of(own))
    return {name: whole[own] for name, own, _ in entries}


def save_whole(module: Any, state: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Write a model's config and weights, in files of at most 5 GB; the values are those of `state`.

    Args:
        dtype: the format in config.json, which other libraries load the model in.
    """
    values = {id(value): value.numel() for value in state.values()}
    # The model's own weights may be sharded or rounded.
    module.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)
    name = str(dtype).removeprefix("torch.")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for part in (config, *(config[key] for key in module.config.sub_configs if isinstance(config.get(key), dict))):
        if "dtype" in part:
            part["dtype"] = name
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (folder / INDEX_FILE).exists():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        index["metadata"]["total_parameters"] = sum(values.values())
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
