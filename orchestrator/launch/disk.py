"""Refuse a run before it starts if its disk is too full."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from orchestrator import models
from orchestrator.errors import ClusterError
from orchestrator.formatting import format_bytes
from orchestrator.models.folder import weight_files
from orchestrator.recipe import Recipe, resolve_path
from orchestrator.recipe.paths import PACKAGE_PREFIX
from orchestrator.training.engine.sizes import BF16, BYTES_IN_CHECKPOINT, FP32


def bytes_needed(recipe: Recipe, parameters: Mapping[str, int]) -> int:
    """Return the bytes of the model and its checkpoints: those that are kept, the best one, and one being written.

    Args:
        parameters: their number, `total` and `trained`.
    """
    checkpoints = (recipe.train.keep + 2) * (BYTES_IN_CHECKPOINT + BF16) * parameters["trained"]
    model = parameters["total" if recipe.transfer.adapter is None else "trained"]
    return checkpoints + FP32 * model


def refuse_full_disk(folder: Path, recipe: Recipe, parameters: Mapping[str, int]) -> None:
    """Raise ClusterError if the run directory's disk has less room than the run will take.

    Args:
        folder: the run directory; files in it count as room.
    """
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(folder).free + present, bytes_needed(recipe, parameters)
    if free >= needed:
        return
    raise ClusterError(
        f"{folder} has room for {format_bytes(free)}, and checkpoints and model take {format_bytes(needed)}\n"
        f"    -> free some space, lower train.keep ({recipe.train.keep}), or set scale.storage to a larger disk"
    )


def refuse_disk_without_room_for_model(storage: Path, recipe: Recipe) -> None:
    """Raise ClusterError if a disk has less room than the source's files take, which a tuned model will take at least.

    It takes no time, unlike `refuse_full_disk`, which knows more. Nothing is checked for adapters, which are small, and
    for sources that are not on this machine.
    """
    is_here = recipe.source.model.startswith(PACKAGE_PREFIX) or resolve_path(recipe.source.model, recipe.origin)
    if recipe.transfer.adapter is not None or not is_here:
        return
    least = sum(path.stat().st_size for path in weight_files(Path(models.find_source(recipe).location)))
    disk = next(folder for folder in (storage, *storage.parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if free < least:
        raise ClusterError(
            f"{storage} has room for {format_bytes(free)}, and the model alone takes {format_bytes(least)}\n"
            f"    -> free some space, or set scale.storage to a larger disk"
        )
