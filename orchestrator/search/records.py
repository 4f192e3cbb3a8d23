"""The records of a search: trials.jsonl with one line for each trial, search.json; the order of the trials."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from orchestrator.json_lines import format_json_lines, read_damaged_json_lines
from orchestrator.recipe import Recipe
from orchestrator.runs.directory import RunDirectory, write_atomically
from orchestrator.tasks.base import MainMetric

BUDGET = ("seconds", "reseed_top", "reseeds")
"""Keys of the recipe's `search` that may be raised for a finished search."""
LONGEST_NAME = 63
"""Most characters of a recipe's name."""


class SearchDirectory(RunDirectory):
    """The directory of a search; its trials are run directories."""

    kind = "search"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.record = root / "search.json"
        self.rows = root / "trials.jsonl"
        self.trials = root / "trials"
        self.best = root / "best.yaml"
        self.report = root / "report.html"

    def create(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.trials, self.logs):
            folder.mkdir(exist_ok=True)

    def trial(self, id: str) -> RunDirectory:
        return RunDirectory(self.trials / id)


def with_own_name(recipe: Recipe, what: str) -> Recipe:
    """Return the recipe with a run name of its own, so that `train` does not use the directory of another run.

    Args:
        what: a trial's id, or "best".
    """
    base = recipe.name.removesuffix("-search")[: LONGEST_NAME - len(what) - 1]
    return recipe.model_copy(update={"name": f"{base}-{what}"})


def trial_id(number: int) -> str:
    """Return the id of the trial with this number, counted from 0."""
    return f"{number:04d}"


def drop_damaged_rows(path: Path) -> list[str]:
    """Remove the lines of trials.jsonl that cannot be read; return a note for the user where there are any."""
    rows, num_damaged = read_damaged_json_lines(path)
    if num_damaged == 0:
        return []
    write_atomically(path, format_json_lines(rows))
    lines = "1 line" if num_damaged == 1 else f"{num_damaged} lines"
    return [f"{lines} of {path.name} could not be read; the results of those trials are read from their directories"]


def score_of(row: dict[str, Any], metric: str) -> float | None:
    """Return the score of a trial; None where it has none."""
    score = row.get("metrics", {}).get(metric)
    return None if score is None or math.isnan(score) else float(score)


def best_first(rows: list[dict[str, Any]], metric: MainMetric) -> list[dict[str, Any]]:
    """Return the trials that have a score and did not fail, best first.

    Of equal scores the one with the lower loss comes first, then the earlier trial.
    """

    def key(row: dict[str, Any]) -> tuple[float, float, str]:
        score = score_of(row, metric.name)
        assert score is not None
        loss = row["metrics"].get("loss")
        return -score if metric.higher_is_better else score, math.inf if loss is None else loss, row["id"]

    scored = [row for row in rows if score_of(row, metric.name) is not None and row["status"] != "failed"]
    return sorted(scored, key=key)
