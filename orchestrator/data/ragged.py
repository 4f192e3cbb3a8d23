"""Lists of uneven length in one flat array, read from Arrow without copies, padded when a batch is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True)
class Ragged:
    """Rows of numbers of uneven length: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: npt.NDArray[np.generic]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Ragged:
        """From an Arrow list column; without a copy when the column is one chunk."""
        # `combine_chunks` would copy also where there is nothing to combine.
        array = (
            column.chunk(0)
            if column.num_chunks == 1
            else pa.concat_arrays(column.chunks or [pa.array([], column.type)])
        )
        offsets = array.offsets.to_numpy().astype(np.int64)
        return cls(array.values.to_numpy(zero_copy_only=False), offsets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def sums(self) -> npt.NDArray[np.int64]:
        """Of the numbers of each row; shape [num_rows]."""
        running = np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])
        totals: npt.NDArray[np.int64] = running[self.offsets[1:]] - running[self.offsets[:-1]]
        return totals

    def pad(self, rows: npt.NDArray[np.int64], fill: int) -> npt.NDArray[np.int64]:
        """Rows side by side, filled up on the right; shape [len(rows), longest of them]."""
        starts, lengths = self.offsets[rows], self.lengths[rows]
        padded = np.full((len(rows), int(lengths.max(initial=1))), fill, dtype=np.int64)
        for line, start, length in zip(padded, starts, lengths, strict=True):
            line[:length] = self.values[start : start + length]
        return padded

    def join(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
        """Rows one after the other; shape [sum of their lengths]."""
        return np.concatenate([self.values[self.offsets[row] : self.offsets[row + 1]] for row in rows])
