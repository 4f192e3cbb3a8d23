"""Examples of uneven length in rows of one width."""

from __future__ import annotations

import random

import pytest

from orchestrator.data.packing import best_fit


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_row_and_no_row_is_too_long(seed: int) -> None:
    stream = random.Random(seed)
    lengths = [stream.randint(1, 50) for _ in range(stream.randint(1, 60))]
    width = max(lengths) + stream.randint(0, 20)
    rows = best_fit(lengths, width)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= width for row in rows)
    # No two rows would fit into one, or there would be a better row for what came later.
    room = sorted(width - sum(lengths[example] for example in row) for row in rows)
    assert len(rows) == 1 or sum(room[-2:]) < width


def test_each_goes_into_the_fullest_row_with_room() -> None:
    assert best_fit([7, 5, 3, 5, 2], 10) == [[0, 2], [1, 3], [4]]
    assert best_fit([4, 4, 2], 4) == [[0], [1], [2]]
    assert best_fit([], 4) == []
