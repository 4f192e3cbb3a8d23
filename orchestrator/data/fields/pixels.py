"""Pictures of one size, as bytes in an Arrow table: read without a copy, whatever the number of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

BYTES_TOGETHER = 2**26  # in one chunk of a table that is written part by part


@dataclass(frozen=True)
class Pixels:
    """Row i is `chunks[k][i - starts[k]]`, uint8 of shape [height, width, 3], for the chunk k that holds it."""

    chunks: tuple[npt.NDArray[np.uint8], ...]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Pixels:
        """Build from an Arrow column of fixed-shape tensors."""
        chunks = tuple(chunk.to_numpy_ndarray() for chunk in column.chunks)
        return cls(chunks, np.cumsum([0, *map(len, chunks)]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return the pictures of these rows; shape [len(rows), height, width, 3]."""
        taken = np.empty((len(rows), *self.chunks[0].shape[1:]), dtype=np.uint8)
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for place, (owner, row) in enumerate(zip(owners, rows, strict=True)):
            taken[place] = self.chunks[owner][row - self.starts[owner]]
        return taken


def pixel_type(height: int, width: int) -> pa.DataType:
    """Return the Arrow type of a column of pictures of this size."""
    return pa.fixed_shape_tensor(pa.uint8(), (height, width, 3))


def pixel_array(pictures: npt.NDArray[np.uint8]) -> pa.Array:
    """Return pictures, [num_pictures, height, width, 3], as a column."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pictures))


def shards(num_rows: int, bytes_per_row: int) -> list[range]:
    """Return the rows of each part of a table that is written part by part."""
    step = max(1, BYTES_TOGETHER // bytes_per_row)
    return [range(start, end) for start, end in pairwise([*range(0, num_rows, step), num_rows])]
