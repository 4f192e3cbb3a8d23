"""How does the orchestrator grow with workers, records and trials?

Seconds and memory of our own code in the process of the command, without training and without Ray's share. Workers have
no model, and take turns; they go through records and checkpoints as real ones do. Trials are scores without a training
behind them; they go through the plan, their recipes, successive halving, the trial log, the choice of the winner, the
page. All of that is the package's own code. It writes where temporary files are (`--folder` for another disk).

The cost of each size is the least of several turns. The exponent is the slope of a line through the three largest sizes
on logarithmic scales (what does not grow hides, at small sizes, what does): 0 is none, 1 is linear. Memory is the most
that Python's objects took at a time, in turns of its own.

    python benchmarks/scale.py [--repeats 3] [--only WORDS] [--folder DIR] [--json FILE]

Exits with 1 when an exponent of seconds or of memory is above 1.15.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import scale_trials
from common import interleave, print_table, write_json
from scale_trials import ACCURACY, search_directory, select_row

from orchestrator.distributed import Exchange
from orchestrator.report import write_report
from orchestrator.runs.checkpoint import CheckpointStore
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.directory import write_json as write_record
from orchestrator.search.trial_log import TrialLog
from orchestrator.training.hooks import Recorder, TrainingState
from orchestrator.training.loop import Step

LARGEST_EXPONENT = 1.15
NUM_SIZES_FITTED = 3
LEAST_MEMORY = 0.5e6  # Bytes; less than that is what Python itself takes now and then.
WORKERS, ROWS = (1, 4, 16, 64, 256), (500, 2000, 8000, 32000)
NUM_STEPS, BYTES_OF_A_WORKER = 50, 16384
SECONDS_OF_A_TURN = 0.5
Prepare = Callable[[int, Path], Callable[[], object]]
"""Makes, in a folder, all that is needed for one size; returns what is timed."""


# ---- workers


def run_directory(folder: Path) -> RunDirectory:
    directory = RunDirectory(folder / "run")
    directory.create()
    directory.update_record(status="running", attempt=1)
    return directory


def step_of(number: int) -> Step:
    return Step(number, number / 8, 2.0 / number, 1.0, 1e-4, 32)


class Worker(Exchange):
    """One of several workers in this process, which need not wait for each other."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def run_on_first(self, action: Callable[[], Any]) -> Any:
        return action() if self.rank == 0 else None


def prepare_records(size: int, folder: Path) -> Callable[[], object]:
    """Every worker counts its losses, the first one writes them; a new attempt reads them again."""
    directory = run_directory(folder)
    workers = [(Recorder(Worker(rank), directory, 1), TrainingState()) for rank in range(size)]

    def work() -> None:
        for number in range(1, NUM_STEPS + 1):
            for recorder, memory in workers:
                recorder.after_step(step_of(number), memory)
        directory.update_record(status="running", world_size=size)
        directory.forget_metrics_after(NUM_STEPS // 2)

    return work


def save_checkpoint(size: int, directory: RunDirectory) -> CheckpointStore:
    """All workers save one checkpoint; returns the first one's store.

    The others write while the first one does, as they may in a training. So none has to wait for another, and threads
    that wait cost more than what is measured.
    """
    first, *others = (
        CheckpointStore(directory.checkpoints, Worker(rank), lambda: directory.read_record()["attempt"] == 1)
        for rank in range(size)
    )

    def write(rank: int, folder: Path) -> None:
        (folder / f"optimizer-{rank:05d}.bin").write_bytes(rank.to_bytes(2, "big") * (BYTES_OF_A_WORKER // 2))

    def write_all(folder: Path) -> None:
        write(0, folder)
        for store in others:
            store.save(NUM_STEPS, asdict(TrainingState()), partial(write, store.rank))

    first.save(NUM_STEPS, asdict(TrainingState()), write_all)
    return first


def prepare_saving(size: int, folder: Path) -> Callable[[], object]:
    return partial(save_checkpoint, size, run_directory(folder))


def prepare_resuming(size: int, folder: Path) -> Callable[[], object]:
    store = save_checkpoint(size, run_directory(folder))

    def work() -> None:
        checkpoint, notes = store.newest_valid()
        assert checkpoint is not None and not notes
        store.prune(1, None)

    return work


# ---- records of one run


def prepare_writing(size: int, folder: Path) -> Callable[[], object]:
    recorder, memory = Recorder(Exchange(), run_directory(folder), 1), TrainingState()

    def work() -> None:
        for number in range(1, size + 1):
            recorder.after_step(step_of(number), memory)

    return work


def run_with_rows(size: int, folder: Path) -> RunDirectory:
    directory = run_directory(folder)
    prepare_writing(size - size // 10, folder)()
    for number in range(1, size // 10 + 1):
        directory.append_metrics(select_row(number, 1 - 1 / (number + 1)))
    write_record(directory.result, {"status": "finished", "metrics": {"select": {"accuracy": 0.9}}, "steps": size})
    return directory


def prepare_reading(size: int, folder: Path) -> Callable[[], object]:
    directory = run_with_rows(size, folder)

    def work() -> None:
        directory.read_metrics()
        directory.forget_metrics_after(size // 2)

    return work


def prepare_run_page(size: int, folder: Path) -> Callable[[], object]:
    return partial(write_report, run_with_rows(size, folder).root)


def prepare_telling(size: int, folder: Path) -> Callable[[], object]:
    """One trial with very many evaluations."""
    log = TrialLog(search_directory(folder), ACCURACY, 1, None)
    log.add("0000", {})

    def work() -> None:
        for number in range(size):
            log.on_trial_result("0000", select_row(number, 0.5))

    return work


# ---- measuring

COSTS: dict[str, tuple[Sequence[int], dict[str, Prepare]]] = {
    "workers": (
        WORKERS,
        {
            "train rows and records": prepare_records,
            "saving a checkpoint": prepare_saving,
            "checking a checkpoint": prepare_resuming,
        },
    ),
    "rows of a run": (
        ROWS,
        {
            "writing them": prepare_writing,
            "reading them, also to go on": prepare_reading,
            "the run's page": prepare_run_page,
            "evaluations of one trial": prepare_telling,
        },
    ),
    "trials": (scale_trials.SIZES, scale_trials.COSTS),
}


@dataclass
class Growth:
    """The growth of one cost."""

    of: str
    cost: str
    sizes: list[int]
    seconds: list[float]
    """The least of all turns."""
    peak_bytes: list[int]

    @property
    def exponent(self) -> float:
        return slope(self.sizes, self.seconds)

    @property
    def memory_exponent(self) -> float:
        """0 where there is too little to speak of."""
        return slope(self.sizes, self.peak_bytes) if self.peak_bytes[-1] >= LEAST_MEMORY else 0.0

    @property
    def ok(self) -> bool:
        return max(self.exponent, self.memory_exponent) <= LARGEST_EXPONENT

    def cells(self) -> list[str]:
        times = [f"{seconds:.4f}" for seconds in self.seconds]
        exponents = [f"{value:.2f}" for value in (self.exponent, self.memory_exponent)]
        return [self.cost, *times, exponents[0], f"{self.peak_bytes[-1] / 1e6:.1f}", exponents[1], self.word]

    @property
    def word(self) -> str:
        return "ok" if self.ok else "FAIL"


def slope(sizes: Sequence[int], amounts: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the largest sizes on logarithmic scales."""
    x = [math.log(size) for size in sizes[-NUM_SIZES_FITTED:]]
    y = [math.log(amount) for amount in amounts[-NUM_SIZES_FITTED:]]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    over = sum((each - middle) * (other - level) for each, other in zip(x, y, strict=True))
    return over / sum((each - middle) ** 2 for each in x)


def time_once(prepare: Prepare, size: int, folder: Path | None) -> float:
    with tempfile.TemporaryDirectory(prefix="scale-", dir=folder) as place:
        work = prepare(size, Path(place))
        gc.collect()
        # Its cost grows linearly too, but in few large steps, which look like more than that where they fall.
        gc.disable()
        try:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        finally:
            gc.enable()


def time_turn(prepare: Prepare, size: int, folder: Path | None) -> float:
    """The least of what fits into a moment: what is short is disturbed by little things."""
    until = time.perf_counter() + SECONDS_OF_A_TURN
    seconds = time_once(prepare, size, folder)
    while time.perf_counter() < until:
        seconds = min(seconds, time_once(prepare, size, folder))
    return seconds


def peak_once(prepare: Prepare, size: int, folder: Path | None) -> int:
    with tempfile.TemporaryDirectory(prefix="scale-", dir=folder) as place:
        work = prepare(size, Path(place))
        # Or else Python, which holds much else by now, would put off looking for what can be given back.
        gc.freeze()
        gc.collect()
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            gc.unfreeze()


def measure(
    of: str, cost: str, prepare: Prepare, sizes: Sequence[int], num_repeats: int, folder: Path | None
) -> Growth:
    time_once(prepare, sizes[0], folder)  # Imports, and what is made once.
    found = interleave({str(size): partial(time_turn, prepare, size, folder) for size in sizes}, num_repeats)
    # The lesser of two: now and then a table that Python has for everything at once (of names, say) has to grow.
    peaks = [min(peak_once(prepare, size, folder) for _ in range(2)) for size in sizes]
    return Growth(of, cost, list(sizes), [min(found[str(size)]) for size in sizes], peaks)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each size")
    parser.add_argument("--only", default="", help="costs with these words in their names")
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder unless given")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    growths = []
    for of, (sizes, costs) in COSTS.items():
        chosen = {cost: prepare for cost, prepare in costs.items() if options.only in cost}
        found = [measure(of, cost, each, sizes, options.repeats, options.folder) for cost, each in chosen.items()]
        if found:
            titles = [f"seconds with so many {of}", *map(str, sizes), "exponent", "MB at most", "exponent", ""]
            print_table(titles, (growth.cells() for growth in found))
            print()
        growths += found
    numbers = [{"exponent": growth.exponent, "memory_exponent": growth.memory_exponent} for growth in growths]
    write_json(options.json, [asdict(growth) | each for growth, each in zip(growths, numbers, strict=True)])
    return 0 if growths and all(growth.ok for growth in growths) else 1


if __name__ == "__main__":
    sys.exit(main())
