"""Estimates the time and the disk space of a search, from a few steps that are timed on this machine.

The time of a trial is that of the whole model times the share of it that the trial computes: with `L` layers of which
`k` are frozen and stored, its epochs times `(L - k) / L` of a training step and an evaluation. The frozen layers are
computed once for all trials.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from orchestrator import models
from orchestrator.data.cache import cache_folder
from orchestrator.models import Prefix
from orchestrator.models.attempt import CallFailed
from orchestrator.models.shortcuts.prefix import BoundaryNotReached
from orchestrator.recipe import Recipe
from orchestrator.search.batching import trains_only_the_head
from orchestrator.search.local_runner import can_run_locally
from orchestrator.search.plan import SearchPlan, plan_search
from orchestrator.search.resources import nodes_here, num_concurrent, trial_resources
from orchestrator.search.space import trial_recipe
from orchestrator.training.assembling import assemble
from orchestrator.training.engine.build import build_engine
from orchestrator.training.engine.devices import choose_device
from orchestrator.training.engine.precision import Precision, choose_precision
from orchestrator.training.engine.settings import micro_batch_size
from orchestrator.training.evaluation import score
from orchestrator.training.features.build import CACHED_SPLITS, extract_prefix_at_boundary
from orchestrator.training.features.prefix_cache import PrefixCache, model_identity, open_store
from orchestrator.training.loop import Schedule, make_schedule, take_step
from orchestrator.training.phases import find_phases
from orchestrator.training.prepare import Prepared, encode_inputs, read_inputs
from orchestrator.training.split_loader import SplitLoader

STEPS_TIMED = 3
STARTUP_SECONDS = 12.0  # Imports, Ray, and a process for each trial at a time.
LOCAL_STARTUP_SECONDS = 8.0  # Imports.
SECONDS_PER_TRIAL = 0.4  # To build the model and write the records.
SECONDS_PER_BATCHED_TRIAL = 0.05


@dataclass
class Estimate:
    """Time and disk space that a search will take on this machine."""

    trials: int
    concurrent: int
    seconds: float
    cache_bytes: int
    """For stored features."""
    disk_bytes: int
    """For the search directory."""
    free_bytes: int
    notes: list[str] = field(default_factory=list)


@dataclass
class Throughput:
    """Seconds per example of the whole model."""

    step: float
    """In training."""
    forward: float
    """In evaluation."""
    sizes: dict[int, int]
    """Bytes of the stored features at each boundary."""


def estimate(recipe: Recipe, strict: bool = False) -> Estimate:
    """Time a few steps on this machine and compute the rest; nothing is started or kept.

    Raises:
        InputError: recipe, data or source are wrong.
    """
    plan = plan_search(encode_inputs(read_inputs(recipe, strict), strict))
    nodes, is_local = nodes_here(recipe), can_run_locally(plan)
    concurrent = 1 if is_local else num_concurrent(plan, nodes, trial_resources(recipe, nodes))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // concurrent))
    try:
        throughput = measure(plan)
    finally:
        torch.set_num_threads(threads)
    known = plan.known if plan.known is not None else plan.space.random(plan.num_trials, plan.search.seed)
    startup = LOCAL_STARTUP_SECONDS if is_local else STARTUP_SECONDS
    is_asha = plan.search.scheduler == "asha"
    return Estimate(
        trials=plan.num_trials + plan.search.reseed_top * plan.search.reseeds,
        concurrent=concurrent,
        seconds=startup + computing_seconds(plan, known, throughput) / concurrent,
        cache_bytes=sum(throughput.sizes.values()),
        disk_bytes=disk_bytes(plan, known, len(known) if is_asha else concurrent),
        free_bytes=shutil.disk_usage(cache_folder()).free,
        notes=["asha stops trials early: the time is an average"] if is_asha else [],
    )


def computing_seconds(plan: SearchPlan, known: list[dict[str, Any]], throughput: Throughput) -> float:
    """Return the time of all trials one after another, and of the features that they share."""
    prefix = max(plan.boundaries) / plan.num_layers if throughput.sizes else 0.0
    num_examples = sum(len(plan.prepared.encoded(name)) for name in CACHED_SPLITS)
    shared = num_examples * throughput.forward * min(1.0, prefix)
    own = sum(trial_seconds(plan, parameters, throughput) for parameters in known)
    repeats = plan.search.reseed_top * plan.search.reseeds / max(1, len(known))
    return shared + own * (1 + repeats)


def disk_bytes(plan: SearchPlan, known: list[dict[str, Any]], num_checkpoints: int) -> int:
    """Return the size of the search directory: the winner's model, weights that may win, and checkpoints.

    Args:
        num_checkpoints: trials that may have a checkpoint at the same time.
    """
    model_bytes = 4 * plan.num_parameters
    # A checkpoint has the optimizer's state and the best weights, and those weights are written once more.
    checkpoints = sorted(5 * share_trained(plan, parameters) * model_bytes for parameters in known)
    return int(model_bytes * (1 + plan.weights_kept) + sum(checkpoints[-num_checkpoints:]))


def trial_seconds(plan: SearchPlan, parameters: dict[str, Any], throughput: Throughput) -> float:
    """Return the time of one trial by itself, its features stored where that is possible."""
    recipe = trial_recipe(plan.prepared.recipe, parameters)
    is_batched = bool(throughput.sizes) and trains_only_the_head(recipe)
    overhead = SECONDS_PER_BATCHED_TRIAL if is_batched else SECONDS_PER_TRIAL
    phases = find_phases(replace(plan.prepared, recipe=recipe), plan.num_layers)
    return overhead + sum(phase_seconds(plan, phase.recipe, throughput) for phase in phases)


def phase_seconds(plan: SearchPlan, recipe: Recipe, throughput: Throughput) -> float:
    """Return the seconds of one phase of a trial."""
    share = share_of_recipe(plan, recipe)
    steps = steps_of(replace(plan.prepared, recipe=recipe))
    num_examples = steps.num_steps / steps.order.steps_per_epoch * len(plan.prepared.encoded("train"))
    every = recipe.train.evaluate_every
    evaluations = max(1, steps.num_steps // (steps.order.steps_per_epoch if every == "epoch" else int(every)))
    scored = evaluations * len(plan.prepared.encoded("select"))
    part = mean_share(evaluations, plan.search.grace, plan.search.reduction) if plan.search.scheduler == "asha" else 1.0
    computed = share * (num_examples * throughput.step + scored * throughput.forward)
    frozen = 0.0 if throughput.sizes else (1 - share) * (num_examples + scored) * throughput.forward
    return part * (computed + frozen)


def share_trained(plan: SearchPlan, parameters: dict[str, Any]) -> float:
    """Return the share of the model's layers that a trial trains, in the phase that trains most."""
    recipe = trial_recipe(plan.prepared.recipe, parameters)
    phases = find_phases(replace(plan.prepared, recipe=recipe), plan.num_layers)
    return max(share_of_recipe(plan, phase.recipe) for phase in phases)


def share_of_recipe(plan: SearchPlan, recipe: Recipe) -> float:
    """Return the share of the model's layers that a recipe without phases trains."""
    depth = models.resolve_depth(recipe.transfer.freeze, plan.num_layers)
    return 0.0 if depth.tail else 1 - depth.num_layers / plan.num_layers


def mean_share(evaluations: int, grace: int, reduction: int) -> float:
    """Return the share of its evaluations that an average trial runs under successive halving."""
    total, done, going_on, rung = 0.0, 0, 1.0, grace
    while done < evaluations:
        end = min(rung, evaluations)
        total += going_on * (end - done)
        done, rung, going_on = end, rung * reduction, going_on / reduction
    return total / evaluations


def measure(plan: SearchPlan) -> Throughput:
    """Time some steps of the whole model, and measure the size of its features."""
    prepared = plan.prepared
    precision = choose_precision(prepared.recipe, choose_device(prepared.recipe))
    whole = with_transfer(prepared, freeze=0, adapter=None)
    parts = assemble(whole)
    steps = steps_of(whole)
    with build_engine(parts.module, parts.groups, whole.recipe, precision) as engine:
        loader = SplitLoader(prepared.encoded("train"), engine.device, engine.input_dtype)
        batches = steps.order.epoch(0)[: STEPS_TIMED + 1]
        take_step(engine, prepared.task, loader, steps, 0, batches[0])
        start = time.perf_counter()
        for index, rows in enumerate(batches[1:] or batches):
            take_step(engine, prepared.task, loader, steps, index + 1, rows)
        step = (time.perf_counter() - start) / sum(len(rows) for rows in batches[1:] or batches)
        select = SplitLoader(prepared.encoded("select"), engine.device, engine.input_dtype)
        start = time.perf_counter()
        score(engine, prepared.task, select, steps.micro_batch_size)
        forward = (time.perf_counter() - start) / len(select)
    return Throughput(step, forward, feature_sizes(plan, precision))


def feature_sizes(plan: SearchPlan, precision: Precision) -> dict[int, int]:
    """Return the bytes of the stored features at each boundary of the search."""
    if not plan.boundaries or plan.prepared.recipe.train.cache_prefix is False:
        return {}
    frozen = with_transfer(plan.prepared, freeze="all", adapter=None)
    parts = assemble(frozen)
    prefix = extract_prefix_at_boundary(frozen, parts, steps_of(frozen))
    if not isinstance(prefix, Prefix):
        return {}
    with build_engine(parts.module, parts.groups, frozen.recipe, precision) as engine:
        identity = model_identity(frozen.recipe, frozen.identity["source"], precision, engine)
        cache = PrefixCache(open_store(frozen.recipe), prefix, engine, identity, lambda phase: None)
        boundaries = sorted({min(boundary, prefix.boundary) for boundary in plan.boundaries})
        sizes = dict.fromkeys(boundaries, 0)
        try:
            for name in CACHED_SPLITS:
                for boundary, num_bytes in cache.sizes(frozen.encoded(name), boundaries).items():
                    sizes[boundary] += num_bytes
        except (CallFailed, BoundaryNotReached):
            return {}
    return sizes


def with_transfer(prepared: Prepared, **changes: Any) -> Prepared:
    """Return the same with other values under `transfer`, in one process."""
    recipe = prepared.recipe
    transfer = recipe.transfer.model_copy(update=changes)
    scale = recipe.scale.model_copy(update={"zero_stage": 0, "workers": 1, "engine": "torch"})
    return replace(prepared, recipe=recipe.model_copy(update={"transfer": transfer, "scale": scale}))


def steps_of(prepared: Prepared) -> Schedule:
    """Return the schedule of a recipe."""
    recipe = prepared.recipe
    return make_schedule(recipe.train, prepared.encoded("train").lengths, micro_batch_size(recipe))
