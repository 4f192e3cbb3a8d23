"""Everything that one worker's run needs, built from a prepared recipe: once for the run, and again for each phase."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator import models
from orchestrator.distributed import Exchange
from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.models import Prefix, PrefixUnavailable
from orchestrator.recipe import Recipe
from orchestrator.runs.checkpoint import CheckpointStore
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.identity import identity_to_keep
from orchestrator.runs.progress import ProgressFile
from orchestrator.runs.remote_checkpoints import open_store
from orchestrator.tasks.base import MainMetric
from orchestrator.training.assembling import ModelParts
from orchestrator.training.changed_weights import put_changes, read_changes, write_changes
from orchestrator.training.engine.base import DtypeOf, Engine, in_fp32, on_cpu
from orchestrator.training.engine.build import build_engine
from orchestrator.training.engine.deepspeed_config import deepspeed_config, restoring_linear
from orchestrator.training.engine.precision import Precision, choose_precision
from orchestrator.training.engine.settings import autocasts, micro_batch_size
from orchestrator.training.engine.weight_formats import cast_frozen_to_bf16, may_cast_frozen, may_load_as_stored
from orchestrator.training.engine.zero3 import assemble_for_sharding, is_sharded, shard_parameters
from orchestrator.training.evaluation import set_reference
from orchestrator.training.features.build import can_pack, extract_prefix_at_boundary, make_loaders
from orchestrator.training.features.prefix_cache import model_identity
from orchestrator.training.hooks import TrainingState
from orchestrator.training.loop import Schedule, make_schedule
from orchestrator.training.phases import TrainingPhase, find_phases, steps_of
from orchestrator.training.prepare import Prepared
from orchestrator.training.split_loader import SplitLoader
from orchestrator.transfer import Method, methods_of

CHANGED_EARLIER = "the weights of the frozen blocks were changed in an earlier phase"


@dataclass
class Session:
    """The state that the stages of one worker's run share.

    What a phase is trained with is replaced when the next one begins, so nobody else may keep it.
    """

    prepared: Prepared
    directory: RunDirectory
    device: torch.device
    exchange: Exchange
    store: CheckpointStore
    metric: MainMetric
    """Picks the best evaluation."""
    progress: ProgressFile | None
    """Only on worker 0."""
    phases: Sequence[TrainingPhase]
    boundaries: Sequence[int] = ()
    """Freeze boundaries whose features other runs will want."""

    phase_index: int = field(init=False, default=0)
    parts: ModelParts = field(init=False)
    methods: list[Method] = field(init=False)
    engine: Engine = field(init=False)
    loaders: dict[str, SplitLoader] = field(init=False)
    """Each split, as it is fed to the model."""
    schedule: Schedule = field(init=False)
    precision: Precision = field(init=False)
    changed_earlier: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Weights that earlier phases have changed and that this one does not train; on the CPU of worker 0 alone."""
    references: dict[str, Any] = field(init=False, default_factory=dict)
    """For tasks that need it, what the source predicts of the examples of each split."""
    _of_phase: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)

    @property
    def phase(self) -> TrainingPhase:
        """The phase that the model, the engine and the loaders are built for."""
        return self.phases[self.phase_index]

    def report_phase(self, phase: str) -> None:
        """Show what the run is doing."""
        if self.progress is not None:
            self.progress.show(force=True, phase=phase)

    def ends_phase(self, state: TrainingState) -> bool:
        """Whether the phase is over after the last step."""
        return state.stop is not None or state.step >= self.schedule.end

    def ends_run(self, state: TrainingState) -> bool:
        """Whether no phase has another step to take."""
        return self.phase_index == len(self.phases) - 1 and self.ends_phase(state)

    def begin_phase(self, index: int, start: int, changed: dict[str, Tensor] | None = None) -> None:
        """Build what a phase needs; what the phase before it needed is freed. All workers call this.

        Args:
            start: steps that earlier phases took.
            changed: weights that are to take the place of the source's, on worker 0.
        """
        self.end_phase()
        self.phase_index = index
        with contextlib.ExitStack() as stack:
            _build_phase(self, stack, start, changed or {})
            self._of_phase = stack.pop_all()

    def begin_next_phase(self, state: TrainingState) -> None:
        """Go on with the phase after this one, from the weights as they are now."""
        changed = self.trained_weights()
        index = self.phase_index + 1
        state.phase, state.phase_start = index, state.step
        # What ends one phase early does not end the next one.
        state.stop, state.evaluations_without_improvement = None, 0
        self.begin_phase(index, state.step, changed)

    def end_phase(self) -> None:
        """Free what the phase needed."""
        self._of_phase.close()
        for name in ("parts", "methods", "engine", "loaders"):
            if hasattr(self, name):
                delattr(self, name)
        if self.device.type == "cuda":
            gc.collect()  # Models whose parts refer to each other are to be gone from the device.

    def trained_weights(self, dtype_for: DtypeOf = in_fp32) -> dict[str, Tensor]:
        """Return all weights that this phase and earlier ones train; as `Engine.trained_weights`."""
        earlier = {name: on_cpu(value, dtype_for(name)) for name, value in self.changed_earlier.items()}
        return {**earlier, **self.engine.trained_weights(dtype_for)}

    def write_state(self, folder: Path) -> None:
        """Write this worker's part of what training goes on from; all workers call it."""
        self.engine.write_state(folder)
        write_changes(folder, self.changed_earlier)

    def read_state(self, folder: Path, state: TrainingState) -> None:
        """Read back what `write_state` wrote, into the phase that `state` is in; all workers call it."""
        if state.phase != self.phase_index or state.phase_start != self.schedule.start:
            changed = read_changes(folder) if self.exchange.rank == 0 else {}
            self.begin_phase(state.phase, state.phase_start, changed)
        self.engine.read_state(folder)


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
    """Build everything that this worker needs, for the first phase.

    Args:
        progress: only on worker 0.
        metric: picks the best evaluation; None for the recipe's.
        boundaries: freeze boundaries whose features other runs will want.
    """
    with contextlib.ExitStack() as stack:
        exchange = stack.enter_context(Exchange())  # First: it tells the others what goes wrong here.
        if progress is not None:
            progress.show(force=True, phase="loading the model")
        metric = metric or choose_metric(prepared)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Where 4-bit weights are loaded to.
            gc.collect()  # A model of before, whose parts refer to each other, is to be gone from the device.
        store = open_store(
            directory,
            exchange,
            # Where no attempt is recorded, as in a search's trials, none can have taken over.
            lambda: directory.read_record().get("attempt", attempt) == attempt,
        )
        store.identity = exchange.run_on_first(
            lambda: identity_to_keep(prepared.recipe, prepared.identity, directory, attempt)
        )
        phases = find_phases(prepared)
        session = Session(prepared, directory, device, exchange, store, metric, progress, phases, boundaries)
        stack.callback(session.end_phase)
        session.begin_phase(0, 0)
        yield session


def _build_phase(session: Session, stack: contextlib.ExitStack, start: int, changed: dict[str, Tensor]) -> None:
    """Build the model, the engine and the loaders of a session's phase.

    Args:
        stack: on its way out they are freed.
        start, changed: as `Session.begin_phase`.
    """
    prepared = replace(session.prepared, recipe=session.phase.recipe)
    recipe, device, exchange, directory = prepared.recipe, session.device, session.exchange, session.directory
    precision = session.precision = choose_precision(recipe, device)
    session.schedule = schedule = schedule_of(session, prepared, start)
    stack.enter_context(restoring_linear())
    parts = session.parts = assemble_for_sharding(prepared, exchange, may_load_as_stored(recipe, precision))
    session.methods = methods_of(recipe)
    for method in session.methods:
        method.build(parts)
    names, session.changed_earlier = put_changes(parts.module, changed, exchange, is_sharded(recipe))
    is_rounded = place(parts, recipe, precision, device)
    # What is tried out is compared more finely than bf16 computes.
    finely = models.Fp32ComputeMode if precision == "bf16" else contextlib.nullcontext
    with finely():
        split = extract_prefix_at_boundary(prepared, parts, schedule)
        packs = recipe.scale.zero_stage < 3 and can_pack(SplitLoader(prepared.encoded("train"), device), parts.module)
    if isinstance(split, Prefix) and names & parts.frozen.parameters:
        split = PrefixUnavailable(CHANGED_EARLIER)
    # The slowest to load and try out the model is waited for here, not in a collective of the engine.
    exchange.agree(None)
    if is_sharded(recipe):
        trained = parts.count_parameters()["trained"]
        config = deepspeed_config(recipe, precision, schedule.micro_batch_size, trained)
        shard_parameters(parts, recipe, config, device, exchange)
    engine = stack.enter_context(build_engine(parts.module, parts.groups, recipe, precision, exchange))
    session.engine = engine
    engine.rounds_weights |= is_rounded and recipe.transfer.adapter is None
    if recipe.scale.zero_stage == 3:  # No worker has the whole model on its device before.
        with finely():
            packs = can_pack(SplitLoader(prepared.encoded("train"), device), parts.module)
    packs = share_findings(engine, parts, packs)
    fitted = models.set_batch_norm_momentum(parts.module, passes_to_evaluation(recipe, schedule))
    if fitted is not None:
        engine.run_on_first_worker(lambda: directory.add_note(fitted))
    session.loaders = make_loaders(
        prepared,
        split,
        engine,
        precision,
        session.report_phase,
        directory.add_note,
        session.boundaries,
        directory.leads_node,
    )
    session.loaders["train"].packs = packs
    if prepared.task.needs_reference:
        ask_source(session, prepared)


def ask_source(session: Session, prepared: Prepared) -> None:
    """Store in each split what the source predicts for its examples, before anything is trained."""
    if session.references:  # Of the first phase: the model of a later one is not the source any more.
        for name, loader in session.loaders.items():
            loader.encoded.reference = session.references[name]
        return
    session.report_phase("asking the source")
    identity = model_identity(prepared.recipe, prepared.identity["source"], session.precision, session.engine)
    for name, loader in session.loaders.items():
        names = [*identity, prepared.keys[name]]
        size = session.schedule.micro_batch_size
        set_reference(session.engine, prepared.task, loader, size, names, prepared.tokens_per_pass)
        session.references[name] = loader.encoded.reference


def schedule_of(session: Session, prepared: Prepared, start: int) -> Schedule:
    """Return the schedule of a session's phase.

    Args:
        start: steps that earlier phases took.
    """
    lengths, recipe = prepared.encoded("train").lengths, prepared.recipe
    later = sum(steps_of(phase, len(lengths)) for phase in session.phases[session.phase_index + 1 :])
    return make_schedule(recipe.train, lengths, micro_batch_size(recipe), prepared.tokens_per_pass, start, later)


def passes_to_evaluation(recipe: Recipe, schedule: Schedule) -> int:
    """Return the least number of passes that a worker trains between two evaluations."""
    every = recipe.train.evaluate_every
    steps = schedule.order.steps_per_epoch if every == "epoch" else int(every)
    passes = -(-recipe.train.global_batch_size // (recipe.scale.workers * schedule.micro_batch_size))
    return min(steps, schedule.num_steps) * passes


def place(parts: ModelParts, recipe: Recipe, precision: Precision, device: torch.device) -> bool:
    """Put the weights on the device, in the formats that the engine holds them in, before the model is tried out.

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
    """Give all workers what the first one found out, where it alone has the whole model; returns its `packs`."""
    losses = models.find_token_losses(parts.module)
    mine = (packs, parts.head_is_new, losses is not None and losses.is_direct)
    packs, parts.head_is_new, is_direct = engine.broadcast_from_first(mine)
    if losses is not None:
        losses.is_direct = is_direct
    return packs


def choose_metric(prepared: Prepared) -> MainMetric:
    """Return the metric that picks the best checkpoint: the recipe's, or the task's main one.

    Raises:
        RecipeError: the task has no metric of that name.
    """
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
