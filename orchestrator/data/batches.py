"""Which examples go into which batch: a pure function of seed and epoch, so that a resumed run sees the same order.

A *global batch* is what one optimizer step learns from. It is dealt to workers and micro batches afterwards, and since
the loss is the mean over the global batch, the way it is dealt does not change what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# Examples are sorted by length within shuffled stretches of this many global batches: wide enough to leave little
# padding, narrow enough that every epoch pairs examples anew.
BATCHES_SORTED_TOGETHER = 32


@dataclass(frozen=True)
class BatchOrder:
    """The order of the training examples.

    Attributes:
        lengths: length of each example, in whatever unit padding costs (tokens); shape [num_examples].
        global_batch_size: examples per optimizer step; the last batch of an epoch may be smaller.
        group_by_length: put examples of similar length into one batch.
        seed: seed of the order.
    """

    lengths: Indices
    global_batch_size: int
    group_by_length: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    def epoch(self, epoch: int) -> list[Indices]:
        """Return the global batches of one epoch (counted from 0); every example stands in exactly one of them."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if not self.group_by_length:
            return self._cut(order)
        stretch = self.global_batch_size * BATCHES_SORTED_TOGETHER
        sorted_stretches = [
            part[np.argsort(self.lengths[part], kind="stable")]
            for part in np.split(order, range(stretch, len(order), stretch))
        ]
        # Each stretch is cut by itself, so that only the very last batch can be short and no batch spans two stretches.
        batches = [batch for part in sorted_stretches for batch in self._cut(part)]
        return [batches[position] for position in generator.permutation(len(batches))]

    def _cut(self, order: Indices) -> list[Indices]:
        return np.split(order, range(self.global_batch_size, len(order), self.global_batch_size))


def assign(
    batch: Indices,
    lengths: Indices,
    num_workers: int,
    micro_batch_size: int,
    cost_of_pass: int,
    tokens_per_pass: int | None = None,
) -> list[list[Indices]]:
    """Deal a global batch: `result[i][rank]` are the examples of worker `rank` in the i-th forward pass.

    Sorted by length first and cut where padding would cost more than another pass; and dealt like cards, so that the
    workers of one pass wait little for each other. A worker may come away empty in a short pass; it still has to take
    part (see `training.loop`).

    Args:
        micro_batch_size: examples of one worker in one pass, at most.
        cost_of_pass: what one more pass costs, in the unit of `lengths`.
        tokens_per_pass: as in `cheapest_cuts`.
    """
    order = batch[np.argsort(lengths[batch], kind="stable")]
    cuts = cheapest_cuts(lengths[order], num_workers, micro_batch_size, cost_of_pass, tokens_per_pass)
    return [[part[rank::num_workers] for rank in range(num_workers)] for part in np.split(order, cuts)]


def cheapest_cuts(
    ascending: Indices, num_workers: int, micro_batch_size: int, cost_of_pass: int, tokens_per_pass: int | None = None
) -> list[int]:
    """Return where to cut sorted examples into passes so that padded tokens and passes cost least.

    A pass costs `cost_of_pass` and, on its busiest worker, its number of examples times its longest one. The cheapest
    way to pass the first `end` examples goes over the cheapest ways to pass fewer (dynamic programming).

    Args:
        ascending: lengths; shape [num_examples].
        tokens_per_pass: the most that a pass may have on its busiest worker, padding counted, in the unit of the
            lengths; a single example that is longer has a pass of its own. None for no limit.

    Returns:
        The first example of each pass but the first one.
    """
    num_examples = len(ascending)
    largest = num_workers * micro_batch_size
    cheapest = np.zeros(num_examples + 1, np.int64)
    begins = np.zeros(num_examples + 1, np.int64)
    for end in range(1, num_examples + 1):
        starts = np.arange(max(0, end - largest), end)
        busiest = -(-(end - starts) // num_workers)
        if tokens_per_pass is not None:
            fits = busiest * ascending[end - 1] <= max(tokens_per_pass, ascending[end - 1])
            starts, busiest = starts[fits], busiest[fits]
        costs = cheapest[starts] + cost_of_pass + busiest * ascending[end - 1]
        best = int(costs.argmin())
        cheapest[end], begins[end] = costs[best], starts[best]
    cuts = []
    position = int(begins[num_examples])
    while position > 0:
        cuts.append(position)
        position = int(begins[position])
    return cuts[::-1]


def evaluation_batches(
    lengths: Indices,
    batch_size: int,
    num_workers: int,
    rank: int,
    cost_of_pass: int,
    tokens_per_pass: int | None = None,
) -> Iterator[Indices]:
    """Return this worker's share of a split, each example once over all workers, longest first (memory fails early).

    Every worker gets the same number of batches, the last ones possibly empty: sharded models need all workers in
    every forward pass.

    Args:
        batch_size: examples of a worker in one pass, at most.
        cost_of_pass: as in `cheapest_cuts`.
        tokens_per_pass: as in `cheapest_cuts`.
    """
    order = np.argsort(-lengths, kind="stable")
    cuts = cheapest_cuts(lengths[order[::-1]], num_workers, batch_size, cost_of_pass, tokens_per_pass)
    for part in np.split(order, [len(order) - cut for cut in reversed(cuts)]):
        yield part[rank::num_workers]
