"""Several sources in one split: how many examples of each, and what share of an epoch they make up."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from orchestrator.data.examples import Examples, Rows


def draw(keys: Sequence[object], seed: int) -> list[bytes]:
    """Return a random-looking rank for each key, the same with every version of every library."""
    return [blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in keys]


def draw_counts(examples: Examples, seed: int) -> Examples:
    """Return as many examples of each part as `SourceFile.count` says. Draws are nested: 100 are among 200."""
    counts = {file.part: file.count for file in examples.files}
    if all(count is None for count in counts.values()):
        return examples
    parts = parts_of(examples)
    kept = [shuffled(np.flatnonzero(parts == part), seed)[:count] for part, count in counts.items()]
    return examples.take(np.sort(np.concatenate(kept)))


def weigh(examples: Examples, weights: Sequence[float], seed: int) -> Examples:
    """Return as many examples in all, each part with its share: whole passes over it, and a draw for the rest.

    Args:
        weights: of each part, in order; those of parts without examples count for nothing.
    """
    parts = parts_of(examples)
    rows = {part: shuffled(np.flatnonzero(parts == part), seed) for part in range(len(weights)) if part in parts}
    total = sum(weights[part] for part in rows)
    taken = [np.resize(own, max(1, round(len(examples) * weights[part] / total))) for part, own in rows.items()]
    return examples.take(np.sort(np.concatenate(taken)))


def parts_of(examples: Examples) -> Rows:
    """Return the part that each example is of; shape [len]."""
    return np.array([file.part for file in examples.files], np.int64)[examples.file_numbers()]


def shuffled(rows: Rows, seed: int) -> Rows:
    ranks = draw(rows.tolist(), seed)
    return rows[np.array(sorted(range(len(rows)), key=ranks.__getitem__), dtype=np.int64)]
