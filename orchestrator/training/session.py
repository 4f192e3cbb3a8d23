"""Everything that one worker's run needs, built from a prepared recipe."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator import models
from orchestrator.distributed import Exchange
from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.runs.checkpoint import CheckpointStore
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.identity import identity_to_keep
from orchestrator.runs.progress import ProgressFile
from orchestrator.runs.remote_checkpoints import open_store
from orchestrator.tasks.base import MainMetric
from orchestrator.training.assembling import ModelParts
from orchestrator.training.engine.base import Engine
from orchestrator.training.engine.build import build_engine
from orchestrator.training.engine.deepspeed_config import deepspeed_config, restoring_linear
from orchestrator.training.engine.precision import Precision, choose_precision
from orchestrator.training.engine.settings import autocasts, micro_batch_size
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, may_cast_frozen, may_load_as_stored
from orchestrator.training.engine.zero3 import assemble_for_sharding, is_sharded, shard_parameters
from orchestrator.training.evaluation import set_reference
from orchestrator.training.features.build import can_pack, extract_prefix_at_boundary, make_loaders
from orchestrator.training.features.prefix_cache import model_identity
from orchestrator.training.loop import Schedule, make_schedule
from orchestrator.training.prepare import Prepared
from orchestrator.training.split_loader import SplitLoader


@dataclass
class Session:
    """What the stages of one worker's run share."""

    prepared: Prepared
    directory: RunDirectory
    parts: ModelParts
    engine: Engine
    loaders: dict[str, SplitLoader]
    """Each split, as it is fed to the model."""
    schedule: Schedule
    precision: Precision
    store: CheckpointStore
    metric: MainMetric
    progress: ProgressFile | None
    """Only on worker 0."""

    def report_phase(self, phase: str) -> None:
        if self.progress is not None:
            self.progress.show(force=True, phase=phase)


@contextlib.contextmanager
def open_session(
    prepared: Prepared,
    directory: RunDirectory,
    attempt: int,
    device: Any,
    progress: ProgressFile | None,
    metric: MainMetric | None = None,
    boundaries: Sequence[int] = (),
) -> Iterator[Session]:
    """Build everything that this worker needs.

    Args:
        progress: only on worker 0.
        metric: picks the best evaluation; None for the recipe's.
        boundaries: freeze boundaries whose features other runs will want.
    """
    recipe = prepared.recipe
    with contextlib.ExitStack() as stack:
        exchange = stack.enter_context(Exchange())  # First: it tells the others what goes wrong here.
        if progress is not None:
            progress.show(force=True, phase="loading the model")
        metric = metric or choose_metric(prepared)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Where 4-bit weights are loaded to.
            gc.collect()  # A model of before, whose parts refer to each other, is to be gone from the device.
        precision = choose_precision(recipe, device)
        lengths = prepared.encoded("train").lengths
        schedule = make_schedule(recipe.train, lengths, micro_batch_size(recipe), prepared.tokens_per_pass)
        stack.enter_context(restoring_linear())
        as_stored = may_load_as_stored(recipe, precision)
        parts = assemble_for_sharding(prepared, exchange, as_stored)
        is_rounded = place(parts, recipe, precision, device)
        # What is tried out is compared more finely than bf16 computes.
        finely = models.Fp32ComputeMode if precision == "bf16" else contextlib.nullcontext
        with finely():
            split = extract_prefix_at_boundary(prepared, parts, schedule)
            packs = recipe.scale.zero_stage < 3 and can_pack(
                SplitLoader(prepared.encoded("train"), device), parts.module
            )
        # The slowest to load and try out the model is waited for here, not in a collective of the engine.
        exchange.agree(None)
        if is_sharded(recipe):
            trained = parts.count_parameters()["trained"]
            config = deepspeed_config(recipe, precision, schedule.micro_batch_size, trained)
            shard_parameters(parts, recipe, config, device, exchange)
        engine = stack.enter_context(build_engine(parts.module, parts.groups, recipe, precision, exchange))
        engine.rounds_weights |= is_rounded and recipe.transfer.adapter is None
        store = open_store(
            directory,
            exchange,
            # Where no attempt is recorded, as in a search's trials, none can have taken over.
            lambda: directory.read_record().get("attempt", attempt) == attempt,
        )
        store.identity = exchange.run_on_first(lambda: identity_to_keep(recipe, prepared.identity, directory, attempt))
        if recipe.scale.zero_stage == 3:  # No worker has the whole model on its device before.
            with finely():
                packs = can_pack(SplitLoader(prepared.encoded("train"), device), parts.module)
        packs = share_findings(engine, parts, packs)
        fitted = models.set_batch_norm_momentum(parts.module, passes_to_evaluation(recipe, schedule))
        if fitted is not None:
            engine.run_on_first_worker(lambda: directory.add_note(fitted))
        session = Session(prepared, directory, parts, engine, {}, schedule, precision, store, metric, progress)
        session.loaders = make_loaders(
            prepared,
            split,
            engine,
            precision,
            session.report_phase,
            directory.add_note,
            boundaries,
            directory.leads_node,
        )
        session.loaders["train"].packs = packs
        if prepared.task.needs_reference:
            session.report_phase("asking the source")
            identity = model_identity(recipe, prepared.identity["source"], precision, engine)
            for name, loader in session.loaders.items():
                names = [*identity, prepared.keys[name]]
                set_reference(engine, prepared.task, loader, schedule.micro_batch_size, names, prepared.tokens_per_pass)
        yield session


def passes_to_evaluation(recipe: Recipe, schedule: Schedule) -> int:
    """Return the least number of passes that a worker trains between two evaluations."""
    every = recipe.train.evaluate_every
    steps = schedule.order.steps_per_epoch if every == "epoch" else int(every)
    passes = -(-recipe.train.global_batch_size // (recipe.scale.workers * schedule.micro_batch_size))
    return min(steps, schedule.total_steps) * passes


def place(parts: ModelParts, recipe: Recipe, precision: Precision, device: torch.device) -> bool:
    """Have the weights on the device, in the formats that the engine holds them in, before the model is tried out.

    With ZeRO-3, where a whole model need not fit on a device, they stay where they are.

    Returns:
        Whether digits of any weight were lost.
    """
    stage = recipe.scale.zero_stage
    is_rounded = autocasts(recipe, precision) and may_cast_frozen(recipe) and cast_frozen_to_bf16(parts.module)
    if stage < 3:
        parts.module.to(device)
    return is_rounded


def share_findings(engine: Engine, parts: ModelParts, packs: bool) -> bool:
    """Have all workers know what the first one found out, where it alone has the whole model; returns its `packs`."""
    losses = models.find_token_losses(parts.module)
    mine = (packs, parts.head_is_new, losses is not None and losses.is_direct)
    packs, parts.head_is_new, is_direct = engine.broadcast_from_first(mine)
    if losses is not None:
        losses.is_direct = is_direct
    return packs


def choose_metric(prepared: Prepared) -> MainMetric:
    """The metric that picks the best checkpoint: the recipe's, or the task's main one."""
    stopping = prepared.recipe.train.early_stopping
    main = prepared.task.main_metric
    if stopping is None or stopping.metric is None or stopping.metric == main.name:
        return main
    known = prepared.task.metric_directions()
    if stopping.metric not in known:
        close = nearest(stopping.metric, known)
        raise RecipeError(
            Problem(
                f"the task has no metric '{stopping.metric}'",
                prepared.recipe.origin.where("train.early_stopping.metric"),
                f"did you mean {close}?" if close else f"use one of: {', '.join(sorted(known))}",
            )
        )
    return MainMetric(stopping.metric, known[stopping.metric])
