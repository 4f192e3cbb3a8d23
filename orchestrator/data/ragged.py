"""Lists of uneven length in flat arrays, read from Arrow without copies, padded when a batch is made."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True)
class Ragged:
    """Rows of numbers of uneven length: row i is `chunks[k][starts[i] : starts[i] + lengths[i]]` with k `owners[i]`."""

    chunks: tuple[npt.NDArray[np.generic], ...]
    owners: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Ragged:
        """Build from an Arrow list column, without a copy of its numbers."""
        chunks = tuple(chunk.values.to_numpy(zero_copy_only=False) for chunk in column.chunks)
        offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in column.chunks]
        nothing = np.zeros(0, np.int64)
        return cls(
            chunks,
            np.repeat(np.arange(len(chunks), dtype=np.int32), [len(own) - 1 for own in offsets]),
            np.concatenate([nothing, *(own[:-1] for own in offsets)]),
            np.concatenate([nothing, *map(np.diff, offsets)]),
        )

    def sums(self) -> npt.NDArray[np.int64]:
        """Return the sum of the numbers of each row; shape [num_rows]."""
        parts = [np.zeros(0, np.int64)]
        edges = np.searchsorted(self.owners, np.arange(len(self.chunks) + 1))
        for values, (first, last) in zip(self.chunks, pairwise(edges), strict=True):
            running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
            starts, lengths = self.starts[first:last], self.lengths[first:last]
            parts.append(running[starts + lengths] - running[starts])
        return np.concatenate(parts)

    def pad(self, rows: npt.NDArray[np.int64], fill: int) -> npt.NDArray[np.int64]:
        """Return rows side by side, padded on the right; shape [len(rows), longest of them]."""
        padded = np.full((len(rows), int(self.lengths[rows].max(initial=1))), fill, dtype=np.int64)
        for line, values in zip(padded, self._take(rows), strict=True):
            line[: len(values)] = values
        return padded

    def join(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
        """Return rows one after the other; shape [sum of their lengths]."""
        return np.concatenate(self._take(rows))

    def _take(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.generic]]:
        places = zip(self.owners[rows], self.starts[rows], self.lengths[rows], strict=True)
        return [self.chunks[owner][start : start + length] for owner, start, length in places]
