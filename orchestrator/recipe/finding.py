"""A violated rule between values of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A violated rule: the paths of its values (the first written one is reported), what is wrong, and the remedy."""

    paths: tuple[str, ...]
    what: str
    remedy: str
