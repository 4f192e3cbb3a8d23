"""Put examples of uneven length into rows of one width, so that little of them is padding."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The examples of each row: the longest first, each into the fullest row that has room for it.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and one (Johnson 1973).

    Args:
        lengths: of the examples; none is longer than `width`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fits = [row for row, left in enumerate(room) if left >= lengths[example]]
        if fits:
            row = min(fits, key=room.__getitem__)
            rows[row].append(example)
            room[row] -= lengths[example]
        else:
            rows.append([example])
            room.append(width - lengths[example])
    return rows
