"""Weights that earlier phases have changed: put into the model of a later one, and kept with its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.distributed import Exchange
from orchestrator.training.engine.base import trained_statistics

FILE = "earlier_phases.safetensors"


@torch.no_grad()
def put_changes(
    module: Any, changed: dict[str, Tensor], exchange: Exchange, only_first: bool
) -> tuple[frozenset[str], dict[str, Tensor]]:
    """Give a model the weights that worker 0 has of earlier phases. All workers call this.

    Args:
        changed: parameters and statistics by their names, on worker 0.
        only_first: whether worker 0 alone has the model; the others get their parts from it later.

    Returns:
        The names of all of them, and those weights that the model does not train, on worker 0.
    """
    names = exchange.broadcast(list(changed))
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    trained |= {name for name, _ in trained_statistics(module)}
    here = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name in names:
        mine = changed.get(name)
        value = mine if only_first else exchange.broadcast(mine)
        if value is None:
            continue
        if here[name].dtype == value.dtype:
            here[name].copy_(value)
        else:
            # Loaded in fewer digits, because it was stored so.
            here[name].data = value.to(here[name].device, copy=True)
    return frozenset(names), {name: value for name, value in changed.items() if name not in trained}


def write_changes(folder: Path, changed: dict[str, Tensor]) -> None:
    """Write weights that a phase does not train itself; no file where there are none."""
    if changed:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in changed.items()}, folder / FILE)


def read_changes(folder: Path) -> dict[str, Tensor]:
    """Read back what `write_changes` wrote."""
    if not (folder / FILE).exists():
        return {}
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / FILE)
    return found
