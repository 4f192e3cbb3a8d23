"""The time of a training, from the operations that it computes and the rate of its machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from orchestrator.errors import InputError, Problem
from orchestrator.planning import EFFICIENCY, ComputeCost, Machine, network_bytes, step_seconds
from orchestrator.planning.measuring import Measurement
from orchestrator.planning.plan_input import open_plan_input
from orchestrator.planning.sharding_options import Planner
from orchestrator.planning.workload import Positions, Workload, positions_of_split
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.training.engine.precision import Precision, dtype_of
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.engine.sizes import BYTES_MOVED_BY_ADAM
from orchestrator.transfer import methods_of

NUMBERS_MOVED = 2**23
REPETITIONS = 5


def estimate_compute_cost(planner: Planner, recipe: Recipe, steps: int | None, calibration: Path | None) -> ComputeCost:
    """Estimate the time of a training.

    Args:
        steps: None where their number is not known.
        calibration: the directory of a run, from which the rate is taken; None for a share of the machine's peak rate.
    """
    workload, found = planner.measure(recipe, micro_batch_size(recipe))
    step = operations_of_step(planner, recipe, workload, found)
    rate, basis = throughput(planner, calibration)
    network = network_bytes(found.size, planner.setup(recipe, workload))
    seconds = step_seconds(step, rate, network, recipe.scale.workers, planner.machine)
    total = None
    if steps is not None:
        features = operations_of_features(planner, workload, found)
        total = seconds * steps + (features + operations_of_evaluations(planner, recipe, steps)) / rate
    return ComputeCost(step, rate, basis, seconds, total)


def operations_of_step(planner: Planner, recipe: Recipe, workload: Workload, found: Measurement) -> float:
    """Return the operations of an average step on the busiest worker."""
    frozen = found.frozen.of(workload.epoch) if found.stores_features else 0.0
    passes = (found.whole.of(workload.epoch) - frozen) / workload.steps
    methods = sum(method.plan().operations_per_number for method in methods_of(recipe))
    return passes + (planner.balance * BYTES_MOVED_BY_ADAM + methods) * found.size.trained


def operations_of_features(planner: Planner, workload: Workload, found: Measurement) -> float:
    """Return the operations of the features that are stored before the first step, on each worker."""
    if not found.stores_features:
        return 0.0
    return found.frozen.of(workload.epoch + select_positions(planner))


def operations_of_evaluations(planner: Planner, recipe: Recipe, steps: int) -> float:
    """Return the operations of all evaluations of *select*, on each worker."""
    workload, found = planner.measure(recipe, micro_batch_size(recipe))
    select = select_positions(planner)
    frozen = found.frozen.of(select) if found.stores_features else 0.0
    return workload.num_evaluations(recipe, steps) * (found.forward.of(select) - frozen)


def select_positions(planner: Planner) -> Positions:
    """Return a worker's share of *select*; nothing where the data are not on this machine."""
    prepared = planner.plan_input.prepared
    if "select" not in prepared.tables:
        return Positions(0.0, 0.0)
    return positions_of_split(prepared.encoded("select"), prepared.recipe.scale.workers)


def throughput(planner: Planner, calibration: Path | None) -> tuple[float, str]:
    """Return the operations a second of a worker, and where the number comes from."""
    if calibration is not None:
        return throughput_of_run(calibration, planner.machine, planner.balance), f"the throughput of {calibration}"
    precision = planner.precision(planner.plan_input.prepared.recipe)
    rate = planner.machine.rate_in(precision)
    if rate is not None:
        return rate * EFFICIENCY, f"{EFFICIENCY:.0%} of the peak rate of a {planner.machine.name} in {precision}"
    return EFFICIENCY * measure_matmul(precision, planner.machine.is_gpu), "matrix products timed on this machine"


def throughput_of_run(directory: Path, machine: Machine, balance: float) -> float:
    """Return the operations a second of each worker of a finished run.

    Raises:
        InputError: the directory holds no finished run.
    """
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        recipe = load_recipe(directory / "recipe.yaml")
    except OSError as error:
        remedy = "name the directory of a finished run on the same kind of machine"
        raise InputError(Problem("there is no finished run", str(directory), remedy)) from error
    planner = Planner(open_plan_input(recipe), machine, balance)
    workload, found = planner.measure(recipe, micro_batch_size(recipe))
    steps = int(result["steps"])
    # The clock of a run starts with its first step, after the features are stored.
    total = operations_of_step(planner, recipe, workload, found) * steps
    total += operations_of_evaluations(planner, recipe, steps)
    return float(total / result["seconds"])


def measure_matmul(precision: Precision, on_gpu: bool) -> float:
    """Return the operations a second of matrix products of a common size on this machine, the best of some."""
    dtype = dtype_of(precision)
    device, size = ("cuda", 4096) if on_gpu else ("cpu", 1024)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _least_seconds(lambda: left @ right)


def measure_balance(machine: Machine, precision: Precision) -> float:
    """Return the operations that a machine does while it moves a byte, by its data sheet or measured on this one."""
    rate = machine.rate_in(precision)
    if rate is not None and machine.bandwidth is not None:
        return rate / machine.bandwidth
    numbers = torch.ones(NUMBERS_MOVED, device="cuda" if machine.is_gpu else "cpu")
    # An elementwise function that processors compute more slowly than they move its numbers.
    moved = 2 * numbers.nbytes / _least_seconds(lambda: torch.nn.functional.gelu(numbers))
    return measure_matmul("fp32", machine.is_gpu) / moved


def _least_seconds(work: Callable[[], torch.Tensor]) -> float:
    best = math.inf
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        found = work()
        float(found.flatten()[0])  # Waits for the result.
        best = min(best, time.perf_counter() - began)
    return best
