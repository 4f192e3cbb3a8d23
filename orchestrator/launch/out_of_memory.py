"""What happens when a pass does not fit into memory: the run goes on with half as many tokens in each."""

from __future__ import annotations

import gc
import re
from dataclasses import replace

import numpy as np
import torch

from orchestrator.data.batches import assign
from orchestrator.errors import RunFailed
from orchestrator.runs.directory import RunDirectory
from orchestrator.training.engine.base import cost_of_pass
from orchestrator.training.engine.devices import uses_gpu
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.loop import make_schedule
from orchestrator.training.prepare import Prepared

RECORD = "tokens_per_pass"
BATCHES_LOOKED_AT = 200
_MESSAGES = re.compile(
    r"can't allocate memory"  # PyTorch on a CPU
    r"|\b(CUDA|HIP) error: out of memory"  # what is allocated beside PyTorch's cache
    r"|_STATUS_ALLOC_FAILED|_(HOST|DEVICE)_ALLOCATION_FAILED"  # cuBLAS, cuSOLVER, cuDNN and their like
    r"|\b(Cuda|HIP) failure (\d+ )?'out of memory'"  # NCCL and RCCL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or this process, had no memory left: for a tensor, or for a library that PyTorch calls."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None
    )


def with_recorded_passes(prepared: Prepared, directory: RunDirectory) -> Prepared:
    """The same with passes as small as they had to become before, where the recipe leaves their size open."""
    number = directory.read_record().get(RECORD)
    if number is None or prepared.recipe.train.micro_batch_size != "auto":
        return prepared
    return replace(prepared, tokens_per_pass=number)


def halve_passes(prepared: Prepared, directory: RunDirectory) -> None:
    """Record that passes are to be half as large; what the failed one held is freed.

    Args:
        prepared: as the failed pass had it.

    Raises:
        RunFailed: there is nothing to halve, or the recipe says how large passes are.
    """
    number, is_open = micro_batch_size(prepared.recipe), prepared.recipe.train.micro_batch_size == "auto"
    longest = int(prepared.encoded("train").lengths.max())
    largest = largest_pass(prepared)
    if largest <= longest or not is_open:
        smaller = "train.micro_batch_size: auto, " if not is_open and number > 1 else ""
        what = f"{number} examples" if not is_open and number > 1 else "1 example"
        raise RunFailed(
            f"a pass over {what} does not fit into memory; checkpoints are kept\n"
            f"    -> set {smaller}train.gradient_checkpointing: true, or see: orchestrator plan"
        )
    half = max(longest, -(-largest // 2))
    directory.update_record(**{RECORD: half})
    # Of pictures, each counts as one.
    unit = "examples" if longest == 1 else "tokens, padding counted,"
    directory.add_note(f"{largest} {unit} did not fit into memory in one pass, so passes have {half} from then on")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_pass(prepared: Prepared) -> int:
    """Return the tokens of a worker's largest pass, padding counted, in an epoch or a part of one that is long."""
    recipe, lengths = prepared.recipe, prepared.encoded("train").lengths
    micro_batch, most = micro_batch_size(recipe), prepared.tokens_per_pass
    batches = make_schedule(recipe.train, lengths, micro_batch).order.epoch(0)
    # The one with the longest example is always among them.
    long = max(range(len(batches)), key=lambda number: int(lengths[batches[number]].max()))
    some = [*batches[:: -(-len(batches) // BATCHES_LOOKED_AT)], batches[long]]
    cost = cost_of_pass("cuda" if uses_gpu(recipe) else "cpu", autocasts=False)
    hands = [
        mine
        for batch in some
        for dealt in assign(batch, lengths, recipe.scale.workers, micro_batch, cost, most)
        for mine in dealt
        if len(mine)
    ]
    return max(len(mine) * int(np.max(lengths[mine])) for mine in hands)
