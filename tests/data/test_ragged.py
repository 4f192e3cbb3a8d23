"""Rows of uneven length in one flat array."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.ragged import Ragged

rows_of_numbers = st.lists(st.lists(st.integers(0, 1000), max_size=12), min_size=1, max_size=20)


def column(rows: list[list[int]], *cuts: int) -> pa.ChunkedArray:
    """The rows as an Arrow column of several chunks."""
    parts = np.split(np.arange(len(rows)), cuts)
    return pa.chunked_array([pa.array([rows[i] for i in part], pa.list_(pa.int32())) for part in parts])


@given(rows_of_numbers, st.data())
def test_padding_keeps_the_rows_and_fills_up_on_the_right(rows: list[list[int]], data: st.DataObject) -> None:
    asked = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1)), np.int64)
    padded = Ragged.of(column(rows)).pad(asked, fill=-1)
    width = max(1, *(len(rows[row]) for row in asked))
    assert padded.dtype == np.int64
    assert padded.tolist() == [rows[row] + [-1] * (width - len(rows[row])) for row in asked]


@pytest.mark.parametrize("cuts", [(), (1,), (1, 1, 3)])
def test_chunks_make_no_difference(cuts: tuple[int, ...]) -> None:
    ragged = Ragged.of(column([[1, 2], [], [3], [4, 5, 6]], *cuts))
    assert ragged.lengths.tolist() == [2, 0, 1, 3]
    assert ragged.pad(np.array([3, 0]), 0).tolist() == [[4, 5, 6], [1, 2, 0]]
    assert ragged.join(np.array([3, 1, 0])).tolist() == [4, 5, 6, 1, 2]
    assert ragged.sums().tolist() == [3, 0, 3, 15]


def test_a_slice_of_a_column_begins_at_its_own_rows() -> None:
    ragged = Ragged.of(column([[1, 2], [3], [4, 5, 6]]).slice(1))
    assert ragged.lengths.tolist() == [1, 3]
    assert ragged.pad(np.array([0, 1]), 0).tolist() == [[3, 0, 0], [4, 5, 6]]


def test_a_column_without_rows_has_no_lengths() -> None:
    ragged = Ragged.of(pa.chunked_array([], pa.list_(pa.int32())))
    assert ragged.lengths.tolist() == ragged.sums().tolist() == []


def test_no_rows_are_one_column_wide() -> None:
    assert Ragged.of(column([[1, 2]])).pad(np.array([], np.int64), 0).shape == (0, 1)


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2)])
def test_numbers_are_read_without_a_copy(cuts: tuple[int, ...]) -> None:
    given_column = column([[1, 2], [3], [4]], *cuts)
    for own, chunk in zip(Ragged.of(given_column).chunks, given_column.chunks, strict=True):
        assert np.shares_memory(own, chunk.values.to_numpy())
