"""One worker's part of a run: resume, train, score, export. It runs the same in one process or in many."""

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
        notice: tells when machines will be taken away; None where nobody takes any.
        wish: tells when the run is to end; None where nobody can wish it.

    Raises:
        Interrupted: the run is to end; the last step is saved.
    """
    progress = ProgressFile(directory.root, directory.upload_progress) if is_first else None
    with log_to(directory.logs), open_session(prepared, directory, attempt, device, progress) as session:
        before = score_before(session)
        state = resume(session)
        session.engine.run_on_first_worker(lambda: record_start(session, state.step))
        saver = make_saver(session)
        watch = Watch(session.engine, saver, notice, stop_request, session.report_phase)
        with watch.during_steps():
            for _ in evaluations(session, state, [saver, watch]):
                pass
        finish(session, state, before)


def resume(session: Session) -> TrainingState:
    """Put the newest whole checkpoint into the engine, if there is one; what the hooks remembered comes back."""

    def find() -> tuple[Checkpoint | None, int]:
        found, notes = session.store.newest_valid()
        num_rows = session.directory.forget_metrics_after(found.step if found else 0)
        for note in notes:
            session.directory.add_note(note)
        return found, num_rows

    found, num_rows = session.engine.run_on_first_worker(find)
    if found is None:
        return TrainingState()
    session.report_phase(f"resuming at step {found.step}")
    session.store.download(found.step)
    here = session.store.at(found.step)  # Where this worker's node has it, which need not be the first one's.
    session.engine.read_state(here.folder)
    session.engine.agree(None)  # Who is slow to read is waited for here, not in a collective of the first step.
    state = TrainingState(**here.state)
    session.engine.run_on_first_worker(lambda: note_lost_rows(session, state, num_rows))
    return state


def note_lost_rows(session: Session, state: TrainingState, num_rows: int) -> None:
    """Say so where metrics.jsonl has fewer rows than were written up to the checkpoint."""
    lost, state.num_rows = state.num_rows - num_rows, num_rows
    if lost > 0:
        what = f"{lost} row{'s' if lost > 1 else ''} of {session.directory.metrics.name} up to step {state.step}"
        session.directory.add_note(
            f"{what} {'were' if lost > 1 else 'was'} damaged or missing, and cannot be told again"
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
    """Say so where an elastic run goes on after `step` with more or fewer workers."""
    number = session.engine.num_workers
    before = session.directory.read_record().get("world_size", number)
    if step and before != number:
        session.directory.add_note(f"workers from step {step + 1} on: {number}; before: {before}")


def make_saver(session: Session) -> Saver:
    return Saver(session.engine, session.store, session.prepared.recipe.train, session.schedule)


def evaluations(session: Session, state: TrainingState, last_hooks: Sequence[Hook]) -> Iterator[dict[str, Any]]:
    """Train to the end, yielding the row of metrics.jsonl after each evaluation on *select*.

    Args:
        last_hooks: called after all others; those that save see what the others remembered.
    """
    if state.stop or state.step >= session.schedule.total_steps:
        return
    prepared, engine, schedule, train = (
        session.prepared,
        session.engine,
        session.schedule,
        session.prepared.recipe.train,
    )
    evaluator = Evaluator(
        engine, prepared.task, session.loaders["select"], session.metric, train, schedule, session.directory
    )
    adapter = prepared.recipe.transfer.adapter
    hooks: list[Hook] = [
        *([AdapterGradients(engine, session.parts.module, session.directory.add_note)] if adapter is not None else []),
        Clock(schedule, session.metric.name, session.progress, state.seconds, engine.device),
        Recorder(engine.exchange, session.directory, train.log_every),
        evaluator,
        *last_hooks,
    ]
    steps = training_steps(engine, prepared.task, session.loaders["train"], session.parts.frozen, schedule, state.step)
    reset_peak_memory(engine.device)
    for step in steps:
        for hook in hooks:
            hook.after_step(step, state)
        reset_peak_memory(engine.device)
        if evaluator.last is not None:
            yield evaluator.last
        if state.stop:
            break
