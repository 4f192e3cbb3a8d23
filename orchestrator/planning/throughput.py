"""How long a training takes, by the operations that it computes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.errors import InputError, Problem
from orchestrator.planning import EFFICIENCY, ComputeCost, Machine, network_bytes, step_seconds
from orchestrator.planning.measuring import Load, Measured
from orchestrator.planning.plan_input import open_plan_input
from orchestrator.planning.sharding_options import Planner
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.training.engine.precision import Precision, dtype_of
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.engine.sizes import BYTES_MOVED_BY_ADAM
from orchestrator.transfer import methods_of

NUMBERS_MOVED = 2**23


def caches(planner: Planner, recipe: Recipe, found: Measured, load: Load, steps: int | None) -> bool:
    """Whether the run would store what its frozen blocks make of the data."""
    wanted = recipe.train.cache_prefix
    can = recipe.scale.zero_stage < 3 and planner.encoded.rows_per_example == 1 and not planner.encoded.augments
    if not can or found.boundary_numbers == 0 or wanted is False:
        return False
    return wanted is True or (found.frozen.linear > 0 and (steps is None or steps > load.steps))


def compute_cost_of(
    planner: Planner, recipe: Recipe, micro_batch: int, steps: int | None, cached: bool, calibration: Path | None
) -> ComputeCost:
    load, found = planner.measure(recipe, micro_batch)
    a_step = operations_of_step(planner, recipe, load, found, cached)
    rate, basis = throughput(planner, calibration)
    network = network_bytes(found.size, planner.setting(recipe, load))
    seconds = step_seconds(a_step, rate, network, recipe.scale.workers, planner.machine)
    whole = None if steps is None else seconds * steps + operations_beside(planner, recipe, micro_batch, steps) / rate
    return ComputeCost(a_step, rate, basis, seconds, whole)


def operations_of_step(planner: Planner, recipe: Recipe, load: Load, found: Measured, cached: bool) -> float:
    passes = (found.whole.of(load) - (found.frozen.of(load) if cached else 0.0)) / load.steps
    methods = sum(method.plan().operations_per_number for method in methods_of(recipe))
    return passes + (planner.balance * BYTES_MOVED_BY_ADAM + methods) * found.size.trained


def operations_beside(planner: Planner, recipe: Recipe, micro_batch: int, steps: int) -> float:
    """Of evaluations, and of what frozen blocks compute once, on each worker."""
    load, found = planner.measure(recipe, micro_batch)
    prepared = planner.plan_input.prepared
    cached = caches(planner, recipe, found, load, steps)
    once = found.frozen.of(load) if cached else 0.0
    if "select" not in prepared.tables:
        return once
    encoded = prepared.encoded("select")
    lengths = encoded.lengths.astype(float) * 1.0
    times = encoded.rows_per_example / recipe.scale.workers
    of_select = replace(load, linear=times * float(lengths.sum()), square=times * float((lengths**2).sum()))
    every = recipe.train.evaluate_every
    evaluations = max(1, steps // (load.steps if every == "epoch" else int(every)))
    frozen = found.frozen.of(of_select) if cached else 0.0
    return once + frozen + evaluations * (found.forward.of(of_select) - frozen)


def throughput(planner: Planner, calibration: Path | None) -> tuple[float, str]:
    """Operations a second of a worker, and where that is from."""
    if calibration is not None:
        return throughput_of_run(calibration, planner.machine, planner.balance), f"the pace of {calibration}"
    precision = planner.precision(planner.plan_input.prepared.recipe)
    rate = planner.machine.rate_in(precision)
    if rate is not None:
        basis = f"{EFFICIENCY:.0%} of what a {planner.machine.name} does in {precision} at its best"
        return rate * EFFICIENCY, basis
    return EFFICIENCY * measure_products(precision, planner.machine.is_gpu), "matrix products timed here"


def throughput_of_run(directory: Path, machine: Machine, balance: float) -> float:
    """Operations a second of each worker of a finished run.

    Raises:
        InputError: there is none.
    """
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        recipe = load_recipe(directory / "recipe.yaml")
    except OSError as error:
        remedy = "name the directory of a finished run on the same kind of machine"
        raise InputError(Problem("there is no finished run", str(directory), remedy)) from error
    planner = Planner(open_plan_input(recipe), machine, balance)
    micro_batch = micro_batch_size(recipe)
    load, found = planner.measure(recipe, micro_batch)
    steps = int(result["steps"])
    cached = caches(planner, recipe, found, load, steps)
    a_step = operations_of_step(planner, recipe, load, found, cached)
    # The clock of a run begins with its steps, after what is computed once.
    once = found.frozen.of(load) if cached else 0.0
    total = a_step * steps + operations_beside(planner, recipe, micro_batch, steps) - once
    return float(total / result["seconds"])


def measure_products(precision: Precision, on_gpu: bool) -> float:
    """Operations a second of matrix products of a common size, on this machine, at their best."""
    dtype = dtype_of(precision)
    device, size = ("cuda", 4096) if on_gpu else ("cpu", 1024)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _least_seconds(lambda: left @ right)


def balance_of(machine: Machine, precision: Precision) -> float:
    """Operations that a machine does while it moves a byte: as its data sheet has it, or measured on this one."""
    rate = machine.rate_in(precision)
    if rate is not None and machine.bandwidth is not None:
        return rate / machine.bandwidth
    numbers = torch.ones(NUMBERS_MOVED, device="cuda" if machine.is_gpu else "cpu")
    # A common function of one number, which processors do not do as fast as they move it.
    moved = 2 * numbers.nbytes / _least_seconds(lambda: torch.nn.functional.gelu(numbers))
    return measure_products("fp32", machine.is_gpu) / moved


def _least_seconds(work: Callable[[], torch.Tensor]) -> float:
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        found = work()
        float(found.flatten()[0])  # Until it is there.
        best = min(best, time.perf_counter() - began)
    return best
