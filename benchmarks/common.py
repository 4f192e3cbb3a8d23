"""What the benchmarks share: the recipe they run, a run without chatter, turns, ratios, tables and JSON."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import orchestrator
from orchestrator.data.batches import BatchOrder
from orchestrator.launch.train import Run
from orchestrator.recipe import Recipe

RECIPE = "text-classification/minilm-to-support-intent"
DROPOUT_SETTINGS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def source_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's source model."""
    from orchestrator import models

    return Path(models.find_source(recipe).location)


def copy_without_dropout(folder: Path, target: Path) -> Path:
    """A copy of a model's folder whose config turns the body's dropout off."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert set(DROPOUT_SETTINGS) <= config.keys(), f"{folder} has other dropout settings"
    path.write_text(json.dumps({**config, **dict.fromkeys(DROPOUT_SETTINGS, 0.0)}), encoding="utf-8")
    return target


def train_quietly(recipe: Recipe, output: Path) -> Run:
    """`orchestrator.train`, with what libraries print in the run's own logs."""
    with Path(os.devnull).open("w") as nowhere:
        return orchestrator.train(recipe, output=output, screen=nowhere)


def read_train_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl about training steps, in their order."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "train"]


def batch_rows(order: BatchOrder, num_steps: int) -> Iterator[npt.NDArray[np.int64]]:
    """The examples of each of the first `num_steps` global batches, over as many epochs as that takes."""
    for step in range(num_steps):
        epoch, position = divmod(step, order.steps_per_epoch)
        yield order.epoch(epoch)[position]


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their longest cell; the first is aligned to the left, the others to the right."""
    cells = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = zip(line, widths, strict=True)
        print(first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others), sep="  ", flush=True)


def start_quietly(with_ray: bool) -> None:
    """Silence transformers, and start one Ray cluster for all runs, so that its start is not measured."""
    import ray
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if with_ray:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def write_json(path: Path | None, results: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def rotate(contenders: Sequence[str], turn: int) -> list[str]:
    """Each turn starts with another contender, so that none always runs on a warmer or busier machine."""
    start = turn % len(contenders)
    return [*contenders[start:], *contenders[:start]]


def interleave(contenders: dict[str, Callable[[], float]], num_repeats: int) -> dict[str, list[float]]:
    """Measure each contender `num_repeats` times, in turns; returns its numbers in the order of the turns."""
    numbers: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(num_repeats):
        for name in rotate(list(contenders), turn):
            numbers[name].append(contenders[name]())
    return numbers


@dataclass
class Ratio:
    """Ours against a peer, turn by turn."""

    claim: str
    target: float
    ours: list[float]
    """Examples per second; seconds for the start."""
    peer: list[float]
    ratios: list[float]
    """How many times faster ours is."""

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def ok(self) -> bool:
        return self.median >= self.target

    def cells(self) -> list[str]:
        speeds = [f"{statistics.median(values):.1f}" for values in (self.ours, self.peer)]
        ratios = [f"{value:.3f}" for value in (self.median, min(self.ratios))]
        return [self.claim, f"{self.target:.2f}", *ratios, *speeds, "ok" if self.ok else "FAIL"]


def compare_speeds(claim: str, target: float, ours: list[float], peer: list[float]) -> Ratio:
    return Ratio(claim, target, ours, peer, [mine / other for mine, other in zip(ours, peer, strict=True)])


def compare_seconds(claim: str, target: float, ours: list[float], peer: list[float]) -> Ratio:
    return Ratio(claim, target, ours, peer, [other / mine for mine, other in zip(ours, peer, strict=True)])
