"""Read the records of a run or a search. Whatever is missing or damaged is None or empty."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, Problem, RecipeError
from orchestrator.json_lines import read_damaged_json_lines, read_json_lines
from orchestrator.recipe.reading import read_yaml
from orchestrator.report.analysis import better
from orchestrator.report.numbers import number

SEED = "train.seed"

MetricRows = list[dict[str, Any]]


@dataclass(frozen=True)
class RecipeText:
    """The text of recipe.yaml, and its values."""

    text: str
    values: dict[str, Any]

    def get(self, path: str) -> Any:
        """Return the value at a dotted path, or None."""
        found: Any = self.values
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found


@dataclass(frozen=True)
class Trial:
    """One line of trials.jsonl."""

    id: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    """On *select*, at the trial's best evaluation; finite values only."""
    score: float | None
    """The search's metric; a trial that failed late may have one."""
    seconds: float | None
    core_seconds: float | None
    epochs: float | None
    status: str
    reason: str | None
    seed: int | None
    history: tuple[dict[str, float], ...]
    """The rows of *select*, finite values only."""


@dataclass(frozen=True)
class Winner:
    """The trial that the search has named."""

    id: str
    parameters: dict[str, Any]
    select: dict[str, float]
    test: dict[str, float]
    seeds: tuple[tuple[str, float], ...]
    """(seed, score on *select*) of the reruns."""

    def as_trial(self, metric: str) -> Trial:
        """Return what is known of the trial if its line is lost."""
        row = {"parameters": self.parameters, "metrics": self.select}
        return as_trial(self.id, row, metric)


@dataclass(frozen=True)
class Search:
    """search.json and trials.jsonl."""

    recipe: RecipeText
    record: dict[str, Any]
    metric: str
    higher_is_better: bool
    trials: tuple[Trial, ...]
    """In the order of the file, in which they ended; without reruns."""
    reruns: dict[str, list[Trial]]
    """Trials that repeat another (the key) with other seeds."""
    result: dict[str, Any]
    """result.json: all scores of the winner; empty if it is missing."""
    winner: Winner | None
    num_unread: int
    """Lines of trials.jsonl that are not JSON objects with an id."""
    files: frozenset[str]
    """Names of files and folders in the directory."""

    @property
    def num_layers(self) -> int | None:
        layers = number(self.record.get("num_layers"))
        return None if layers is None else int(layers)

    @property
    def space(self) -> dict[str, Any]:
        """Return the space as it was searched: the record's, which has the defaults, or the recipe's."""
        return as_dict(self.record.get("space")) or as_dict(self.recipe.get("search.space"))

    @cached_property
    def ranked(self) -> list[Trial]:
        """Return trials with a score, best first; of equal scores, the lower loss, then the lower id comes first."""
        sign = -1.0 if self.higher_is_better else 1.0
        scored = [trial for trial in self.trials if trial.score is not None]

        def key(trial: Trial) -> tuple[float, float, str]:
            return sign * (trial.score or 0.0), trial.metrics.get("loss", math.inf), trial.id

        return sorted(scored, key=key)

    @cached_property
    def leader(self) -> Trial | None:
        """Return the winner's trial, or the best one so far."""
        if self.winner is None:
            return next(iter(self.ranked), None)
        named = [trial for trial in self.trials if trial.id == self.winner.id]
        return named[0] if named else self.winner.as_trial(self.metric)

    @cached_property
    def searched(self) -> list[str]:
        """Return dotted paths of the parameters that varied, in the order of the recipe's space, then of the trials."""
        paths = dict.fromkeys(path for trial in self.trials for path in trial.parameters)
        first = [path for path in self.space if path in paths]
        return list(dict.fromkeys([*first, *paths]))

    def beats(self, first: float, second: float) -> bool:
        return better(first, second, self.higher_is_better)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    recipe: RecipeText
    record: dict[str, Any]
    """run.json."""
    result: dict[str, Any]
    """result.json; empty if the run has not finished."""
    rows: MetricRows
    """metrics.jsonl."""
    files: frozenset[str]


def read_search(directory: Path) -> Search:
    """Read a search directory; raises InputError if search.json cannot be read."""
    record, recipe = read_record(directory / "search.json"), read_recipe(directory / "recipe.yaml")
    rows, num_damaged = read_damaged_json_lines(directory / "trials.jsonl")
    with_id = [row for row in rows if isinstance(row.get("id"), str | int)]
    # A trial that was run again has a later line, which replaces the first.
    named = {str(row["id"]): row for row in with_id}
    metric = find_metric(record, recipe, list(named.values()))
    trials, reruns = set_reruns_apart([as_trial(name, row, metric) for name, row in named.items()])
    mode = record.get("mode") or recipe.get("search.mode") or ("min" if metric == "loss" else "max")
    return Search(
        recipe=recipe,
        record=record,
        metric=metric,
        higher_is_better=mode != "min",
        trials=tuple(trials),
        reruns=reruns,
        result=read_result(directory),
        winner=as_winner(record.get("winner"), metric),
        num_unread=num_damaged + len(rows) - len(with_id),
        files=names_in(directory),
    )


def read_run(directory: Path) -> Run:
    """Read a run directory; raises InputError if run.json cannot be read."""
    return Run(
        recipe=read_recipe(directory / "recipe.yaml"),
        record=read_record(directory / "run.json"),
        result=read_result(directory),
        rows=read_json_lines(directory / "metrics.jsonl"),
        files=names_in(directory),
    )


def read_result(directory: Path) -> dict[str, Any]:
    path = directory / "result.json"
    return read_record(path) if path.exists() else {}


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises InputError if it holds none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    except OSError as error:
        raise InputError(Problem(f"it cannot be read: {error.strerror}", str(path), "check its permissions")) from None
    if not isinstance(record, dict):
        raise InputError(Problem("it is damaged: not a JSON object", str(path), "restore it, or run the command again"))
    return record


def read_recipe(path: Path) -> RecipeText:
    """Return the recipe's text, and its values as far as they can be read: it may be of another version."""
    if not path.exists():
        return RecipeText("", {})
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return RecipeText(text, read_yaml(text, path).data)
    except RecipeError:
        return RecipeText(text, {})


def names_in(directory: Path) -> frozenset[str]:
    return frozenset(path.name for path in directory.iterdir())


def find_metric(record: dict[str, Any], recipe: RecipeText, rows: MetricRows) -> str:
    """Return the metric of the search; if no record names it, the first metric of the trials besides the loss."""
    for named in (record.get("metric"), recipe.get("search.metric")):
        if isinstance(named, str):
            return named
    found = [name for row in rows for name in as_dict(row.get("metrics")) if name != "loss"]
    return found[0] if found else "loss"


def as_trial(name: str, row: dict[str, Any], metric: str) -> Trial:
    metrics = finite_values(row.get("metrics"))
    history, seed, reason = row.get("history"), number(row.get("seed")), row.get("reason")
    return Trial(
        id=name,
        parameters=as_dict(row.get("parameters")),
        metrics=metrics,
        score=metrics.get(metric),
        seconds=number(row.get("seconds")),
        core_seconds=number(row.get("core_seconds")),
        epochs=number(row.get("epochs")),
        status=str(row.get("status") or "unknown"),
        reason=None if reason is None else str(reason),
        seed=None if seed is None else int(seed),
        history=tuple(finite_values(point) for point in history) if isinstance(history, list) else (),
    )


def set_reruns_apart(trials: list[Trial]) -> tuple[list[Trial], dict[str, list[Trial]]]:
    """Return the trials of the space, and trials that repeat the parameters of one of them with another seed."""
    first = {repr(sorted(trial.parameters.items())): trial.id for trial in trials if SEED not in trial.parameters}
    kept, reruns = [], dict[str, list[Trial]]()
    for trial in trials:
        others = {path: value for path, value in trial.parameters.items() if path != SEED}
        of = first.get(repr(sorted(others.items()))) if SEED in trial.parameters else None
        if of is None:
            kept.append(trial)
        else:
            reruns.setdefault(of, []).append(trial)
    return kept, reruns


def as_winner(record: Any, metric: str) -> Winner | None:
    if not isinstance(record, dict) or "id" not in record:
        return None
    metrics, listed = as_dict(record.get("metrics")), record.get("seeds")
    reruns = [as_dict(item) for item in listed] if isinstance(listed, list) else []
    scores = [(str(item.get("seed")), number(item.get("score", item.get(metric)))) for item in reruns]
    return Winner(
        id=str(record["id"]),
        parameters=as_dict(record.get("parameters")),
        select=finite_values(metrics.get("select")),
        test=finite_values(metrics.get("test")),
        seeds=tuple((seed, score) for seed, score in scores if score is not None),
    )


def as_dict(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def finite_values(value: Any) -> dict[str, float]:
    """Return the finite numbers of a JSON object."""
    return {key: amount for key, item in as_dict(value).items() if (amount := number(item)) is not None}


def texts_of(value: Any) -> list[str]:
    """Return a list of texts, such as notes."""
    return [str(item) for item in value] if isinstance(value, list) else []
