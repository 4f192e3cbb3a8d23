"""The search's records: trials.jsonl, one line a trial; search.json; which trial is the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from orchestrator.recipe import Recipe
from orchestrator.runs.directory import RunDirectory, finite, parse_object, write_atomically
from orchestrator.tasks.base import MainMetric

BUDGET = ("seconds", "reseed_top", "reseeds")
"""What a finished search may be given more of, in `search`."""
LONGEST_NAME = 63
"""Characters of a recipe's name."""


class SearchDirectory(RunDirectory):
    """A search's directory (design, section 5): its trials are run directories."""

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
    """Return the recipe with a run name of its own, so that `train` does not put its run where another one is.

    Args:
        what: a trial's id, or "best".
    """
    base = recipe.name.removesuffix("-search")[: LONGEST_NAME - len(what) - 1]
    return recipe.model_copy(update={"name": f"{base}-{what}"})


def trial_id(number: int) -> str:
    return f"{number:04d}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of trials.jsonl; a torn last one is passed over."""
    try:
        return parse_rows(path.read_bytes())
    except FileNotFoundError:
        return []


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    return [row for line in data.split(b"\n") if (row := parse_object(line))]


def drop_damaged_rows(path: Path) -> list[str]:
    """Drop the lines of trials.jsonl that cannot be read; returns a sentence for the user where there are any."""
    rows = read_rows(path)
    lost = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) - len(rows) if path.exists() else 0
    if lost == 0:
        return []
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [f"{lost} of the lines of {path.name} could not be read: what their trials left is looked at again"]


class Newcomers:
    """The lines that others add to trials.jsonl, each read once; one that is not ended yet is left for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_bytes_read = 0

    def read(self) -> list[dict[str, Any]]:
        """The rows that have come since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._num_bytes_read)
                new = file.read()
        except FileNotFoundError:
            return []
        ended = new[: new.rfind(b"\n") + 1]
        self._num_bytes_read += len(ended)
        return parse_rows(ended)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line; a torn one before it is ended first."""
    text = json.dumps(finite(row), ensure_ascii=False) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def score_of(row: dict[str, Any], metric: str) -> float | None:
    """A trial's score; None where it has none."""
    score = row.get("metrics", {}).get(metric)
    return None if score is None or math.isnan(score) else float(score)


def best_first(rows: list[dict[str, Any]], metric: MainMetric) -> list[dict[str, Any]]:
    """Trials with a score that did not fail, best first; of equal ones that with the lower loss, then the earlier."""

    def key(row: dict[str, Any]) -> tuple[float, float, str]:
        score = score_of(row, metric.name)
        assert score is not None
        loss = row["metrics"].get("loss")
        return -score if metric.higher_is_better else score, math.inf if loss is None else loss, row["id"]

    scored = [row for row in rows if score_of(row, metric.name) is not None and row["status"] != "failed"]
    return sorted(scored, key=key)
