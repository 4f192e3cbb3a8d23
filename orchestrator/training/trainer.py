"""One worker's part of a run: resume, train, score, export. It runs the same in one process or in many."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orchestrator import models
from orchestrator.errors import Problem, RecipeError, nearest
from orchestrator.recipe import Recipe
from orchestrator.tasks.base import Arrays, MainMetric
from orchestrator.training.answers import Answer, write_answers
from orchestrator.training.assemble import Parts
from orchestrator.training.checkpoint import Checkpoint, CheckpointStore, find_damage
from orchestrator.training.deepspeed_setup import deepspeed_config, plain_linear
from orchestrator.training.engine import Engine, build_engine, micro_batch_size
from orchestrator.training.evaluation import refer_to_source, score
from orchestrator.training.exchange import Exchange
from orchestrator.training.export import AfterTraining, export_model, formats_to_write, write_predictions
from orchestrator.training.features import can_pack, make_feeds, split_at_boundary
from orchestrator.training.feed import Feed
from orchestrator.training.hooks import Clock, Evaluator, Hook, Memory, Recorder, Saver
from orchestrator.training.identity import identity_to_keep
from orchestrator.training.interruption import Wish
from orchestrator.training.logs import log_to
from orchestrator.training.loop import Plan, make_plan, training_steps
from orchestrator.training.memory_use import reset_peak
from orchestrator.training.precision import Precision, choose_precision
from orchestrator.training.preemption import Notice, Watch
from orchestrator.training.prefix_cache import model_identity
from orchestrator.training.prepare import Prepared
from orchestrator.training.progress import ProgressFile
from orchestrator.training.reached import Reached
from orchestrator.training.remote_checkpoints import open_store
from orchestrator.training.run_directory import RunDirectory, finite, write_json
from orchestrator.training.spreading import assemble_share, is_spread, spread
from orchestrator.training.weight_formats import hold_frozen_in_bf16, may_load_as_stored, may_narrow

NUM_SAMPLES = 8


@dataclass
class Session:
    """What the stages of one worker's run share."""

    prepared: Prepared
    directory: RunDirectory
    parts: Parts
    engine: Engine
    feeds: dict[str, Feed]
    """Each split, as it is fed to the model."""
    plan: Plan
    precision: Precision
    store: CheckpointStore
    metric: MainMetric
    progress: ProgressFile | None
    """Only on worker 0."""

    def tell(self, phase: str) -> None:
        if self.progress is not None:
            self.progress.show(force=True, phase=phase)


def run_worker(
    prepared: Prepared,
    directory: RunDirectory,
    attempt: int,
    device: Any,
    is_first: bool,
    notice: Notice | None = None,
    wish: Wish | None = None,
) -> None:
    """Train on this worker, from the newest whole checkpoint if there is one; the results are left in the directory.

    Args:
        notice: tells when machines will be taken away; None where nobody takes any.
        wish: tells when the run is to end; None where nobody can wish it.

    Raises:
        Interrupted: the run is to end; the last step is saved.
    """
    progress = ProgressFile(directory.root, directory.send_progress) if is_first else None
    with log_to(directory.logs), open_session(prepared, directory, attempt, device, progress) as session:
        before = score_before(session)
        memory = resume(session)
        session.engine.first_worker_does(lambda: record_start(session, memory.step))
        saver = make_saver(session)
        watch = Watch(session.engine, saver, notice, wish, session.tell)
        with watch.while_steps_are_taken():
            for _ in evaluations(session, memory, [saver, watch]):
                pass
        finish(session, memory, before)


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
        plan = make_plan(recipe.train, lengths, micro_batch_size(recipe), prepared.tokens_per_pass)
        stack.enter_context(plain_linear())
        as_stored = may_load_as_stored(recipe, precision)
        parts = assemble_share(prepared, exchange, as_stored)
        is_rounded = place(parts, recipe, precision, device)
        # What is tried out is compared more finely than bf16 computes.
        finely = models.ComputesInFp32 if precision == "bf16" else contextlib.nullcontext
        with finely():
            split = split_at_boundary(prepared, parts, plan)
            packs = recipe.scale.zero_stage < 3 and can_pack(Feed(prepared.encoded("train"), device), parts.module)
        # The slowest to load and try out the model is waited for here, not in a collective of the engine.
        exchange.agree(None)
        if is_spread(recipe):
            trained = parts.count_parameters()["trained"]
            config = deepspeed_config(recipe, precision, plan.micro_batch_size, trained)
            spread(parts, recipe, config, device, exchange)
        engine = stack.enter_context(build_engine(parts.module, parts.groups, recipe, precision, exchange))
        engine.rounds_weights |= is_rounded and recipe.transfer.adapter is None
        store = open_store(
            directory,
            exchange,
            # Where no attempt is recorded, as in a search's trials, none can have taken over.
            lambda: directory.read_record().get("attempt", attempt) == attempt,
        )
        store.identity = exchange.first_does(lambda: identity_to_keep(prepared, directory, attempt))
        if recipe.scale.zero_stage == 3:  # No worker has the whole model on its device before.
            with finely():
                packs = can_pack(Feed(prepared.encoded("train"), device), parts.module)
        packs = share_findings(engine, parts, packs)
        fitted = models.fit_momentum(parts.module, passes_to_evaluation(recipe, plan))
        if fitted is not None:
            engine.first_worker_does(lambda: directory.note(fitted))
        session = Session(prepared, directory, parts, engine, {}, plan, precision, store, metric, progress)
        session.feeds = make_feeds(
            prepared, split, engine, precision, session.tell, directory.note, boundaries, directory.leads_node
        )
        session.feeds["train"].packs = packs
        if prepared.task.needs_reference:
            session.tell("asking the source")
            identity = model_identity(recipe, prepared.identity["source"], precision, engine)
            for name, feed in session.feeds.items():
                names = [*identity, prepared.keys[name]]
                refer_to_source(engine, prepared.task, feed, plan.micro_batch_size, names, prepared.tokens_per_pass)
        yield session


def passes_to_evaluation(recipe: Recipe, plan: Plan) -> int:
    """Return the least number of passes that a worker trains between two evaluations."""
    every = recipe.train.evaluate_every
    steps = plan.order.steps_per_epoch if every == "epoch" else int(every)
    passes = -(-recipe.train.global_batch_size // (recipe.scale.workers * plan.micro_batch_size))
    return min(steps, plan.total_steps) * passes


def place(parts: Parts, recipe: Recipe, precision: Precision, device: torch.device) -> bool:
    """Have the weights on the device, in the formats that the engine holds them in, before the model is tried out.

    With ZeRO-3, where a whole model need not fit on a device, they stay where they are.

    Returns:
        Whether digits of any weight were lost.
    """
    stage = recipe.scale.zero_stage
    autocasts = precision == "bf16" and stage == 0
    is_rounded = autocasts and may_narrow(recipe) and hold_frozen_in_bf16(parts.module)
    if stage < 3:
        parts.module.to(device)
    return is_rounded


def share_findings(engine: Engine, parts: Parts, packs: bool) -> bool:
    """Have all workers know what the first one found out, where it alone has the whole model; returns its `packs`."""
    losses = models.losses_of(parts.module)
    mine = (packs, parts.head_is_new, losses is not None and losses.is_direct)
    packs, parts.head_is_new, is_direct = engine.from_first_worker(mine)
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


def score_before(session: Session) -> dict[str, Reported] | None:
    """Scores before the first step, where the source's own head is kept; a new head knows nothing yet."""
    if session.parts.head_is_new:
        return None
    session.tell("scoring the source")
    return {name: score_split(session, name) for name in ("select", "test") if name in session.prepared.tables}


def resume(session: Session) -> Memory:
    """Put the newest whole checkpoint into the engine, if there is one; what the hooks remembered comes back."""

    def find() -> tuple[Checkpoint | None, int]:
        found, notes = session.store.newest_valid()
        num_rows = session.directory.forget_metrics_after(found.step if found else 0)
        for note in notes:
            session.directory.note(note)
        return found, num_rows

    found, num_rows = session.engine.first_worker_does(find)
    if found is None:
        return Memory()
    session.tell(f"resuming at step {found.step}")
    session.store.bring(found.step)
    here = session.store.at(found.step)  # Where this worker's node has it, which need not be the first one's.
    session.engine.read_state(here.folder)
    session.engine.agree(None)  # Who is slow to read is waited for here, not in a collective of the first step.
    memory = Memory(**here.state)
    session.engine.first_worker_does(lambda: note_lost_rows(session, memory, num_rows))
    return memory


def note_lost_rows(session: Session, memory: Memory, num_rows: int) -> None:
    """Say so where metrics.jsonl has fewer rows than were written up to the checkpoint."""
    lost, memory.num_rows = memory.num_rows - num_rows, num_rows
    if lost > 0:
        what = f"{lost} row{'s' if lost > 1 else ''} of {session.directory.metrics.name} up to step {memory.step}"
        session.directory.note(f"{what} {'were' if lost > 1 else 'was'} damaged or missing, and cannot be told again")


def record_start(session: Session, step: int) -> None:
    """Record how the run goes on after `step`."""
    note_other_number_of_workers(session, step)
    session.directory.update_record(
        world_size=session.engine.num_workers,
        precision=session.precision,
        parameters=session.parts.count_parameters(),
        total_steps=session.plan.total_steps,
    )


def note_other_number_of_workers(session: Session, step: int) -> None:
    """Say so where an elastic run goes on after `step` with more or fewer workers."""
    number = session.engine.num_workers
    before = session.directory.read_record().get("world_size", number)
    if step and before != number:
        session.directory.note(f"workers from step {step + 1} on: {number}; before: {before}")


def make_saver(session: Session) -> Saver:
    return Saver(session.engine, session.store, session.prepared.recipe.train, session.plan)


def evaluations(session: Session, memory: Memory, last_hooks: Sequence[Hook]) -> Iterator[dict[str, Any]]:
    """Train to the end, yielding the row of metrics.jsonl after each evaluation on *select*.

    Args:
        last_hooks: called after all others; those that save see what the others remembered.
    """
    if memory.stop or memory.step >= session.plan.total_steps:
        return
    prepared, engine, plan, train = session.prepared, session.engine, session.plan, session.prepared.recipe.train
    evaluator = Evaluator(
        engine, prepared.task, session.feeds["select"], session.metric, train, plan, session.directory
    )
    adapter = prepared.recipe.transfer.adapter
    hooks: list[Hook] = [
        *([Reached(engine, session.parts.module, session.directory.note)] if adapter is not None else []),
        Clock(plan, session.metric.name, session.progress, memory.seconds, engine.device),
        Recorder(engine.exchange, session.directory, train.log_every),
        evaluator,
        *last_hooks,
    ]
    steps = training_steps(engine, prepared.task, session.feeds["train"], session.parts.frozen, plan, memory.step)
    reset_peak(engine.device)
    for step in steps:
        for hook in hooks:
            hook.after_step(step, memory)
        reset_peak(engine.device)
        if evaluator.last is not None:
            yield evaluator.last
        if memory.stop:
            break


def finish(session: Session, memory: Memory, before: dict[str, Reported] | None) -> None:
    """Take the best weights, score every split that is reported, and write model, predictions and result."""
    prepared, engine, directory = session.prepared, session.engine, session.directory
    session.tell("scoring the best checkpoint")
    best_step = take_best_weights(session, memory)
    reported: list[str] = [name for name in ("select", "test") if name in prepared.tables]
    scored = {name: score_split(session, name) for name in reported}
    formats = formats_to_write(prepared, session.parts) if engine.rank == 0 else models.StoredFormats()
    weights = engine.trained_weights(formats.of)
    peaks = engine.gather(memory.peak_bytes)
    if engine.rank != 0:
        return
    started = time.monotonic()
    session.tell("writing the model")
    main = reported[-1]
    result = {
        "status": "finished",
        "metrics": {name: split.metrics for name, split in scored.items()},
        "before": None if before is None else {name: split.metrics for name, split in before.items()},
        "details": {main: prepared.task.details(scored[main].predictions, prepared.encoded(main).targets())},
        "samples": samples(before[main].answers if before else [], scored[main].answers),
        "steps": memory.step,
        "stopped_early": memory.stop,
        "seconds": memory.seconds,
        "peak_bytes": max(peaks),
        "best_step": best_step,
        "best_checkpoint": f"checkpoints/step-{best_step:08d}",
        "metric": session.metric.name,
        "metrics_shown": list(dict.fromkeys([session.metric.name, *prepared.task.metrics_shown])),
        "parameters": session.parts.count_parameters(),
    }
    rebuild = session.precision if engine.rounds_weights else None
    with AfterTraining(result["best_checkpoint"], directory.logs):
        export_model(prepared, session.parts, weights, formats, directory.model, result, rebuild)
        write_predictions(prepared, main, scored[main].predictions, directory.predictions)
        if "test" in scored:
            row = {
                "step": memory.step,
                "split": "test",
                "phase": "best",
                **scored["test"].metrics,
                "seconds": memory.seconds,
            }
            directory.append_metrics(row)
        result["seconds_exporting"] = time.monotonic() - started
        write_json(directory.result, finite(result))
        directory.send_results()


def take_best_weights(session: Session, memory: Memory) -> int:
    """Put the weights of the best checkpoint into the engine; returns their step.

    Where that checkpoint was damaged or deleted, the weights stay those of the last step, and a note says so.
    """
    engine, best = session.engine, memory.best_step
    if best is None or best == memory.step:
        return memory.step
    session.store.bring(best)
    checkpoint = session.store.at(best)
    damage = engine.first_worker_does(lambda: find_damage(checkpoint.folder))
    if damage is None:
        engine.read_state(checkpoint.folder)
        engine.agree(None)
        return best
    text = f"the best checkpoint, step {best}, cannot be used ({damage}); these are the weights of step {memory.step}"
    engine.first_worker_does(lambda: session.directory.note(text))
    return memory.step


@dataclass
class Reported:
    """Everything that is known of a split; predictions and answers on worker 0 alone."""

    metrics: dict[str, float]
    predictions: Arrays
    answers: list[Answer]


def score_split(session: Session, name: str) -> Reported:
    prepared, micro_batch = session.prepared, session.plan.micro_batch_size
    scored = score(session.engine, prepared.task, session.feeds[name], micro_batch, prepared.tokens_per_pass)
    written = write_answers(session.engine, prepared.task, prepared.processor, prepared.examples[name], micro_batch)
    return Reported({**scored.metrics, **written.metrics}, scored.predictions, written.answers)


def samples(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, str | None]]:
    """Some of the answers that were written, side by side with those before the first step."""
    earlier = {answer.source: answer.written for answer in before}
    return [{**asdict(answer), "before": earlier.get(answer.source)} for answer in after[:NUM_SAMPLES]]
