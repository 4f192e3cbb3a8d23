"""Training goes on with half as many tokens in each pass where a pass does not fit into memory."""

from __future__ import annotations

import gc
import re
from dataclasses import replace

import numpy as np
import torch

from orchestrator.errors import RunFailed
from orchestrator.runs.directory import RunDirectory
from orchestrator.training.engine.base import cost_of_pass
from orchestrator.training.engine.devices import uses_gpu
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.loop import make_schedule
from orchestrator.training.micro_batches import cut_into_passes
from orchestrator.training.prepare import Prepared

RECORD = "tokens_per_pass"
BATCHES_EXAMINED = 200
_MESSAGES = re.compile(
    r"can't allocate memory"  # PyTorch on a CPU
    r"|\b(CUDA|HIP) error: out of memory"  # allocations outside of PyTorch's cache
    r"|_STATUS_ALLOC_FAILED|_(HOST|DEVICE)_ALLOCATION_FAILED"  # cuBLAS, cuSOLVER, cuDNN and similar libraries
    r"|\b(Cuda|HIP) failure (\d+ )?'out of memory'"  # NCCL and RCCL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or this process, ran out of memory, in PyTorch or in a library that it calls."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None
    )


def with_recorded_passes(prepared: Prepared, directory: RunDirectory) -> Prepared:
    """Return the same with passes as small as earlier attempts made them, unless the recipe sets their size."""
    number = directory.read_record().get(RECORD)
    if number is None or prepared.recipe.train.micro_batch_size != "auto":
        return prepared
    return replace(prepared, tokens_per_pass=number)


def halve_passes(prepared: Prepared, directory: RunDirectory) -> None:
    """Record that passes are to be half as large, and free the memory of the pass that failed.

    Args:
        prepared: as the failed pass had it.

    Raises:
        RunFailed: a pass is a single example already, or the recipe sets the size of passes.
    """
    number, is_auto = micro_batch_size(prepared.recipe), prepared.recipe.train.micro_batch_size == "auto"
    longest = int(prepared.encoded("train").lengths.max())
    largest = largest_pass(prepared)
    if largest <= longest or not is_auto:
        smaller = "train.micro_batch_size: auto, " if not is_auto and number > 1 else ""
        what = f"{number} examples" if not is_auto and number > 1 else "1 example"
        raise RunFailed(
            f"a pass over {what} does not fit into memory; checkpoints are kept\n"
            f"    -> set {smaller}train.gradient_checkpointing: true, or see: orchestrator plan"
        )
    half = max(longest, -(-largest // 2))
    directory.update_record(**{RECORD: half})
    # The length of each picture is 1.
    unit = "examples" if longest == 1 else "tokens, padding counted,"
    directory.add_note(f"{largest} {unit} did not fit into memory in one pass, so passes have {half} from then on")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_pass(prepared: Prepared) -> int:
    """Return the tokens of a worker's largest pass, padding counted; of a long epoch, every n-th batch is examined."""
    recipe, lengths = prepared.recipe, prepared.encoded("train").lengths
    micro_batch, workers = micro_batch_size(recipe), recipe.scale.workers
    batches = make_schedule(recipe.train, lengths, micro_batch).order.epoch(0)
    # The batch with the longest example is always among them.
    longest = max(batches, key=lambda batch: int(lengths[batch].max()))
    cost = cost_of_pass("cuda" if uses_gpu(recipe) else "cpu", autocasts=False)
    passes = [
        rows
        for batch in [*batches[:: -(-len(batches) // BATCHES_EXAMINED)], longest]
        for shares in cut_into_passes(
            batch, lengths, workers, micro_batch, cost, tokens_per_pass=prepared.tokens_per_pass
        )
        for rows in shares
        if len(rows)
    ]
    return max(len(rows) * int(np.max(lengths[rows])) for rows in passes)
