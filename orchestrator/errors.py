"""The errors of this package, each with an exit code.

Errors that a user can cause are `OrchestratorError`s, which print as plain sentences without a traceback. Problems of
the input are collected as `Problem`s and raised once, all together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """Something wrong in the user's input, and how to correct it."""

    what: str
    """What is wrong, as a clause with the value found: `learning rate is -1, must be above 0`."""
    where: str | None = None
    """Place in the user's terms: `recipes/mine.yaml:12 (train.learning_rate)` or `data/train.jsonl:40`."""
    remedy: str | None = None
    """How to correct it, as an imperative: `set train.learning_rate to about 5e-5`."""
    fatal: bool = True
    """False for warnings, which `--strict` makes fatal."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n    -> {self.remedy}" if self.remedy else text


class OrchestratorError(Exception):
    """Base class of all errors for users; `exit_code` is the exit code of the command."""

    exit_code: ClassVar[int] = 1


class RunFailed(OrchestratorError):
    """The run started and failed (exit code 1)."""


class InputError(OrchestratorError):
    """The recipe, the data or the command line is wrong; nothing was started (exit code 2)."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        assert self.problems, "an InputError needs at least one problem"
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class RecipeError(InputError):
    """The recipe is wrong."""


class DataError(InputError):
    """The data are wrong."""


class ModelError(InputError):
    """The source model cannot be used as the recipe asks."""


class ClusterError(OrchestratorError):
    """The cluster cannot run the recipe (exit code 3)."""

    exit_code = 3


def raise_if_fatal(problems: Sequence[Problem], error: type[InputError], strict: bool = False) -> list[Problem]:
    """Raise `error` with all problems if one is fatal (or if there is any and `strict` is set); else return them."""
    if any(problem.fatal or strict for problem in problems):
        raise error(problems)
    return list(problems)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name closest to a mistyped one, or None if nothing is close."""
    matches = get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None
