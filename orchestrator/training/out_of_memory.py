"""What happens when a pass does not fit into memory: the run goes on with half as many examples in each."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from orchestrator.errors import RunFailed
from orchestrator.training.engine import micro_batch_size
from orchestrator.training.prepare import Prepared
from orchestrator.training.run_directory import RunDirectory

RECORD = "micro_batch_size"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or this process, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def with_recorded_passes(prepared: Prepared, directory: RunDirectory) -> Prepared:
    """The same with passes as small as they had to become before, where the recipe leaves their size open."""
    number = directory.read_record().get(RECORD)
    if number is None or prepared.recipe.train.micro_batch_size != "auto":
        return prepared
    train = prepared.recipe.train.model_copy(update={"micro_batch_size": number})
    return replace(prepared, recipe=prepared.recipe.model_copy(update={"train": train}))


def halve_passes(prepared: Prepared, directory: RunDirectory, is_open: bool) -> None:
    """Record that passes are to be half as large; what the failed one held is freed.

    Args:
        prepared: as the failed pass had it.
        is_open: the recipe leaves the size of passes open.

    Raises:
        RunFailed: there is nothing to halve, or the recipe says how large passes are.
    """
    number = micro_batch_size(prepared.recipe)
    if number == 1 or not is_open:
        smaller = "train.micro_batch_size: auto, " if number > 1 else ""
        raise RunFailed(
            f"a pass over {number} example{'s' if number > 1 else ''} does not fit into memory; checkpoints are kept\n"
            f"    -> set {smaller}train.gradient_checkpointing: true, or see: orchestrator plan"
        )
    directory.update_record(**{RECORD: -(-number // 2)})
    directory.note(
        f"{number} examples did not fit into memory in one pass, so passes have {-(-number // 2)} from then on"
    )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
