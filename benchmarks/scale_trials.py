"""Trials that are scores without a training behind them, as the package's own code keeps count of them (`scale.py`).

Each `prepare_` function makes, in a folder, all that is needed for so many trials, and returns what is timed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from common import RECIPE

import orchestrator
from orchestrator.json_lines import append_json_line
from orchestrator.recipe import Recipe, dump_recipe
from orchestrator.report import write_report
from orchestrator.runs.directory import write_atomically
from orchestrator.search.batching import batch_trials
from orchestrator.search.outcome import Outcome, Spec
from orchestrator.search.ray.asha import ASHA
from orchestrator.search.ray.searchers import SCORE, ListSearcher
from orchestrator.search.ray.tuner import WORST
from orchestrator.search.records import SearchDirectory, trial_id
from orchestrator.search.run_trials import choose_winner, drop_weights
from orchestrator.search.space import Space, trial_recipe
from orchestrator.search.trial_context import TrialContext
from orchestrator.search.trial_log import Entry, TrialLog
from orchestrator.tasks.base import MainMetric

SIZES = (10, 100, 500, 2000)
CONCURRENT, NUM_EVALUATIONS = 4, 9
ACCURACY = MainMetric("accuracy", higher_is_better=True)
SPACE = (
    "{transfer.freeze: {choice: [0, 2, 4, all]}, train.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}, "
    "train.weight_decay: {uniform: [0.0, 0.1]}}"
)


def select_row(number: int, score: float) -> dict[str, Any]:
    """An evaluation, as in metrics.jsonl."""
    place = {"step": 8 * number, "epoch": float(number), "phase": "tune", "split": "select"}
    return {**place, "loss": 1 - score, "accuracy": score, "f1_macro": score, "seconds": 2.5 * number}


@cache
def search_recipe() -> Recipe:
    return orchestrator.load_recipe(RECIPE, [f"search.space={SPACE}", "search.algorithm=random", "search.trials=2000"])


@cache
def space() -> Space:
    return Space.of(search_recipe(), num_layers=6, num_parameters=22_000_000)


@cache
def parameters_of(size: int) -> list[dict[str, Any]]:
    return space().random(size, 0)


def plan() -> Any:
    """Return a search plan with the attributes that the choice of the winner reads."""
    return SimpleNamespace(metric=ACCURACY, prepared=SimpleNamespace(recipe=search_recipe()), weights_kept=1)


def search_directory(folder: Path) -> SearchDirectory:
    directory = SearchDirectory(folder / "search")
    directory.create()
    record = {"status": "finished", "metric": "accuracy", "mode": "max", "num_layers": 6}
    directory.update_record(**record, space=space().written())
    write_atomically(directory.recipe, dump_recipe(search_recipe()))
    return directory


def evaluations_of(number: int) -> list[dict[str, Any]]:
    """Return the evaluations of a trial, a curve that rises to its own height."""
    height = Random(number).uniform(0.3, 0.9)
    return [select_row(index, height * (1 - 2.0**-index)) for index in range(1, 4)]


def ended_rows(size: int, directory: SearchDirectory) -> list[dict[str, Any]]:
    """The lines that trials leave in trials.jsonl."""
    log = TrialLog(directory, ACCURACY, size, None)
    return [
        log.describe(trial_id(number), Entry(parameters, rows=evaluations_of(number)), Outcome(core_seconds=9.0))
        for number, parameters in enumerate(parameters_of(size))
    ]


def search_with_rows(size: int, folder: Path) -> SearchDirectory:
    directory = search_directory(folder)
    for row in ended_rows(size, directory):
        append_json_line(directory.rows, row)
    return directory


def prepare_planning(size: int, folder: Path) -> Callable[[], object]:
    return lambda: (space().grid(size), space().random(size, 1))


def prepare_recipes(size: int, folder: Path) -> Callable[[], object]:
    """Each trial's recipe is checked for what can be trained as one, and written down."""
    recipe = search_recipe()
    specs = [Spec(trial_id(number), parameters) for number, parameters in enumerate(parameters_of(size))]
    return lambda: (
        batch_trials(recipe, specs, 2),
        [dump_recipe(trial_recipe(recipe, spec.parameters)) for spec in specs],
    )


class Terminal(io.StringIO):
    """Shows nothing, and says that it would."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def prepare_log(size: int, folder: Path) -> Callable[[], object]:
    """Trials begin, tell what they score, and end, while a person looks on."""
    log = TrialLog(search_directory(folder), ACCURACY, size, Terminal())
    told = [(trial_id(number), each, evaluations_of(number)) for number, each in enumerate(parameters_of(size))]

    def work() -> None:
        for id, parameters, rows in told:
            log.add(id, parameters)
            log.on_trial_start(id)
            for row in rows:
                log.on_trial_result(id, row)
            log.on_trial_complete(id, True, None)

    return work


def prepare_weights(size: int, folder: Path) -> Callable[[], object]:
    """Whether each trial's weights are worth keeping, asked in the process that trains it."""
    directory = search_directory(folder)
    rows, context = ended_rows(size, directory), TrialContext(plan().prepared, [], directory.rows, ACCURACY, 3)

    def work() -> None:
        for row in rows:
            context.may_win(row["metrics"]["accuracy"])
            append_json_line(directory.rows, row)

    return work


def prepare_winner(size: int, folder: Path) -> Callable[[], object]:
    """A search goes on whose trials had all ended: it reads them, and names the best."""
    directory = search_with_rows(size, folder)

    def work() -> None:
        TrialLog(directory, ACCURACY, size, None)
        winner = choose_winner(plan(), directory)
        write_atomically(directory.best, dump_recipe(trial_recipe(search_recipe(), winner["parameters"])))
        drop_weights(plan(), directory)

    return work


def prepare_search_page(size: int, folder: Path) -> Callable[[], object]:
    return partial(write_report, search_with_rows(size, folder).root)


@dataclass(eq=False)
class StandIn:
    """Stands in for Ray Tune's trial, with the attributes that the scheduler reads."""

    trial_id: str
    height: float
    status: str = "PENDING"
    told: int = 0

    def tell(self) -> dict[str, Any]:
        self.told += 1
        score = self.height * (1 - 2.0**-self.told)
        return {"training_iteration": self.told, SCORE: score, "row": {"loss": 1 - score}}


class Loop:
    """Asks the searcher and the scheduler as Ray Tune does, at no cost of its own that grows with the trials."""

    def __init__(self, searcher: ListSearcher, scheduler: ASHA) -> None:
        self.searcher, self.scheduler = searcher, scheduler
        scheduler.source = searcher
        searcher.has_room, searcher.is_over = scheduler.has_room, scheduler.is_over
        self.trials: list[StandIn] = []
        self.running: list[StandIn] = []

    def get_trials(self) -> list[StandIn]:
        return self.trials

    def pause_trial(self, trial: StandIn, should_checkpoint: bool) -> None:
        trial.status = "PAUSED"

    def stop_trial(self, trial: StandIn) -> None:
        trial.status = "TERMINATED"

    def run(self) -> None:
        chance = Random(0)
        while True:
            suggested = self.searcher.suggest("")
            if isinstance(suggested, dict):
                self.trials.append(StandIn(suggested["spec"]["id"], chance.random()))
                self.scheduler.on_trial_add(self, self.trials[-1])
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is not None:
                chosen.status, chosen.told = "RUNNING", 0
                self.running.append(chosen)
            for trial in self.running:
                self._evaluate(trial)
            self.running = [trial for trial in self.running if trial.status == "RUNNING"]
            if not self.running and self.searcher.is_exhausted and self.scheduler.is_over():
                return

    def _evaluate(self, trial: StandIn) -> None:
        result = trial.tell()
        if trial.told < NUM_EVALUATIONS:
            self.scheduler.on_trial_result(self, trial, result)
        else:
            trial.status = "TERMINATED"
            self.scheduler.on_trial_complete(self, trial, result)


def prepare_halving(size: int, folder: Path) -> Callable[[], object]:
    """Successive halving decides after each evaluation who goes on."""

    def specs() -> Iterator[dict[str, Any]]:
        return ({"id": trial_id(number), "parameters": {}} for number in range(size))

    loop = Loop(ListSearcher(specs()), ASHA(1, 3, SCORE, WORST, CONCURRENT))

    def work() -> None:
        loop.run()
        assert all(trial.status == "TERMINATED" for trial in loop.trials)
        assert len(loop.trials) == size

    return work


COSTS: dict[str, Callable[[int, Path], Callable[[], object]]] = {
    "planning of a grid and of random draws": prepare_planning,
    "recipes, and who trains together": prepare_recipes,
    "successive halving": prepare_halving,
    "trial log, with its table": prepare_log,
    "whose weights may win": prepare_weights,
    "going on, the winner, best.yaml": prepare_winner,
    "the search's page": prepare_search_page,
}
