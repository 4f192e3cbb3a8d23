"""One worker's part of a run: resume, train phase by phase, score, export. It is the same in one process or in many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.runs.checkpoint import Checkpoint
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.logs import log_to
from orchestrator.runs.progress import ProgressFile
from orchestrator.training.adapter_gradients import AdapterGradients
from orchestrator.training.hooks import Clock, Evaluator, Hook, Recorder, Saver, TrainingState
from orchestrator.training.interruption import StopRequest
from orchestrator.training.loop import training_steps
from orchestrator.training.memory_use import reset_peak_memory
from orchestrator.training.preemption import PreemptionNotice, Watch
from orchestrator.training.prepare import Prepared
from orchestrator.training.results import finish, score_before
from orchestrator.training.session import Session, open_session


def run_worker(
    prepared: Prepared,
    directory: RunDirectory,
    attempt: int,
    device: Any,
    is_first: bool,
    notice: PreemptionNotice | None = None,
    stop_request: StopRequest | None = None,
) -> None:
    """Train on this worker, from the newest whole checkpoint if there is one; the results are left in the directory.

    Args:
        notice: says when machines will be taken away; None where nobody takes any.
        stop_request: says when the run is to end; None where nobody can ask for it.

    Raises:
        Interrupted: the run is to end; the last step is saved.
    """
    progress = ProgressFile(directory.root, directory.upload_progress) if is_first else None
    with log_to(directory.logs), open_session(prepared, directory, attempt, device, progress) as session:
        before = score_before(session)
        state = resume(session)
        session.exchange.run_on_first(lambda: record_start(session, state.step))
        saver = make_saver(session)
        watch = Watch(session.exchange, saver, notice, stop_request, session.report_phase)
        with watch.during_steps():
            for _ in evaluations(session, state, [saver, watch]):
                pass
        finish(session, state, before)


def resume(session: Session) -> TrainingState:
    """Restore the newest whole checkpoint, if there is one, in its phase; return what the hooks remembered."""

    def find() -> tuple[Checkpoint | None, int]:
        found, notes = session.store.newest_valid()
        num_rows = session.directory.forget_metrics_after(found.step if found else 0)
        for note in notes:
            session.directory.add_note(note)
        return found, num_rows

    found, num_rows = session.exchange.run_on_first(find)
    if found is None:
        return TrainingState()
    session.report_phase(f"resuming at step {found.step}")
    session.store.download(found.step)
    here = session.store.at(found.step)  # On this worker's node, which need not be the first one's.
    state = TrainingState(**here.state)
    session.read_state(here.folder, state)
    session.exchange.agree(None)  # Who is slow to read is waited for here, not in a collective of the first step.
    session.exchange.run_on_first(lambda: note_lost_rows(session, state, num_rows))
    return state


def note_lost_rows(session: Session, state: TrainingState, num_rows: int) -> None:
    """Note it where metrics.jsonl has fewer rows than were written up to the checkpoint."""
    lost, state.num_rows = state.num_rows - num_rows, num_rows
    if lost > 0:
        what = f"{lost} row{'s' if lost > 1 else ''} of {session.directory.metrics.name} up to step {state.step}"
        session.directory.add_note(
            f"{what} {'were' if lost > 1 else 'was'} damaged or missing, and cannot be written again"
        )


def record_start(session: Session, step: int) -> None:
    """Record how the run goes on after `step`."""
    note_other_number_of_workers(session, step)
    session.directory.update_record(
        world_size=session.engine.num_workers,
        precision=session.precision,
        parameters=session.parts.count_parameters(),
        total_steps=session.schedule.total_steps,
    )


def note_other_number_of_workers(session: Session, step: int) -> None:
    """Note it where an elastic run goes on after `step` with more or fewer workers."""
    number = session.engine.num_workers
    before = session.directory.read_record().get("world_size", number)
    if step and before != number:
        session.directory.add_note(f"workers from step {step + 1} on: {number}; before: {before}")


def make_saver(session: Session) -> Saver:
    """Return the hook that saves a run's checkpoints."""
    return Saver(session)


def evaluations(session: Session, state: TrainingState, last_hooks: Sequence[Hook]) -> Iterator[dict[str, Any]]:
    """Train to the end, yielding the row of metrics.jsonl after each evaluation on *select*.

    Args:
        last_hooks: called after all others; those that save see what the others remembered.
    """
    yield from evaluations_of_phase(session, state, last_hooks)
    while session.ends_phase(state) and not session.ends_run(state):
        session.begin_next_phase(state)
        yield from evaluations_of_phase(session, state, last_hooks)


def evaluations_of_phase(
    session: Session, state: TrainingState, last_hooks: Sequence[Hook]
) -> Iterator[dict[str, Any]]:
    """Train to the end of the session's phase; as `evaluations`."""
    if session.ends_phase(state):
        return
    engine, task, schedule, phase = session.engine, session.prepared.task, session.schedule, session.phase
    train = phase.recipe.train
    select, metric = session.loaders["select"], session.metric
    evaluator = Evaluator(engine, task, select, metric, train, schedule, session.directory, phase.name)
    has_adapter = phase.recipe.transfer.adapter is not None
    hooks: list[Hook] = [
        *([AdapterGradients(engine, session.parts.module, session.directory.add_note)] if has_adapter else []),
        Clock(schedule, phase.name, metric.name, session.progress, state.seconds, engine.device),
        Recorder(engine.exchange, session.directory, train.log_every, phase.name),
        evaluator,
        *last_hooks,
    ]
    loader, frozen = session.loaders["train"], session.parts.frozen
    reset_peak_memory(engine.device)
    for step in training_steps(engine, task, loader, frozen, schedule, state.step, session.methods):
        for hook in hooks:
            hook.after_step(step, state)
        reset_peak_memory(engine.device)
        if evaluator.last is not None:
            yield evaluator.last
        if state.stop:
            break
