"""The results of a run: scores of every reported split, the model, predictions and result.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from orchestrator import models
from orchestrator.json_lines import finite
from orchestrator.runs.checkpoint import find_damage
from orchestrator.runs.directory import write_json
from orchestrator.tasks.base import Arrays
from orchestrator.training.evaluation import score
from orchestrator.training.export import AfterTraining, export_model, formats_to_write, write_predictions
from orchestrator.training.generation import Answer, write_answers
from orchestrator.training.hooks import TrainingState
from orchestrator.training.session import Session

NUM_SAMPLES = 8


def score_before(session: Session) -> dict[str, Reported] | None:
    """Return the scores before the first step; None where the head is new and knows nothing yet."""
    if session.parts.head_is_new:
        return None
    session.report_phase("scoring the source")
    return {name: score_split(session, name) for name in ("select", "test") if name in session.prepared.tables}


def finish(session: Session, state: TrainingState, before: dict[str, Reported] | None) -> None:
    """Take the best weights, score every split that is reported, and write model, predictions and result."""
    prepared, directory = session.prepared, session.directory
    session.report_phase("scoring the best checkpoint")
    best_step = load_best_weights(session, state)
    engine = session.engine  # Of the phase of the best checkpoint.
    reported: list[str] = [name for name in ("select", "test") if name in prepared.tables]
    scored = {name: score_split(session, name) for name in reported}
    formats = formats_to_write(prepared, session.parts) if engine.rank == 0 else models.StoredDtypes()
    weights = session.trained_weights(formats.of)
    peaks = engine.gather(state.peak_bytes)
    if engine.rank != 0:
        return
    started = time.monotonic()
    session.report_phase("writing the model")
    main = reported[-1]
    result = {
        "status": "finished",
        "metrics": {name: split.metrics for name, split in scored.items()},
        "before": None if before is None else {name: split.metrics for name, split in before.items()},
        "details": {main: prepared.task.details(scored[main].predictions, prepared.encoded(main).targets())},
        "samples": samples(before[main].answers if before else [], scored[main].answers),
        "steps": state.step,
        "stopped_early": state.stop,
        "seconds": state.seconds,
        "peak_bytes": max(peaks),
        "best_step": best_step,
        "best_checkpoint": f"checkpoints/step-{best_step:08d}",
        "best_phase": session.phase.name,
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
                "step": state.step,
                "split": "test",
                "phase": "best",
                **scored["test"].metrics,
                "seconds": state.seconds,
            }
            directory.append_metrics(row)
        result["seconds_exporting"] = time.monotonic() - started
        write_json(directory.result, finite(result))
        directory.upload_results()


def load_best_weights(session: Session, state: TrainingState) -> int:
    """Put the weights of the best checkpoint into the session, in their phase; returns their step.

    Where that checkpoint was damaged or deleted, the weights stay those of the last step, and a note says so.
    """
    exchange, best = session.exchange, state.best_step
    if best is None or best == state.step:
        return state.step
    session.store.download(best)
    checkpoint = session.store.at(best)
    damage = exchange.run_on_first(lambda: find_damage(checkpoint.folder))
    if damage is None:
        session.read_state(checkpoint.folder, TrainingState(**checkpoint.state))
        exchange.agree(None)
        return best
    text = f"the best checkpoint, step {best}, cannot be used ({damage}); these are the weights of step {state.step}"
    exchange.run_on_first(lambda: session.directory.add_note(text))
    return state.step


@dataclass
class Reported:
    """The scores of a split; predictions and answers on worker 0 alone."""

    metrics: dict[str, float]
    predictions: Arrays
    answers: list[Answer]


def score_split(session: Session, name: str) -> Reported:
    """Score a split by the session's weights as they are. All workers call this."""
    prepared, micro_batch = session.prepared, session.schedule.micro_batch_size
    scored = score(session.engine, prepared.task, session.loaders[name], micro_batch, prepared.tokens_per_pass)
    written = write_answers(session.engine, prepared.task, prepared.processor, prepared.examples[name], micro_batch)
    return Reported({**scored.metrics, **written.metrics}, scored.predictions, written.answers)


def samples(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, str | None]]:
    """Return some of the answers that were written, side by side with those before the first step."""
    earlier = {answer.source: answer.written for answer in before}
    return [{**asdict(answer), "before": earlier.get(answer.source)} for answer in after[:NUM_SAMPLES]]
