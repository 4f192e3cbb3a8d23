"""Mix several sources in one split: the number of examples of each, and its share of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from orchestrator.data.examples import Examples, Indices


def draw_ranks(keys: Sequence[object], seed: int) -> list[bytes]:
    """Return a pseudorandom rank for each key, the same with every version of every library."""
    return [blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in keys]


def draw_counts(examples: Examples, seed: int) -> Examples:
    """Return the examples of each part that its files ask for (`SourceFile.count`). 100 drawn are among 200 drawn."""
    counts = {file.part: file.count for file in examples.files}
    if all(count is None for count in counts.values()):
        return examples
    parts = parts_of(examples)
    kept = [shuffled(np.flatnonzero(parts == part), seed)[:count] for part, count in counts.items()]
    return examples.take(np.sort(np.concatenate(kept)))


def apply_weights(examples: Examples, weights: Sequence[float], seed: int) -> Examples:
    """Return the same number of examples, each part with its share: all of a part repeatedly, then a draw.

    Args:
        weights: of each part, in order; those of parts without examples count for nothing.
    """
    parts = parts_of(examples)
    rows = {part: shuffled(np.flatnonzero(parts == part), seed) for part in range(len(weights)) if part in parts}
    total = sum(weights[part] for part in rows)
    taken = [np.resize(own, max(1, round(len(examples) * weights[part] / total))) for part, own in rows.items()]
    return examples.take(np.sort(np.concatenate(taken)))


def parts_of(examples: Examples) -> Indices:
    """Return the part that each example is from; shape [len]."""
    return np.array([file.part for file in examples.files], np.int64)[examples.file_numbers()]


def shuffled(rows: Indices, seed: int) -> Indices:
    ranks = draw_ranks(rows.tolist(), seed)
    return rows[np.array(sorted(range(len(rows)), key=ranks.__getitem__), dtype=np.int64)]
