"""How a global batch is cut into forward passes; the loop, plans and previews all ask this module."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from orchestrator.data.batches import assign

Indices = npt.NDArray[np.int64]
PROHIBITIVE_COST = 10**12


def cut_into_passes(
    batch: Indices,
    lengths: Indices,
    num_workers: int,
    micro_batch_size: int,
    cost_of_pass: int,
    packs: bool = False,
    tokens_per_pass: int | None = None,
) -> list[list[Indices]]:
    """Return the passes of an optimizer step, each with the rows of every worker.

    Args:
        batch: rows of the global batch; shape [num_examples].
        lengths: of all examples of the split, as encoded. Lengths of stored features would not do: the cut decides what
            is dropped out and what batch norms see, and neither may depend on whether features are stored.
        cost_of_pass: of one more pass, in the unit of `lengths`.
        packs: whether examples share rows. Then there is no padding that further passes could save.
        tokens_per_pass: limit for a worker's pass, padding counted, in the unit of `lengths`; None for no limit.
    """
    cost = PROHIBITIVE_COST if packs else cost_of_pass
    return assign(batch, lengths, num_workers, micro_batch_size, cost, tokens_per_pass)
