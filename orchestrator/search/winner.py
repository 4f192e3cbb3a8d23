"""Exports the winner's model as a training exports its model: weights from the trial, scored on *test*."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orchestrator.recipe.schema import Scale
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.logs import log_to
from orchestrator.search.outcome import BEST_WEIGHTS, history
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial_context import trial_inputs
from orchestrator.tasks.base import MainMetric
from orchestrator.training.engine.devices import choose_device
from orchestrator.training.hooks import TrainingState
from orchestrator.training.prepare import Prepared
from orchestrator.training.results import finish
from orchestrator.training.session import Session, open_session
from orchestrator.training.worker import evaluations, make_saver, resume


def keep_winner(
    prepared: Prepared, metric: MainMetric, directory: SearchDirectory, winner: dict[str, Any]
) -> dict[str, Any]:
    """Write the winner's model, its predictions and result.json into the search's directory; return the result.

    Where its weights were deleted it is trained again: the same recipe and seed give the same weights.
    """
    inputs = trial_inputs(prepared, winner["parameters"])
    # In one process nothing needs to be sharded.
    scale = inputs.recipe.scale.model_copy(update={name: getattr(Scale(), name) for name in ("zero_stage", "engine")})
    plain = replace(inputs, recipe=inputs.recipe.model_copy(update={"scale": scale}))
    run = directory.trial(winner["id"])
    with log_to(run.logs), open_session(plain, run, 0, choose_device(plain.recipe), None, metric) as session:
        weights = run.root / BEST_WEIGHTS
        if weights.exists():
            state = TrainingState(step=winner["best_step"], seconds=winner["seconds"], best_step=winner["best_step"])
            load_weights(session, weights, phase_at(session, run, winner["best_step"]))
        else:
            state = resume(session)
            for _ in evaluations(session, state, [make_saver(session)]):
                pass
        session.prepared = inputs
        session.directory = directory
        finish(session, state, None)
    result: dict[str, Any] = json.loads(directory.result.read_text(encoding="utf-8"))
    return result


def phase_at(session: Session, run: RunDirectory, step: int) -> int:
    """Return the index of the phase in which a trial was evaluated at a step."""
    names = [phase.name for phase in session.phases]
    if len(names) == 1:
        return 0
    row = next(row for row in history(run) if row["step"] == step)
    return names.index(row["phase"])


def load_weights(session: Session, path: Path, phase: int) -> None:
    """Load the trained values of a file into the model.

    Args:
        phase: index of the phase in which they were trained last.
    """
    if phase != session.phase_index:
        session.begin_phase(phase, 0, load_file(path))
        return
    module = session.parts.module
    here = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in load_file(path).items():
            here[name].copy_(value)
