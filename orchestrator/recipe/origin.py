"""The origin of a recipe's values: file and line, or the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.recipe.paths import show_path


@dataclass
class Origin:
    """Origins of a recipe's values, for messages; `where` takes any dotted path, written or default.

    All origins compare as equal, because they do not change the meaning of a recipe.
    """

    file: Path | None = field(default=None, compare=False)
    """The recipe's file, absolute; None for a recipe built in Python or read from a text."""
    lines: dict[str, int] = field(default_factory=dict, compare=False)
    """Line (from 1) of each dotted path in the file."""
    overrides: dict[str, str] = field(default_factory=dict, compare=False)
    """Text of each `key=value` given on the command line, by its dotted path."""

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the recipe start at."""
        return self.file.parent if self.file else Path.cwd()

    def wrote(self, path: str) -> bool:
        """Whether the value at a dotted path, or a part of it, was written rather than default."""
        return path in self.lines or path in self.overrides or self._override_within(path) is not None

    def where(self, path: str) -> str:
        """Return `recipes/mine.yaml:12 (train.learning_rate)`, or `train.learning_rate=1 (command line)`.

        For a path that was not written, the origin is that of an override within it, or of its nearest written parent.
        """
        within = self._override_within(path)
        if within and path not in self.lines:
            return f"{within} (command line)"
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in self.overrides:
                return f"{self.overrides[prefix]} (command line)"
            if prefix in self.lines:
                line = self.lines[prefix]
                return f"{show_path(self.file)}:{line} ({path})" if self.file else f"line {line} ({path})"
        return f"{show_path(self.file)} ({path})" if self.file else path

    def _override_within(self, path: str) -> str | None:
        return next((text for key, text in self.overrides.items() if key.startswith(f"{path}.")), None)


def is_within(path: str, other: str) -> bool:
    """Whether a dotted path is the other one, or below it."""
    return path == other or path.startswith(f"{other}.")
