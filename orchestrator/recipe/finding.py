"""What a rule between the recipe's values finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A broken rule: the paths of the values in it (the first one written is its place), what is wrong, the remedy."""

    paths: tuple[str, ...]
    what: str
    remedy: str
